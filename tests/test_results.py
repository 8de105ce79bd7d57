"""Result files: what is kept, how it is checked, and the tables and plots made from it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import configs, report, results
from experiments.config import TrainConfig
from experiments.results import ResultError
from experiments.typed import from_json

ROOT = Path(__file__).resolve().parent.parent


def passkey(name="demo", **values):
    curves = [
        {
            "label": "FAM",
            "seed": 0,
            "blocks": [4, 8, 16],
            "accuracy": [1.0, 0.9, 0.5],
            "trials": [10, 10, 10],
        },
        {"label": "BSWA", "seed": 0, "blocks": [4, 8], "accuracy": [0.5, 0.0], "trials": [10, 10]},
    ]
    return results.make(
        "passkey",
        name,
        config={"model": {"d_model": 8}},
        seeds=[0],
        values={"curves": curves, **values},
        wall_seconds=1.5,
        command="python -m experiments.demo",
    )


def edited(path: Path, **fields) -> Path:
    """Writes a result with some top-level fields changed; a field set to ... is removed."""
    content = dataclasses.asdict(passkey()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    return path


def test_write_then_read_gives_the_same(tmp_path):
    result = passkey()
    path = results.write(result, tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "demo.json"
    assert results.read(path) == result
    assert list(path.parent.iterdir()) == [path], "no temporary file stays"


def test_result_knows_its_circumstances():
    result = passkey()
    assert result.schema == results.SCHEMA
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= set(result.versions)
    assert result.hardware["cores"] >= 1
    assert result.hardware["cpu"]
    assert result.time.endswith("+00:00")


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == {"hash": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = results.commit()
    assert clean["dirty"] is False
    assert len(clean["hash"]) == 40
    (tmp_path / "file").write_text("two")
    assert results.commit() == {"hash": clean["hash"], "dirty": True}


def test_command_line_is_the_one_that_was_typed():
    code = "from experiments import results; print(results.command_line())"
    done = subprocess.run([sys.executable, "-c", code, "a b"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "python -c 'a b'"
    module = subprocess.run(
        [sys.executable, "-m", "experiments.report", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert module.returncode == 0
    assert "--together" in module.stdout


def test_values_of_every_kind_become_json():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        a: tuple[int, ...] = (1, 2)
        b: float = float("nan")

    value = {"x": Inner(), "y": np.float32(0.5), "z": jnp.arange(2), "p": Path("a") / "b", "n": None, 3: True}
    expected = {"x": {"a": [1, 2], "b": None}, "y": 0.5, "z": [0, 1], "p": "a/b", "n": None, "3": True}
    assert passkey(more=value).values["more"] == expected
    with pytest.raises(ValueError, match=r"values\.more\.a\[1\] is a set, which has no JSON form"):
        passkey(more={"a": [1, {2}]})


def test_a_config_in_a_result_can_be_read_back():
    config = configs.get("passkey")
    made = results.make("passkey", "demo", config=config, seeds=[0], values={}, wall_seconds=1.0)
    assert from_json(json.loads(json.dumps(made.config)), TrainConfig) == config


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b"])
def test_names_that_are_no_file_names(name):
    with pytest.raises(ResultError, match="cannot name a result file"):
        passkey(name)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = results.write(passkey(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        results.write(dataclasses.replace(passkey(), values={"x": {1, 2}}), tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        results.write(dataclasses.replace(passkey(), values={"x": float("nan")}), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(results.Result)])
def test_missing_field_is_named_with_the_file(tmp_path, field):
    path = edited(tmp_path / "r.json", **{field: ...})
    with pytest.raises(ResultError, match=rf"r\.json: field '{field}' is missing"):
        results.read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 3}, "field 'seeds' is a int, but must be list"),
        ({"wall_seconds": True}, "field 'wall_seconds' is a bool"),
        ({"data": "text"}, "field 'data' is a str, but must be dict or null"),
        ({"schema": 99}, "field 'schema' is 99, but this version reads 1"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_wrong_fields_are_errors(tmp_path, fields, message):
    with pytest.raises(ResultError, match=message):
        results.read(edited(tmp_path / "r.json", **fields))


@pytest.mark.parametrize(
    ("text", "message"), [("", "not a JSON file"), ("[1]", "it holds a list"), ("{", "not a JSON")]
)
def test_files_that_hold_no_result(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=message):
        results.read(path)
    with pytest.raises(ResultError, match="cannot be read"):
        results.read(tmp_path / "none.json")


def test_table_shows_the_numbers_of_the_file():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table(passkey()).splitlines()]
    assert rows[0][1:] == ["4", "8", "16"]
    assert rows[2] == ["FAM", "1.000", "0.900", "0.500"]
    assert rows[3] == ["BSWA", "0.500", "0.000", "–"]


def test_what_was_measured_beside_has_a_table_of_its_own_which_old_files_lack():
    old = {"label": "old", "seed": 0, "position": [8, 16], "loss": [3.0, 2.0]}
    new = [{**old, "label": "new", "seed": seed, "accuracy": [0.25, 0.5 + 0.1 * seed]} for seed in (0, 1)]
    made = dataclasses.replace(passkey(curves=[old]), kind="loss-by-position")
    before = report.table(made)
    assert "next tokens right" not in before
    both = report.table(dataclasses.replace(made, values={"curves": [old, *new]})).split("\n\n")
    assert [part.splitlines()[0].split(" by ")[0] for part in both] == [
        "| loss in nats per token",
        "| next tokens right",
    ]
    assert "old" in both[0]
    assert "old" not in both[1]
    assert "| new (2 seeds)" in both[1]
    assert "0.250 ± 0.000 | 0.550 ± 0.635 |" in both[1]


def test_seeds_are_averaged_with_an_interval_of_the_mean():
    curves = [
        {"label": "FAM", "seed": seed, "blocks": [4, 8], "accuracy": [value, 1.0]}
        for seed, value in enumerate([0.7, 0.8, 0.9])
    ]
    (line,) = report.lines(passkey(curves=curves))
    np.testing.assert_allclose(line.mean, [0.8, 1.0])
    np.testing.assert_allclose(line.half, [4.302653 * 0.1 / 3**0.5, 0.0], rtol=1e-6)  # t(0.975, 2) s / sqrt(n)
    assert "FAM (3 seeds)" in report.table(passkey(curves=curves))
    assert "0.800 ± 0.248" in report.table(passkey(curves=curves))


def test_long_curves_are_thinned_in_the_table_only():
    curves = [{"label": "run", "step": list(range(100)), "loss": [None, *np.linspace(5, 1, 99).tolist()]}]
    result = dataclasses.replace(passkey(curves=curves), kind="training")
    header, _, row = report.table(result).splitlines()
    assert header.count("|") == report.COLUMNS + 2
    assert "not finite" in row
    assert "1.000" in row
    assert len(report.lines(result)[0].x) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "field 'kind' is 'other'; known kinds"),
        ({"values": {}}, "'values.curves' must be a list"),
        (
            {"values": {"curves": [{"label": "a", "blocks": [1]}]}},
            r"'values.curves\[0\].accuracy' is missing",
        ),
        ({"values": {"curves": [{"label": "a", "blocks": [1], "accuracy": []}]}}, "differ in length"),
    ],
)
def test_report_names_what_a_result_lacks(change, message):
    with pytest.raises(ResultError, match=message):
        report.table(dataclasses.replace(passkey(), **change))


def test_command_makes_tables_and_plots_from_files(tmp_path, monkeypatch, capsys):
    results.write(passkey("one", marks=[{"x": 6, "label": "longest trained"}]), tmp_path / "in")
    results.write(passkey("two"), tmp_path / "in")
    output = tmp_path / "report" / "all.md"
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "in"), "--output", str(output)])
    assert report.main() == 0
    text = output.read_text()
    assert "![one](../in/one.png)" in text
    assert "`python -m experiments.demo`; seeds 0; 2 s" in text
    assert (tmp_path / "in" / "two.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()

    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "in"), "--together", "--plots", str(tmp_path / "plots")])
    assert report.main() == 0
    text = capsys.readouterr().out
    assert text.count("## ") == 1
    assert "two: FAM" in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["passkey.png"]


def test_command_reports_bad_input_in_one_line(tmp_path, monkeypatch, capsys):
    for path, message in ((tmp_path, "no result file in this folder"), (tmp_path / "x.json", "no such file")):
        monkeypatch.setattr(sys, "argv", ["report", str(path)])
        assert report.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    folder = results.write(passkey("one"), tmp_path / "in").parent
    (tmp_path / "file").touch()
    for option, path, message in (
        ("--output", folder, "is a folder; give the name of a file"),
        ("--output", tmp_path / "file" / "x.md", "file is no folder; give another folder"),
        ("--plots", tmp_path / "file", "plots='"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", str(folder), option, str(path)])
        assert report.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error


def training_run(folder: Path, rows) -> Path:
    """The files of a training run, as far as a report reads them."""
    (folder / "checkpoints" / "2").mkdir(parents=True)
    (folder / "checkpoints" / "2" / "meta.json").write_text("{}")
    circumstances = {name: getattr(passkey(), name) for name in ("commit", "hardware", "versions", "command", "data")}
    (folder / "run.json").write_text(json.dumps({"config": {"name": "lm", "seed": 7}, **circumstances}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "cut o')
    return folder


def test_training_runs_are_reported_beside_results(tmp_path, monkeypatch, capsys):
    rows = [
        {"step": 1, "split": "train", "loss": 3.0, "accuracy": 0.1},
        {"step": 2, "split": "train", "loss": 2.5, "accuracy": 0.2},
        {"step": 2, "split": "validation", "loss": 2.75, "accuracy": 0.2},
    ]
    run = training_run(tmp_path / "runs" / "lm", rows)
    file = results.write(passkey("one"), tmp_path / "runs")
    assert results.find([tmp_path / "runs"]) == [file, run]
    result = results.read_run(run)
    assert result.values["curves"] == [
        {"label": "train", "seed": 7, "step": [1, 2], "loss": [3.0, 2.5]},
        {"label": "validation", "seed": 7, "step": [2], "loss": [2.75]},
    ]
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "runs")])
    assert report.main() == 0
    text = capsys.readouterr().out
    assert "## one" in text
    assert "## lm-training" in text
    assert (run / "training.png").exists()


def test_incomplete_runs_are_errors(tmp_path):
    with pytest.raises(ResultError, match=r"run\.json: cannot be read"):
        results.read_run(tmp_path)
    run = training_run(tmp_path / "lm", [{"step": 1, "split": "train"}])
    with pytest.raises(ResultError, match=r"is not what experiments\.train writes .*loss"):
        results.read_run(run)

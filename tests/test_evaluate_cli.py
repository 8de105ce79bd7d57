"""The command that measures a run and makes result files."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from data_helpers import small_books

from experiments import data, evaluate, results
from experiments.checkpoint import load_model
from experiments.data.babi import BabiData
from experiments.files import run_folder
from experiments.measures import loss_by_position
from experiments.train import train

ROOT = Path(__file__).resolve().parent.parent


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


def test_command_measures_passkey_with_its_control(tmp_path, monkeypatch, capsys):
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    out = tmp_path / "out"
    options = ["--checkpoint", run, "--output", out, "--trials", 20, "--lengths", 9, 12, "--zero-memory"]
    assert command(monkeypatch, *options, "--depth", "first") == 0
    printed = capsys.readouterr().out
    result = results.read(out / "tiny-passkey-passkey.json")
    kept, zeroed = result.values["curves"]
    assert (kept["label"], zeroed["label"]) == ("tiny-passkey", "tiny-passkey, memory zeroed")
    assert kept["blocks"] == zeroed["blocks"] == [9, 12]
    assert kept["depth"] == "first"
    assert kept["trials"] == [20, 20]
    assert result.values["marks"] == [{"x": 10, "label": "longest trained"}]
    assert result.config["evaluate"]["trials"] == 20
    assert result.config["train"]["model"]["memory"]["fam_length"] == 2
    assert result.seeds == [3, 0]
    assert (out / "tiny-passkey-passkey.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny-passkey, memory zeroed" in printed
    assert "tiny-passkey-passkey.json" in printed


def test_command_measures_pairs_by_their_number(tmp_path, monkeypatch, capsys):
    run = tiny_run.save(tiny_run.pairs_config(), tmp_path / "run")
    options = ["--checkpoint", run, "--output", tmp_path, "--trials", 12, "--batch-size", 6, "--zero-memory"]
    assert command(monkeypatch, *options, "--lengths", 1, 4) == 0
    assert "exact match by key-value pairs" in capsys.readouterr().out
    result = results.read(tmp_path / "tiny-pairs-pairs.json")
    assert result.kind == "pairs"
    assert [curve["label"] for curve in result.values["curves"]] == ["tiny-pairs", "tiny-pairs, memory zeroed"]
    assert all(curve["pairs"] == [1, 4] and curve["trials"] == [12, 12] for curve in result.values["curves"])
    assert result.values["marks"] == [{"x": 2, "label": "most trained"}]
    assert command(monkeypatch, *options, "--lengths", 5) == 2
    assert "pairs=(5,): must be at most 4" in capsys.readouterr().err
    assert command(monkeypatch, *options, "--depth", "first") == 2
    assert "depth='first' is for task=passkey, but the run 'tiny-pairs' was trained on" in capsys.readouterr().err


def test_command_measures_each_kind_of_question_in_validation_text(tmp_path, monkeypatch):
    data = BabiData(**small_books(tmp_path), block_size=32, blocks=(15, 16), questions=(1, 4))
    model = tiny_run.model_config(tiny_run.MemoryConfig(block_size=32, fam_length=2))
    config = dataclasses.replace(tiny_run.pairs_config(), name="tiny-babi", model=model, data=data)
    run = tiny_run.save(config, tmp_path / "run")
    options = ["--checkpoint", run, "--output", tmp_path, "--trials", 3, "--batch-size", 2, "--lengths", 15]
    assert command(monkeypatch, *options) == 0
    result = results.read(tmp_path / "tiny-babi-babi.json")
    assert [curve["label"] for curve in result.values["curves"]] == ["tiny-babi, question 1", "tiny-babi, question 4"]
    assert all(curve["blocks"] == [15] and curve["trials"] == [3] for curve in result.values["curves"])
    assert result.data["source"] == data.source


def test_command_measures_loss_by_position_of_text(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"document {number}\n" * (number + 3))
    config = tiny_run.text_config(source=f"text:{folder}", data_dir=str(tmp_path / "data"))
    run = tiny_run.save(config, tmp_path / "run")
    arguments = [
        "--checkpoint",
        run,
        "--output",
        tmp_path,
        "--max-tokens",
        60,
        "--documents",
        1,
        "--name",
        "x",
    ]
    assert command(monkeypatch, *arguments) == 0
    result = results.read(tmp_path / "x.json")
    (curve,) = result.values["curves"]
    assert result.kind == "loss-by-position"
    assert len(curve["documents"]) == 1
    assert sum(curve["tokens"]) == curve["document_tokens"][0] <= 59
    assert result.data is not None
    assert "validation" in json.dumps(result.data)
    assert 4 < curve["loss"][0] < 8  # an untrained model, about log(256)
    assert len(curve["accuracy"]) == len(curve["loss"])

    # Pieces are documents of their own, and are told of by the document that they were cut from.
    assert command(monkeypatch, *arguments[:-4], "--documents", 2, "--piece", 25, "--name", "y") == 0
    (cut,) = results.read(tmp_path / "y.json").values["curves"]
    model, variables, settings = load_model(run)
    texts = [document.tokens[:60] for document in itertools.islice(data.documents(settings.data, "validation"), 2)]
    pieces = [[text[:25], text[25:50], text[50:]] for text in texts]
    wanted = [loss_by_position(model, variables, [one for one in each if len(one) > 1]) for each in pieces]
    assert cut["document_tokens"] == [sum(one["document_tokens"]) for one in wanted]
    for name in ("loss", "accuracy"):
        means = [np.average(one[f"document_{name}"], weights=one["document_tokens"]) for one in wanted]
        np.testing.assert_allclose(cut[f"document_{name}"], means, rtol=1e-5)


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/1"])
def test_results_go_to_the_run_unless_told_otherwise(tmp_path, monkeypatch, capsys, given):
    """A run of the same name as one of ours must not overwrite a result that the repository keeps."""
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    (run / "run.json").touch()
    tracked = set(results.DIRECTORY.iterdir())
    assert command(monkeypatch, "--checkpoint", tmp_path / given, "--trials", 2, "--lengths", 9) == 0
    file = run / "results" / "tiny-passkey-passkey.json"
    assert f"wrote {file} and" in capsys.readouterr().out
    assert results.find([run]) == [run, file]
    assert set(results.DIRECTORY.iterdir()) == tracked


def test_the_run_of_a_checkpoint(tmp_path):
    """Whatever is above it is called, and if it was copied elsewhere."""
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "checkpoints" / "mine")
    assert run_folder(run) == run_folder(run / "checkpoints") == run_folder(run / "checkpoints" / "1") == run
    copy = shutil.copytree(run / "checkpoints" / "1", tmp_path / "copy")
    assert run_folder(copy) == copy


def test_command_measures_answers_of_a_run_and_of_several_of_its_checkpoints(tmp_path, monkeypatch, capsys):
    changes = {"steps": 2, "checkpoint_every": 1, "eval_every": 1, "eval_steps": 2, "work_dir": str(tmp_path / "run")}
    config = dataclasses.replace(tiny_run.arithmetic_config(), **changes)
    done = train(config, progress=False)
    assert set(done.validation) == {"loss", "accuracy"}
    arguments = ["--checkpoint", tmp_path / "run", "--output", tmp_path, "--batch-size", 9]
    assert command(monkeypatch, *arguments) == 0
    assert command(monkeypatch, *arguments, "--steps", 1, 2) == 0
    printed = capsys.readouterr().out
    assert "operands, or steps of the reasoning" in printed
    assert "tiny-arithmetic, level 3" in printed
    one, many = (results.read(tmp_path / f"tiny-arithmetic-{kind}.json") for kind in ("answers", "answers-by-step"))
    assert (one.kind, many.kind) == ("answers", "answers-by-step")
    assert one.seeds == many.seeds == [3]
    (curve,) = one.values["curves"]
    assert curve["level"] == [2, 3]
    assert curve["trials"] == [11, 11]
    for place, by_step in enumerate(many.values["curves"]):
        assert by_step["step"] == [1, 2]
        assert by_step["correct"][1] == curve["correct"][place]
        assert by_step["trials"] == [11, 11]
    assert (tmp_path / "tiny-arithmetic-answers-by-step.png").read_bytes().startswith(b"\x89PNG")
    assert command(monkeypatch, *arguments, "--steps", 5) == 1
    assert "no checkpoint of step 5" in capsys.readouterr().err
    single = ["--checkpoint", tmp_path / "run" / "checkpoints" / "1", "--output", tmp_path, "--steps", 1]
    assert command(monkeypatch, *single) == 2
    assert "give the folder of the run" in capsys.readouterr().err


def test_command_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    text = tiny_run.save(tiny_run.text_config(source="text:nowhere/*"), tmp_path / "text")
    questions = tiny_run.save(tiny_run.arithmetic_config(), tmp_path / "questions")
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--checkpoint", run, "--task", "loss-by-position"], "was trained on the PassKey task"),
        (["--checkpoint", text, "--task", "passkey"], "was trained on text"),
        (["--checkpoint", questions, "--task", "passkey"], "was trained on questions; use task=answers"),
        (["--checkpoint", text, "--task", "answers"], "was trained on text; use task=loss-by-position"),
        (["--checkpoint", text], "no file matches"),
        (["--checkpoint", text, "--source", "chat:x"], "give one with --source, such as python-source or text:GLOB"),
        (["--checkpoint", run, "--trials", "0"], "trials=0"),
        (["--checkpoint", tmp_path / "none"], "no checkpoint in"),
        (["--checkpoint", run, "--steps", 5], "steps=(5,) is for task=answers, but the run 'tiny-passkey' was trained"),
        (["--checkpoint", run, "--source", "pg19"], "source='pg19' is for task=loss-by-position"),
        (["--checkpoint", questions, "--zero-memory"], "zero_memory=True is for task=loss-by-position and task="),
        (["--checkpoint", text, "--lengths", 9], "lengths=(9,) is for task=passkey"),
        (["--checkpoint", questions, "--depth", "first"], "depth='first' is for task=passkey"),
        (["--checkpoint", questions, "--chunk", 9], "chunk=9 is for task=loss-by-position and task=passkey"),
        (["--checkpoint", run, "--output", tmp_path / "file"], "file' cannot be used"),
        (["--checkpoint", run, "--output", tmp_path / "file" / "x"], "file is no folder; give another folder"),
        (["--checkpoint", run, "--output", tmp_path / "x.json"], "x.json' names a file; give a folder"),
    ):
        # A checkpoint that cannot be read is not a wrong setting, as in training.
        status = 1 if "checkpoint" in message else 2
        assert command(monkeypatch, "--output", tmp_path / "out", *arguments) == status
        error = capsys.readouterr().err
        assert message in error
        assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not list((tmp_path / "out").iterdir())  # the folder is made before measuring, to know that it can be


def test_unknown_option_is_an_error_of_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", "--checkpoint", ".", "--trails", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--trails" in done.stderr

"""What command lines share: interruption, settings of the wrong type, and folders that cannot be made."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import heed_interrupts

from experiments import configs
from experiments.command import make_folder
from experiments.data import TextData
from experiments.data.passkey import PasskeyData
from experiments.optim import OptimConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (TextData, "batch_size", 8.5),
        (TextData, "batch_size", "8"),
        (TextData, "source", None),
        (TextData, "repeat_weight", math.inf),
        (OptimConfig, "weight_decay", math.inf),
        (OptimConfig, "learning_rate", "x"),
        (OptimConfig, "optimizer", "sgd"),
        (PasskeyData, "blocks", [5, 6]),
        (PasskeyData, "blocks", (5.0, 6)),
    ],
)
def test_a_setting_of_the_wrong_type(make, field, value):
    with pytest.raises(ValueError, match=rf"{make.__name__}\.{field}=.* is not allowed; it must be"):
        make(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("steps", 2.5), ("steps", "2"), ("model", None), ("seed", 2**63)])
def test_a_run_setting_of_the_wrong_type(field, value):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field}=.* is not allowed; it must be"):
        dataclasses.replace(configs.get("lm"), **{field: value})


def test_an_integer_is_a_number():
    assert OptimConfig(learning_rate=1).learning_rate == 1


def test_folders_that_cannot_be_made(tmp_path, monkeypatch):
    assert make_folder(tmp_path / "a" / "b", "output").is_dir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, reason in (("file", "file is no"), ("file/x/y", "file is no"), ("link", "link is no")):
        message = rf"output='{tmp_path / path}' cannot be used: {tmp_path}/{reason} folder; give another folder"
        with pytest.raises(ValueError, match=message):
            make_folder(tmp_path / path, "output")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="it may not be written to"):
        make_folder(tmp_path, "output")


@pytest.mark.parametrize(
    "command", ["train --config passkey", pytest.param("quickstart --smoke", marks=pytest.mark.slow)]
)
def test_interrupted_before_training_begins(command, tmp_path):
    """One line, no traceback, and the exit status that a shell gives to an interrupt."""
    words = [sys.executable, "-m", *f"experiments.{command}".split(), "--work-dir", str(tmp_path / "run")]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "run").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert "Traceback" not in errors
    assert process.returncode == 130, errors

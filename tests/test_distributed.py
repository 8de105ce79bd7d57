"""Several processes on this machine train as one: same losses, same stops, same errors."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from train_helpers import ROOT, environment, metric_rows, restore, tiny

from experiments import distributed
from experiments.checkpoint import CheckpointError
from experiments.optim import OptimConfig
from experiments.spread import to_host
from experiments.train import main, train
from experiments.typed import to_json

pytestmark = pytest.mark.usefixtures("compile_cache")

PROCESS = """
import json, sys
from experiments import configs
from experiments.config import TrainConfig
from experiments.typed import from_json

configs.get = lambda name: from_json(json.loads(sys.argv[1]), TrainConfig)
from experiments.train import main

sys.exit(main(["--config", "lm", *sys.argv[2:]]))
"""


def tiny_job(tmp_path, name="job", **changes):
    """A run whose rows four devices can share."""
    config = tiny(tmp_path, name, eval_every=10, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))


class Job:
    """Processes of one job, each with some devices; `configs` has one config for all, or one for each."""

    def __init__(self, folder, configs, count=2, devices=1, options=(), folders=None, program=PROCESS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        configs = configs if isinstance(configs, list) else [configs] * count
        self.logs = [folder / f"log-{number}.txt" for number in range(count)]
        self.processes = []
        for number, config in enumerate(configs):
            where = ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.num-processes", str(count)]
            command = [sys.executable, "-c", program, json.dumps(to_json(config)), *where]
            command += ["--distributed.process-id", str(number), *options]
            with self.logs[number].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=folders[number] if folders else ROOT,
                        env=environment() | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, timeout=240):
        """Exit codes of all."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self, number=0):
        return self.logs[number].read_text(errors="replace")

    def wait_for_step(self, config, step):
        """Returns when a step is in the metrics."""
        for _ in range(1200):
            if any(process.poll() is not None for process in self.processes):
                raise AssertionError("\n".join(self.text(number) for number in range(len(self.processes))))
            path = config.directory / "metrics.jsonl"
            if path.exists() and any(row["step"] >= step for row in metric_rows(config)):
                return
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached")


def assert_same_metrics(got, wanted):
    """The same lines, numbers within 1e-5."""
    assert [(row["step"], row["split"]) for row in got] == [(row["step"], row["split"]) for row in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"split"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (a["step"], name)


@pytest.mark.slow
def test_two_and_then_four_processes_are_as_one(tmp_path):
    """Training, evaluation, checkpoints and the data; a run that goes on with another number of processes."""
    alone, together = tiny_job(tmp_path, "alone"), tiny_job(tmp_path, "together")
    train(alone, progress=False)
    decay = ("--optim.decay-steps", "20")
    job = Job(tmp_path, dataclasses.replace(together, steps=10), count=2, devices=2, options=decay)
    assert job.wait() == [0, 0], job.text()
    assert "2 processes with 2 devices each" in job.text()
    assert "step/s" not in job.text(1)  # only the main process shows how far it is
    job = Job(tmp_path, together, count=4, options=decay)
    assert job.wait() == [0] * 4, job.text()
    assert "continuing after step 10 of 20" in job.text()
    assert_same_metrics(metric_rows(together), metric_rows(alone))
    one, other = restore(alone), restore(together)
    assert one.data == other.data
    assert np.any(np.asarray(other.rest["rsp"].fam))
    for name in ("fam", "segment_k"):
        a, b = (np.asarray(getattr(found.rest["stream"], name)) for found in (one, other))
        np.testing.assert_allclose(b, a, atol=1e-4)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_at_one_process_stops_all_at_one_step(tmp_path, victim):
    config = tiny_job(tmp_path, steps=10_000)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_steps=10_000))
    job = Job(tmp_path, config)
    job.wait_for_step(config, 3)
    job.processes[victim].send_signal(signal.SIGTERM)
    assert job.wait() == [143, 143], job.text()
    found = restore(config)
    assert f"stopped by SIGTERM after step {found.step}" in job.text()
    assert metric_rows(config)[-1]["step"] == found.step
    assert int(found.rest["step"]) == found.step


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_others(tmp_path, victim):
    config = tiny_job(tmp_path, steps=10_000)
    job = Job(tmp_path, config)
    job.wait_for_step(config, 3)
    job.processes[victim].kill()
    start = time.monotonic()
    codes = job.wait(60)
    assert time.monotonic() - start < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] in (-signal.SIGABRT, distributed.LOST_STATUS)
    assert re.search("lost the others|unhealthy|Socket closed|leader", job.text(1 - victim))


def test_a_process_whose_others_do_not_come(tmp_path):
    job = Job(tmp_path, [tiny_job(tmp_path)], count=2, options=("--distributed.timeout", "3"))
    assert job.wait(60) == [1], job.text()
    assert "error: process 0 of 2 could not meet the others at 127.0.0.1:" in job.text()


def test_processes_with_other_settings(tmp_path):
    config = tiny_job(tmp_path)
    job = Job(tmp_path, [config, dataclasses.replace(config, optim=OptimConfig(learning_rate=0.5))])
    assert job.wait() == [1, 1], job.text()
    for number in range(2):
        message = "error: process 1 has other settings than process 0: check that all have the same code"
        assert message in job.text(number)


def test_processes_with_other_text(tmp_path):
    """The same settings, but each process sees another disk."""
    config = tiny_job(tmp_path)
    folders = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        shutil.copytree(tmp_path / "text", folder / "text")
        (folder / "text" / "00.txt").write_text("other words " * (20 + number))
    data = dataclasses.replace(config.data, source="text:text", data_dir="data")
    job = Job(tmp_path, dataclasses.replace(config, data=data), folders=folders)
    assert job.wait() == [1, 1], job.text()
    assert "error: process 1 has other data than process 0: check that all have the same code" in job.text()


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
        ("INVALID_ARGUMENT: shapes", False),
        ("UNAVAILABLE: Connection reset by peer", True),
        ("FAILED_PRECONDITION: [external/gloo/transport/tcp/pair.cc] Connection closed by peer", True),
    ],
)
def test_which_errors_mean_that_a_process_was_lost(text, loss):
    assert distributed.is_loss(RuntimeError(text)) == loss


@pytest.mark.parametrize(
    ("error", "alone", "status"),
    [
        (ValueError("a setting"), 2, 2),
        (OSError("a disk"), 1, 1),
        (distributed.DistributedError("a job"), 1, 1),
        (CheckpointError("a checkpoint"), 1, 1),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), None, 1),
        (KeyError("a mistake"), None, 1),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer"), None, distributed.LOST_STATUS),
        (ValueError("gloo: Connection closed by peer"), 2, distributed.LOST_STATUS),
    ],
)
def test_exit_status_of_a_command(monkeypatch, capsys, error, alone, status):
    """A process of several must not leave by JAX's barrier, whatever the error is."""

    def fail():
        raise error

    def run():
        return distributed.run_joined(distributed.Processes(num_processes=1), fail, (CheckpointError,))

    if alone is None:
        with pytest.raises(type(error)):
            run()
    else:
        assert run() == alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == status
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(("at_least", "gives_up"), [(0, True), (60, False)])
def test_a_wait_has_an_end(monkeypatch, at_least, gives_up):
    """Also that for results, and for what may take longer."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_patience", 0.05)
    monkeypatch.setattr(distributed, "_give_up", lambda what, seconds: said.append(what))
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda tree, **_: time.sleep(0.5) or tree)
    if at_least:
        with distributed.waiting("text", at_least):
            time.sleep(0.5)
    else:
        to_host(np.zeros(1))
    assert said == ["all to hand their results around"] * gives_up


def test_what_fails_at_the_main_process_fails_at_all(tmp_path):
    config = tiny_job(tmp_path)
    (tmp_path / "job").write_text("a file where the folder should be")
    job = Job(tmp_path, config)
    assert job.wait() == [2, 2], job.text()
    for number in range(2):
        assert "error: work_dir=" in job.text(number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distributed.process-id", "0"], "--distributed.coordinator is missing; give all of coordinator, num-proc"),
        (["coordinator", "num-processes"], "--distributed.process-id is missing"),
        (["coordinator", "num-processes", "process-id"], "--distributed.coordinator='1' has no port; give HOST:PORT"),
    ],
)
def test_wrong_options(options, message, capsys):
    if not options[0].startswith("--"):
        options = [word for name in options for word in (f"--distributed.{name}", "1")]
    assert main(["--config", "lm", *options]) == 2
    assert f"error: {message}" in capsys.readouterr().err

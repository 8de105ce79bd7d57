"""The training loop: what it writes, when it evaluates and saves, and how it ends."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from train_helpers import (
    ROOT,
    assert_same_bits,
    environment,
    metric_rows,
    plain,
    restore,
    tiny,
)

import experiments.train
from experiments.checkpoint import CheckpointError, load_model
from experiments.config import TrainConfig
from experiments.data import DataError
from experiments.flops import train_flops
from experiments.metrics import MetricsLog, Throughput, read_metrics
from experiments.optim import OptimConfig
from experiments.process import BusyError, only_process
from experiments.step import make_eval_step, means
from experiments.train import NonFiniteError, load_data, main, train
from experiments.typed import from_json

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run of seven steps and its result."""
    config = plain(tmp_path_factory.mktemp("finished"), steps=7, log_every=2, eval_every=3, checkpoint_every=3, keep=2)
    return config, train(config, progress=False)


def test_what_is_written_when(finished):
    config, result = finished
    rows = metric_rows(config)
    assert [row["step"] for row in rows if row["split"] == "train"] == [2, 4, 6, 7]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [3, 6, 7]
    assert sorted(path.name for path in (config.directory / "checkpoints").iterdir()) == ["6", "7"]
    run = json.loads((config.directory / "run.json").read_text())
    assert from_json(run["config"], TrainConfig) == config
    assert run["data"]["splits"]
    assert run["versions"]["jax"]
    assert list((config.directory / "tensorboard").glob("events*"))

    assert (result.step, result.stopped, result.directory) == (7, None, config.directory)
    assert rows[-1] == {"step": 7, "split": "validation", **result.validation}
    assert rows[-2]["loss"] == result.metrics["loss"]
    _, variables, _ = load_model(config.directory)
    assert_same_bits(variables, result.variables)


def test_validation_is_what_evaluation_by_hand_gives(finished):
    config, result = finished
    step, batches = make_eval_step(result.model), load_data(config.data, "validation")
    total = {}
    for _ in range(config.eval_steps):
        sums, _ = step(result.state.params, next(batches), None)
        total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    assert result.validation == {name: means(total)[name] for name in ("loss", "accuracy")}


def test_it_learns(tmp_path):
    result = train(plain(tmp_path, steps=60), progress=False)
    losses = [row["loss"] for row in metric_rows(result.config)]
    assert losses[0] > 5.0  # of 256 ids, none is known
    assert np.mean(losses[-10:]) < 3.0  # ten letters are used: log 10 is 2.3


def test_callback_ends_the_run(tmp_path):
    config, seen = plain(tmp_path, checkpoint_every=0), []

    def callback(step, metrics, state):
        seen.append((step, metrics["loss"], int(state.step)))
        return step == 4

    result = train(config, progress=False, callback=callback)
    assert (result.step, result.stopped) == (4, "callback")
    assert [(step, made) for step, _, made in seen] == [(n, n) for n in (1, 2, 3, 4)]
    assert [row["loss"] for row in metric_rows(config)] == [loss for _, loss, _ in seen]
    assert restore(config).step == 4


def test_fresh_moves_the_old_run_aside(tmp_path, capsys):
    config = plain(tmp_path, steps=2)
    first = train(config, progress=False)
    for number in (1, 2):
        result = train(config, fresh=True, progress=number == 2)
        assert result.metrics["loss"] == first.metrics["loss"]  # it did start anew
        assert (tmp_path / f"run.old-{number}" / "checkpoints" / "2" / "meta.json").exists()
    shown = capsys.readouterr()
    assert f"the earlier run is now in {tmp_path / 'run.old-2'}" in shown.out
    assert f"files: {config.directory}" in shown.out
    assert "a new run of 2 steps" in shown.out
    train(config)
    assert "nothing is left to do: 2 of 2 steps" in capsys.readouterr().out


def test_bad_data_leaves_the_work_folder_as_it_was(tmp_path):
    config = plain(tmp_path, steps=2)
    train(config, progress=False)
    bad = dataclasses.replace(config, data=dataclasses.replace(config.data, source="text:nowhere/*"))
    with pytest.raises(DataError, match="no file matches"):
        train(bad, progress=False, fresh=True)
    assert restore(config).step == 2
    assert not (tmp_path / "run.old-1").exists()
    with pytest.raises(DataError, match="no file matches"):
        train(dataclasses.replace(bad, work_dir=str(tmp_path / "new")), progress=False)
    assert not (tmp_path / "new").exists()


def test_a_refused_resume_changes_no_file(tmp_path):
    config = plain(tmp_path, steps=2)
    train(config, progress=False)
    before = {path: path.read_bytes() for path in config.directory.rglob("*") if path.is_file()}
    with (tmp_path / "text" / "00.txt").open("a") as file:
        file.write("other text")
    with pytest.raises(DataError):
        train(dataclasses.replace(config, steps=3), progress=False)
    assert {path: path.read_bytes() for path in config.directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize("work_dir", ["file", "file/below"])
def test_a_file_where_the_work_folder_should_be(tmp_path, capsys, work_dir, fresh):
    (tmp_path / "file").touch()
    assert main(["--config", "passkey", "--work-dir", str(tmp_path / work_dir), *fresh]) == 2
    message = f"work_dir='{tmp_path / work_dir}' cannot be used: {tmp_path / 'file'} is no folder; give another folder"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_changes_are_announced(tmp_path, capsys):
    config = plain(tmp_path, steps=5)
    train(config, progress=False)
    train(dataclasses.replace(config, steps=6))
    shown = capsys.readouterr()
    assert "changed since the last start: steps was 5 and is 6\n" in shown.out
    assert "continuing after step 5 of 6" in shown.out
    assert "loss" in shown.err  # the progress bar
    assert "6/6" in shown.err
    falling = dataclasses.replace(config, optim=OptimConfig(learning_rate=1e-2, warmup_steps=1))
    train(falling)
    shown = capsys.readouterr()
    assert "optim.schedule was 'constant' and is 'cosine'" in shown.out
    assert "so the learning rate now decays over other steps" in shown.out
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=16))
    with pytest.raises(CheckpointError, match=r"model.d_ff is 32 there and 16 here"):
        train(other, progress=False)


def test_one_process_at_a_time(tmp_path):
    config = plain(tmp_path)
    config.directory.mkdir()
    with only_process(config.directory):
        for fresh in (False, True):
            with pytest.raises(BusyError, match="another process is training in"):
                train(config, progress=False, fresh=fresh)


def test_loss_that_is_not_finite(tmp_path, capsys):
    config = plain(tmp_path, steps=5, checkpoint_every=2)
    good = train(config, progress=False)
    wild = OptimConfig(learning_rate=1e38, schedule="constant")
    wilder = dataclasses.replace(config, optim=wild, steps=30, checkpoint_every=1)
    message = r"step 15: .*param_norm is inf, as in the 9 steps before.* from the last good checkpoint, step 5 in "
    with pytest.raises(NonFiniteError, match=message):
        train(wilder)
    assert "WARNING: step 6 is left out: param_norm is inf" in capsys.readouterr().out
    assert [(row["step"], row["skipped"], row["param_norm"]) for row in metric_rows(config)[5:]] == [
        (step, 1.0, None) for step in range(6, 15)
    ]
    kept = restore(config)
    assert kept.step == 5
    assert_same_bits(kept.params, good.state.params)
    again = train(dataclasses.replace(config, steps=9), progress=False)  # from there, with a lower one
    assert np.isfinite(again.metrics["loss"])
    assert [row["step"] for row in metric_rows(config)] == list(range(1, 10))


@pytest.mark.parametrize(("error", "status"), [(NonFiniteError, 1), (CheckpointError, 1), (BusyError, 1), (OSError, 1)])
def test_failures_are_one_line(monkeypatch, capsys, error, status):
    def fail(*args, **kwargs):
        raise error("what went wrong")

    monkeypatch.setattr(experiments.train, "train", fail)
    assert main(["--config", "lm"]) == status
    assert capsys.readouterr().err == "error: what went wrong\n"


def test_interrupt_saves_and_says_how_to_continue(tmp_path):
    config = plain(tmp_path)
    words = shlex.split(
        "--config lm_bswa --model.num-layers 2 --model.d-model 16 --model.num-heads 2 --model.head-dim 8 "
        "--model.d-ff 32 --model.memory.block-size 8 --data.batch-size 2 --data.length 32 --data.block-size 8 "
        "--checkpoint-every 0 --eval-every 0 --log-every 1 --optim.decay-steps 200"
    )
    words += ["--data.source", config.data.source, "--data.data-dir", config.data.data_dir]
    words += ["--work-dir", str(config.directory)]
    command = [sys.executable, "-m", "experiments.train", *words]
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "text": True}

    log = config.directory / "metrics.jsonl"
    with subprocess.Popen([*command, "--steps", "1000000"], stderr=subprocess.PIPE, **options) as process:
        deadline = time.monotonic() + 300
        while not (log.exists() and len(read_metrics(log)) > 2):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saving a checkpoint after this step" in err
    assert "to continue: python -m experiments.train --config lm_bswa" in out
    assert "Traceback" not in err
    (saved,) = [int(path.name) for path in (config.directory / "checkpoints").iterdir()]
    assert read_metrics(log)[-1]["step"] == saved

    done = subprocess.run([*command, "--steps", str(saved + 2)], stderr=subprocess.PIPE, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert f"continuing after step {saved:,} of {saved + 2:,}" in done.stdout
    assert "done; next: python -m experiments.evaluate --checkpoint" in done.stdout
    assert [row["step"] for row in read_metrics(log)] == list(range(1, saved + 3))


def test_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    config = plain(tmp_path, steps=6, checkpoint_every=0)

    def interrupt(step, metrics, state):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = train(config, progress=False, callback=interrupt)
    assert result.stopped == "SIGINT"
    assert result.step in (2, 3)  # Python runs handlers a little later
    assert signal.getsignal(signal.SIGINT) is before
    assert restore(config).step == result.step


def test_metrics_file(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, "train", {"loss": step / 2})
    log.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "sp')  # the process was killed here
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5]
    log = MetricsLog(tmp_path, 3)
    log.write(4, "train", {"loss": 9.0})
    log.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1] == {"step": 4, "split": "train", "loss": 9.0}


def test_throughput(monkeypatch):
    now = iter([0.0, 2.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    meter = Throughput()
    assert (meter.rates, str(meter)) == ({}, "")
    meter.step(10, 100)  # the first has compiled: its time counts for nothing
    assert meter.rates == {}
    meter.step(2, 5)
    meter.step(1, 20)
    assert meter.rates == {"tokens_per_second": pytest.approx(10.0)}
    meter.interrupt()
    meter.step(1, 5)
    assert meter.rates == {}
    meter.step(1, 7)
    assert meter.rates == {"tokens_per_second": pytest.approx(7.0)}
    assert str(meter) == "7 tokens/s"


def test_utilisation(monkeypatch):
    """Two chips of 197 TFLOP/s; steps of two lengths, as with a curriculum."""
    for kind, shown in (("TPU v5 lite", "15 tokens/s, 50.0% MFU"), ("cpu", "15 tokens/s, 197 TFLOP/s")):
        now = iter([0.0, 1.0, 2.0])
        monkeypatch.setattr(time, "perf_counter", lambda now=now: next(now))
        meter = Throughput(lambda rows, length: rows * length * 394e12 / 30, kind, 2)
        for length in (99, 10, 20):
            meter.step(1, length)
        expected = {"tokens_per_second": 15.0, "flops_per_second": 197e12} | ({"mfu": 0.5} if kind != "cpu" else {})
        assert meter.rates == pytest.approx(expected)
        assert str(meter) == shown


def test_the_operations_of_a_step_are_in_its_metrics(finished):
    """On a CPU, whose peak is not known."""
    config, _ = finished
    row = next(row for row in read_metrics(config.directory / "metrics.jsonl") if "tokens_per_second" in row)
    operations = train_flops(config.model, config.data.batch_size, config.data.length, useful=True)
    per_token = operations / (config.data.batch_size * config.data.length)
    assert row["flops_per_second"] == pytest.approx(per_token * row["tokens_per_second"])
    assert "mfu" not in row


def test_a_run_of_no_steps_keeps_what_it_begins_with(tmp_path, compile_cache, capsys):
    """A model as it is can then be measured like any other."""
    config = tiny(tmp_path, steps=0)
    first = train(config)
    assert (first.step, first.stopped) == (0, None)
    _, variables, _ = load_model(config.directory)
    assert_same_bits(variables["params"], first.state.params)
    assert_same_bits(train(config).state.params, first.state.params)
    assert "nothing is left to do" in capsys.readouterr().out

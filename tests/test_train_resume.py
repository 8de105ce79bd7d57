"""A run that is interrupted and started again ends with the same bits as one that was not."""

import dataclasses
import signal

import numpy as np
import pytest
from train_helpers import (
    assert_same_bits,
    metric_rows,
    plain,
    restore,
    tiny,
    train_process,
)

import experiments.loop
from experiments.train import train

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stream", "packed"])
def test_killed_and_started_again(tmp_path, mode):
    straight, killed = (tiny(tmp_path, name, mode) for name in ("straight", "killed"))
    done = train_process(straight)
    assert done.returncode == 0, done.stderr

    assert train_process(killed, kill_at=15).returncode == -signal.SIGKILL
    assert restore(killed).step == 10
    assert metric_rows(killed)[-1]["step"] == 15  # beyond the checkpoint: these lines must not stay
    done = train_process(killed)
    assert done.returncode == 0, done.stderr

    one, other = restore(straight), restore(killed)
    assert one.step == other.step == 20
    assert_same_bits(one.params, other.params)
    assert_same_bits(one.rest, other.rest)
    assert one.data == other.data
    assert metric_rows(straight) == metric_rows(killed)
    assert [row["step"] for row in metric_rows(killed)] == list(range(1, 21))
    # What the comparison is meant to cover has been at work.
    assert bool(one.rest["rsp"].valid)
    assert np.any(np.asarray(one.rest["rsp"].fam))
    if mode == "stream":
        assert np.any(np.asarray(one.rest["stream"].segment_k))
        assert np.any(np.asarray(one.rest["stream"].blocks) < 20 * 4)  # a document has begun on the way
    else:
        assert one.rest["stream"] is None


def test_more_steps_continue_a_finished_run(tmp_path):
    whole, parts = plain(tmp_path, "whole"), plain(tmp_path, "parts")
    train(whole, progress=False)
    first = train(dataclasses.replace(parts, steps=7), progress=False)
    second = train(parts, progress=False)
    assert (first.step, second.step) == (7, 20)
    one, other = restore(whole), restore(parts)
    assert_same_bits((one.params, one.rest), (other.params, other.rest))
    assert metric_rows(whole) == metric_rows(parts)
    assert train(parts, progress=False).metrics == {}  # nothing is left to do


class Curriculum:
    """Batches that depend on every loss so far: one that is lost or seen twice changes all that follow."""

    def __init__(self):
        self.step, self.seen = 0, 0.0

    def __next__(self):
        rng = np.random.default_rng([self.step, int(self.seen * 1e6)])
        self.step += 1
        length = 16 if self.seen < 30.0 else 32
        ids = rng.integers(0, 256, (2, length + 1), np.int32)
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((2, length), np.float32)}

    def observe(self, metrics):
        assert set(metrics) >= {"loss", "exact_match"}
        self.seen += metrics["loss"]

    def get_state(self):
        return {"step": self.step, "seen": self.seen}

    def set_state(self, state):
        self.step, self.seen = state["step"], state["seen"]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_curriculum(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.loop, "load_data", lambda data, split: Curriculum())
    straight, killed = (plain(tmp_path, name, steps=12, checkpoint_every=5) for name in ("straight", "killed"))

    def kill(step, metrics, state):
        if step == 9:
            raise Killed

    train(straight, progress=False)
    with pytest.raises(Killed):
        train(killed, progress=False, callback=kill)
    assert restore(killed).step == 5
    train(killed, progress=False)
    one, other = restore(straight), restore(killed)
    assert_same_bits((one.params, one.rest), (other.params, other.rest))
    assert one.data == other.data
    assert metric_rows(straight) == metric_rows(killed)
    assert {row["length"] for row in metric_rows(killed)} == {16, 32}

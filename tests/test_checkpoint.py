"""Checkpoints: what comes back, what is kept, and files that are torn, foreign, or cannot be written."""

import dataclasses
import errno
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_helpers import (
    ROOT,
    assert_same_bits,
    environment,
    tiny,
    with_model,
)

from experiments import checkpoint, integrity
from experiments.checkpoint import CheckpointError, Checkpoints, load_model
from experiments.optim import make_optimizer
from experiments.step import create_state
from experiments.typed import to_json
from fam_jax import Decoder, MemoryConfig

pytestmark = pytest.mark.usefixtures("compile_cache")


def trees(seed=0):
    """Parameters and a rest with every kind of leaf: key, bool, bfloat16, scalar, nothing, no elements."""
    params = {"embed": jax.random.normal(jax.random.key(seed), (64, 32)), "layers": {"wq": jnp.ones((2, 3))}}
    rest = {
        "key": jax.random.key(7),
        "opt": (jnp.int32(seed), {"mu": params["embed"].astype(jnp.bfloat16)}),
        "stream": {"fam": jnp.zeros((2, 0, 4)), "fresh": jnp.array([True, False])},
        "rsp": None,
    }
    return params, rest


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints 1 and 2 and the config that wrote them."""
    config = tiny(tmp_path)
    folder = Checkpoints(config.directory / "checkpoints", keep=2)
    for step in (1, 2):
        folder.save(step, *trees(step), config, {"position": [step, "å"], "empty": {}})
    return folder, config


def test_round_trip(saved):
    folder, config = saved
    params, rest = trees(2)
    shapes = jax.eval_shape(lambda: trees(2))
    for like in ((params, rest), shapes):
        found = folder.restore(*like, config)
        assert (found.step, found.data, found.changed) == (2, {"position": [2, "å"], "empty": {}}, [])
        assert_same_bits((found.params, found.rest), (params, rest))


def test_keeps_the_latest_and_writes_a_step_once(saved):
    folder, config = saved
    folder.save(7, *trees(7), config, {})
    folder.save(10, *trees(10), config, {})
    assert folder.steps() == [7, 10]
    folder.save(10, *trees(3), config, {})
    assert_same_bits(folder.restore(*trees(), config).params, trees(10)[0])
    assert sorted(path.name for path in folder.directory.iterdir()) == ["10", "7"]


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "new", keep=1).restore(*trees(), tiny(tmp_path)) is None


def held(monkeypatch):
    """Writes wait after the arrays, until the event that is returned."""
    go = threading.Event()

    def waiting(*args):
        assert go.wait(60)
        return integrity.checksums(*args)

    monkeypatch.setattr(checkpoint, "checksums", waiting)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(saved, monkeypatch):
    folder, config = saved
    go, update = held(monkeypatch), jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
    big = {"embed": jnp.arange(2_000_000.0)}
    position = {"rows": [1, 2]}
    folder.begin(3, big, {"step": jnp.int32(3)}, config, position)
    for _ in range(3):
        big = update(big)  # the buffers are used again
    position["rows"][0] = 7
    assert folder.steps() == [1, 2]
    assert (folder.directory / "saving-3").is_dir()
    go.set()
    folder.wait()
    assert folder.steps() == [2, 3]
    found = folder.restore(big, {"step": jnp.int32(0)}, config)
    assert_same_bits(found.params, {"embed": jnp.arange(2_000_000.0)})
    assert found.data == {"rows": [1, 2]}


def test_one_is_written_at_a_time(saved, monkeypatch):
    folder, config = saved
    go = held(monkeypatch)
    folder.begin(3, *trees(3), config, {})
    threading.Timer(0.3, go.set).start()
    folder.begin(4, *trees(4), config, {})
    assert 3 in folder.steps()
    folder.wait()
    assert folder.steps() == [3, 4]
    folder.wait()  # nothing is left to wait for


@pytest.mark.parametrize("then", ["begin", "wait", "close"])
def test_a_failure_in_the_background_is_told_later(saved, monkeypatch, capsys, then):
    folder, config = saved

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "checksums", full)
        folder.begin(3, *trees(3), config, {})
        message = r"checkpoint 3 could not be written .*No space left on device.*\(steps: 1, 2\)"
        if then == "close":  # some other error is on its way
            folder.close()
            assert re.search(message, capsys.readouterr().err)
        else:
            with pytest.raises(CheckpointError, match=message):
                folder.begin(4, *trees(4), config, {}) if then == "begin" else folder.wait()
    assert sorted(path.name for path in folder.directory.iterdir()) == ["1", "2"]
    folder.save(4, *trees(4), config, {})
    assert folder.steps() == [2, 4]


def test_which_are_kept(tmp_path):
    config, directory = tiny(tmp_path), tmp_path / "checkpoints"
    losses = {1: 5.0, 2: 3.0, 3: float("nan"), 4: 3.0, 5: 1.0, 6: None, 7: 2.0, 8: 9.0, 9: 9.0, 10: None}

    def write(steps, **policy):
        folder = Checkpoints(directory, **policy)
        folder.restore(*trees(), config)
        for step in steps:
            folder.save(step, *trees(step), config, {}, losses[step])
        return folder.steps()

    assert write([1, 2, 3, 4], keep=1, every=3, best=2) == [2, 3, 4]
    # 4 is what the second process continued from; 5 and 7 are the best by then.
    assert write([5, 6, 7, 8], keep=1, every=3, best=2) == [3, 4, 5, 6, 7, 8]
    assert write([9], keep=1, best=1) == [5, 8, 9]
    assert write([10], keep=1) == [9, 10]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_damaged_latest(saved, capsys, damage):
    folder, config = saved
    latest, backup = folder.directory / "2", folder.directory.parent / "backup"
    shutil.copytree(latest, backup)
    for original in files(backup):
        broken = latest / original.relative_to(backup)
        content = bytearray(original.read_bytes())
        if damage == "truncated":
            broken.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            content[len(content) // 2] ^= 1
            broken.write_bytes(content)
        else:
            broken.unlink()
        found = folder.restore(*trees(), config)
        assert found.step == 1, original
        assert_same_bits((found.params, found.rest), trees(1))
        warning = capsys.readouterr().err
        assert f"checkpoint {latest} is damaged: " in warning
        assert "Continuing from step 1 instead" in warning
        assert warning.count("\n") == 1
        aside = folder.directory / "damaged-2"
        assert aside.is_dir()  # nothing is deleted behind the user's back
        assert folder.steps() == [1]
        shutil.rmtree(aside)
        shutil.copytree(backup, latest)
    assert folder.restore(*trees(), config).step == 2


def test_all_damaged(saved):
    folder, config = saved
    for step in (1, 2):
        (folder.directory / str(step) / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint .*/2 is damaged: .*--fresh"):
        folder.restore(*trees(), config)
    assert folder.steps() == [1, 2]
    with pytest.raises(CheckpointError, match=r"damaged: .*Bring it back from a copy"):
        load_model(folder.directory)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("model", {"d_ff": 64}, r"another model: model.d_ff is 32 there and 64 here"),
        ("model", {"memory": None}, r"another model: model.memory is \{.*\} there and None here"),
        (
            "model",
            {"memory": MemoryConfig(block_size=8, fam_length=3)},
            r"another model: model.memory.fam_length is 2 there and 3 here",
        ),
        ("data", {"seed": 5}, r"another run: data.seed is 0 there and 5 here"),
        ("optim", {"optimizer": "adafactor"}, r"another run: optim.optimizer is 'adamw' there"),
        (None, {"seed": 1}, r"another run: seed is 0 there and 1 here; put it back, give .* --fresh"),
    ],
)
def test_another_model_or_run(saved, field, change, message):
    folder, config = saved
    part = getattr(config, field) if field else config
    changed = dataclasses.replace(part, **change)
    other = dataclasses.replace(config, **{field: changed}) if field else changed
    with pytest.raises(CheckpointError, match=message):
        folder.restore(*trees(), other)


def test_settings_that_may_change(saved):
    folder, config = saved
    optim = dataclasses.replace(config.optim, learning_rate=3.0)
    other = dataclasses.replace(with_model(config, schedule="block", attention="xla"), steps=99, optim=optim)
    assert folder.restore(*trees(), other).changed == [
        ("model.schedule", "layer", "block"),
        ("model.attention", "auto", "xla"),
        ("steps", 20, 99),
        ("optim.learning_rate", 1e-2, 3.0),
    ]


def test_other_arrays_than_the_config_promises(saved):
    folder, config = saved
    params, rest = trees()
    wider = params | {"embed": jnp.zeros((64, 33))}
    message = r"params.embed is float32\[64, 32\] there and float32\[64, 33\] here"
    with pytest.raises(CheckpointError, match=message):
        folder.restore(wider, rest, config)
    with pytest.raises(CheckpointError, match=r"params.extra is absent there and float32\[1\] here"):
        folder.restore(params | {"extra": jnp.zeros(1)}, rest, config)
    with pytest.raises(CheckpointError, match=r"rest.opt.0 is int32\[\] there and absent here"):
        folder.restore(params, rest | {"opt": ()}, config)


def test_settings_of_another_version(saved):
    folder, config = saved
    path = folder.directory / "2" / "meta.json"
    content = json.loads(path.read_text())["content"]
    content["config"]["model"]["tricks"] = 3
    integrity.write_meta(path, content)
    with pytest.raises(CheckpointError, match=r"another version of the code.*config.model.tricks is not known"):
        folder.restore(*trees(), config)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the code under test catches it."""


@pytest.mark.parametrize("moment", ["arrays", "meta", "rename", "prune"])
def test_interrupted_save(saved, monkeypatch, moment):
    folder, config = saved
    calls = []

    def kill_at(function, nth):
        def wrapped(*args, **kwargs):
            if len(calls) == nth - 1:
                for call in calls:
                    if call is not None:
                        call.result()  # a process that is killed would not write on
                raise Killed
            calls.append(function(*args, **kwargs))
            return calls[-1]

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "arrays":
            patch.setattr(checkpoint.ocp, "save_async", kill_at(checkpoint.ocp.save_async, 2))
        elif moment == "meta":
            patch.setattr(checkpoint.os, "fsync", kill_at(os.fsync, 1))
        elif moment == "rename":
            patch.setattr(checkpoint, "sync", kill_at(checkpoint.sync, 1))
        else:
            patch.setattr(checkpoint.shutil, "rmtree", kill_at(shutil.rmtree, 1))
        with pytest.raises(Killed):
            folder.save(3, *trees(3), config, {})
    complete = moment in ("rename", "prune")
    assert folder.steps()[-1] == (3 if complete else 2)
    again = Checkpoints(folder.directory, keep=2)
    assert_same_bits(again.restore(*trees(), config).params, trees(3 if complete else 2)[0])
    again.save(4, *trees(4), config, {})
    assert sorted(path.name for path in folder.directory.iterdir()) == (["3", "4"] if complete else ["2", "4"])


_SAVE = """
import os, pathlib, signal, sys, threading, time
import numpy as np
from experiments.checkpoint import Checkpoints
from experiments.config import TrainConfig
from experiments.typed import from_json
import json, jax

config = from_json(json.loads(sys.argv[1]), TrainConfig)
folder = Checkpoints(config.directory / "checkpoints", keep=2)
params = {"embed": jax.random.normal(jax.random.key(0), (64, 32))}
folder.save(1, params, {"step": jax.numpy.int32(1)}, config, {})

def kill():
    while not any((folder.directory / "saving-2").rglob("*")):
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
folder.save(2, {"embed": jax.random.normal(jax.random.key(0), (20_000_000,))}, {"step": jax.numpy.int32(2)}, config, {})
print("saved")
"""


def test_killed_while_saving(tmp_path):
    config = tiny(tmp_path)
    command = [sys.executable, "-c", _SAVE, json.dumps(to_json(config))]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    directory = config.directory / "checkpoints"
    assert (directory / "saving-2").is_dir()
    folder = Checkpoints(directory, keep=2)
    assert [path.name for path in directory.iterdir()] == ["1"]
    params = {"embed": jax.random.normal(jax.random.key(0), (64, 32))}
    assert_same_bits(folder.restore(params, {"step": jnp.int32(0)}, config).params, params)


def test_full_disk(saved, monkeypatch):
    folder, config = saved
    big = {"embed": jax.random.normal(jax.random.key(0), (100_000,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes that a file may have
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint 3 could not be written .*\(steps: 1, 2\)"):
            folder.save(3, big, {}, config, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in folder.directory.iterdir()) == ["1", "2"]
    assert folder.restore(*trees(), config).step == 2

    usage = shutil.disk_usage(folder.directory)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="0 MB are free and 0 MB are needed"):
        folder.save(3, big, {}, config, {})


def test_load_model(tmp_path, capsys):
    config = tiny(tmp_path)
    model, (optimizer, _) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    state = jax.jit(functools.partial(create_state, config, model, optimizer))()
    folder = Checkpoints(config.directory / "checkpoints", keep=2)
    later = jax.tree.map(lambda leaf: leaf + 1, state.params)
    folder.save(1, state.params, {"opt_state": state.opt_state}, config, {})
    folder.save(2, later, {"opt_state": state.opt_state}, config, {})
    shutil.rmtree(folder.directory / "2" / "rest")  # parameters are all that it needs

    directory = config.directory
    for path, step, expected in (
        (directory, None, later),
        (str(directory), 1, state.params),
        (folder.directory, None, later),
        (folder.directory / "1", None, state.params),
    ):
        found, variables, same = load_model(path, step)
        assert (found.config, same) == (config.model, config)
        assert_same_bits(variables, {"params": expected})
    assert np.isfinite(jax.jit(found.apply)(variables, jnp.zeros((1, 8), jnp.int32)).logits).all()

    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*; there are 1, 2"):
        load_model(directory, 5)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*python -m experiments.train"):
        load_model(tmp_path / "nowhere")
    next(path for path in files(folder.directory / "2" / "params") if path.stat().st_size > 1000).write_bytes(b"")
    assert_same_bits(load_model(directory)[1], {"params": state.params})
    assert "is damaged" in capsys.readouterr().err
    assert folder.steps() == [1, 2]  # reading moves nothing
    with pytest.raises(CheckpointError, match="Bring it back from a copy"):
        load_model(directory, 2)

"""Tiny runs for the tests of training: text, configs, processes, and what they leave behind."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import optax

from experiments.checkpoint import Checkpoints, Restored
from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.data.levels import LevelData
from experiments.metrics import read_metrics
from experiments.optim import OptimConfig, make_optimizer
from experiments.step import TrainState, create_state, make_train_step
from experiments.typed import to_json
from fam_jax import Decoder, DecoderConfig, MemoryConfig

ROOT = Path(__file__).resolve().parent.parent
MODEL = DecoderConfig(
    vocab_size=256,
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_ff=32,
    memory=MemoryConfig(block_size=8, fam_length=2, rsp=0.9, noise=0.1),
)


def write_text(folder: Path) -> str:
    """Twelve documents of 100 to 300 letters; returns the source that reads them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(12):
        letters = rng.choice(list("abcdefgh \n"), 100 + int(rng.integers(200)))
        (folder / f"{number:02d}.txt").write_text("".join(letters))
    return f"text:{folder}"


def tiny(tmp_path: Path, name: str = "run", mode: str = "stream", **changes) -> TrainConfig:
    """A run of 20 steps with FAM, noise and Random State Passing; in stream mode documents end on the way."""
    data = TextData(
        source=write_text(tmp_path / "text"),
        mode=mode,
        batch_size=2,
        length=32,
        block_size=8,
        data_dir=str(tmp_path / "data"),
    )
    settings = {
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=3),
        "steps": 20,
        "log_every": 1,
        "eval_every": 0,
        "eval_steps": 2,
        "checkpoint_every": 10,
    } | changes
    return TrainConfig(name=name, model=MODEL, data=data, work_dir=str(tmp_path / name), **settings)


def plain(tmp_path: Path, name: str = "run", **changes) -> TrainConfig:
    """The cheapest run to compile, for tests of all that is not the memory; equal whatever its steps."""
    optim = OptimConfig(learning_rate=1e-2, schedule="constant")
    return with_model(tiny(tmp_path, name, "packed", **{"optim": optim} | changes), memory=None)


def first_state(config: TrainConfig, model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """As one program: operation by operation it takes several times as long."""
    return jax.jit(functools.partial(create_state, config, model, optimizer))()


def with_model(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def environment() -> dict[str, str]:
    """For processes that share what they and this one compile."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


_PROCESS = """
import json, os, signal, sys, time
from experiments.config import TrainConfig
from experiments.typed import from_json
from experiments.train import train

def kill(step, metrics, state):
    if step == int(sys.argv[2]):
        while any((config.directory / "checkpoints").glob("saving-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

config = from_json(json.loads(sys.argv[1]), TrainConfig)
train(config, progress=False, callback=kill if int(sys.argv[2]) else None)
"""


def train_process(config: TrainConfig, kill_at: int = 0) -> subprocess.CompletedProcess:
    """Trains in a process of its own, compiled as for users, which is killed after a step if asked for."""
    command = [sys.executable, "-c", _PROCESS, json.dumps(to_json(config)), str(kill_at)]
    return subprocess.run(
        command, cwd=ROOT, env=environment() | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300
    )


def restore(config: TrainConfig) -> Restored | None:
    """The latest checkpoint of a run, all of it."""
    model, (optimizer, _) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    shapes = jax.eval_shape(functools.partial(create_state, config, model, optimizer))
    rest = {f.name: getattr(shapes, f.name) for f in dataclasses.fields(shapes) if f.name != "params"}
    return Checkpoints(config.directory / "checkpoints", keep=9).restore(shapes.params, rest, config)


def assert_same_bits(a, b) -> None:
    """Two trees have the same structure and, leaf by leaf, the same type, shape and bits."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert x.tobytes() == y.tobytes(), f"{jax.tree_util.keystr(path)} differs"


def trace_step(config: TrainConfig) -> None:
    """Traces a step of a run, so that shapes must fit; nothing is computed."""
    model, (optimizer, schedule) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    state = jax.eval_shape(lambda: create_state(config, model, optimizer))
    data, ids = config.data, np.int32
    length = data.row_blocks(data.levels[0]) * data.block_size if isinstance(data, LevelData) else data.length
    shapes = {"tokens": (length, ids), "targets": (length, ids), "weights": (length, np.float32)}
    if config.stream:
        shapes |= {flag: (length // data.block_size, np.bool_) for flag in ("reset", "padded")}
    batch = {key: jax.ShapeDtypeStruct((data.batch_size, n), dtype) for key, (n, dtype) in shapes.items()}
    after, metrics = jax.eval_shape(make_train_step(config, model, optimizer, schedule), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


def metric_rows(config: TrainConfig) -> list[dict]:
    """The metrics file without what depends on the clock."""
    rows = read_metrics(config.directory / "metrics.jsonl")
    clock = {"tokens_per_second", "flops_per_second", "mfu"}
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]

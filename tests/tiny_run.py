"""Checkpoints of tiny untrained models, for tests of the commands that use one."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.checkpoint import Checkpoints
from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.data.arithmetic import ArithmeticData
from experiments.data.levels import LevelData
from experiments.data.pairs import PairsData
from experiments.data.passkey import PasskeyData, PasskeyTokenizer
from fam_jax import Decoder, DecoderConfig, MemoryConfig

FAM = MemoryConfig(block_size=8, fam_length=2)
BSWA = MemoryConfig(block_size=8)


def model_config(memory: MemoryConfig | None = FAM, vocab_size: int = 256, **more) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        num_layers=2,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=32,
        memory=memory,
        **more,
    )


@cache
def init(config: DecoderConfig) -> tuple[Decoder, dict]:
    """A model with large random weights, so that its FAM matters, made without compiling anything."""
    model = Decoder(config)
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)

    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))


def text_config(memory: MemoryConfig | None = FAM, **data) -> TrainConfig:
    settings = {"length": 64, "batch_size": 2, "block_size": 8, "mode": "packed"} | data
    return TrainConfig(name="tiny", model=model_config(memory), data=TextData(**settings), steps=1)


def passkey_config(memory: MemoryConfig | None = FAM) -> TrainConfig:
    data = PasskeyData(block_size=8, blocks=(9, 10), digits=1)
    model = model_config(memory, PasskeyTokenizer().vocab_size)
    return TrainConfig(name="tiny-passkey", model=model, data=data, steps=1, seed=3)


def pairs_config(memory: MemoryConfig | None = FAM) -> TrainConfig:
    data = PairsData(block_size=8, pairs=(1, 2), symbols=2, value_length=1, filler=2)
    return TrainConfig(name="tiny-pairs", model=model_config(memory, 8), data=data, steps=1, seed=3)


def arithmetic_config() -> TrainConfig:
    data = ArithmeticData(operands=(2, 3), reading="modular", samples=60, test_samples=11, batch_size=4)
    model = model_config(None, data.vocab_size)
    return TrainConfig(name="tiny-arithmetic", model=model, data=data, steps=1, seed=3)


def run_of(data: LevelData, segments: int = 0, **changes) -> TrainConfig:
    """A run with FAM of a task with levels, in blocks of the task."""
    memory = MemoryConfig(block_size=data.block_size, segments=segments, fam_length=2)
    base = passkey_config()
    changes = {"data": data, "eval_every": 0, "model": model_config(memory)} | changes
    return dataclasses.replace(base, **changes)


def save(config: TrainConfig, directory: Path) -> Path:
    """Writes the run's folder with one checkpoint and returns it."""
    _, variables = init(config.model)
    rest = {"count": jnp.zeros((), jnp.int32)}
    Checkpoints(directory / "checkpoints", keep=1).save(1, variables["params"], rest, config, {})
    return directory

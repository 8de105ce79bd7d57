"""What several comparisons start from, each at its sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.config import TrainConfig
from experiments.configs import lm, passkey
from experiments.data import TextData
from experiments.data.passkey import PasskeyData
from experiments.optim import OptimConfig
from fam_jax import LoraConfig, MemoryConfig, presets

# Without a FAM; a window alone has nothing that these act on.
NO_FAM: dict[str, Any] = {"fam_length": 0, "clip": None, "noise": 0.0, "rsp": 0.0}


def with_model(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with other fields of its model."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def with_data(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with other fields of its data."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def with_optim(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with other fields of its optimiser."""
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **changes))


def with_memory(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with other fields of its memory."""
    assert config.model.memory is not None
    return with_model(config, memory=dataclasses.replace(config.model.memory, **changes))


def memory_arms(base: TrainConfig) -> dict[str, TrainConfig]:
    """The arms that tasks of memory share, from that of FAM: the same model and data with another memory, or none.

    `static-query` has rows that read the memory before them, but ask the same at each block. RMT has as many rows, and
    no place for FAM's limit and noise.
    """
    top = with_model(base, schedule="block")
    return {
        "FAM": base,
        "window": with_memory(base, **NO_FAM),
        "static-query": with_memory(base, kind="summary"),
        "RMT": with_memory(top, kind="rmt", clip=None, noise=0.0, rsp=0.0),
        "full": with_model(base, memory=None),
    }


def small_pairs(base: TrainConfig, steps: int, **data: Any) -> TrainConfig:
    """A task of key-value pairs that two layers of width 64 learn in minutes.

    Values stand right after their keys, of 16 symbols; heads are wide, so that some of their planes turn fast enough to
    find the token before and others slowly enough to find a key wherever it stands. No blocks of filler are needed, as
    the models see no past blocks.
    """
    shape = {"num_layers": 2, "d_model": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "d_ff": 256}
    small = with_model(base, **shape, scan_layers=False)
    small = with_data(small, symbols=16, marks=False, filler=0, batch_size=32, threshold=0.7, **data)
    small = with_optim(small, learning_rate=3e-3, warmup_steps=100)
    return dataclasses.replace(small, steps=steps, checkpoint_every=0)


def passkey_base(size: str) -> TrainConfig:
    """PassKey with the key first, as in the paper, and a FAM without past blocks.

    `cpu` is `configs.passkey` with shorter texts, `gpu` four layers of width 256 with blocks of 64 words, and `paper`
    the 1B model with LoRA, blocks of 1,024 and texts of 2k to 18k (sections 3.1 and 3.2).
    """
    base = passkey.config()
    assert isinstance(base.data, PasskeyData)
    data = dataclasses.replace(base.data, depth="first")
    if size == "cpu":
        data = dataclasses.replace(data, blocks=(5, 8, 16))
        return dataclasses.replace(base, data=data, steps=1500, checkpoint_every=0)
    if size == "gpu":
        data = dataclasses.replace(data, block_size=64, blocks=(2, 4, 8, 16), batch_size=64)
        memory = MemoryConfig(block_size=64, segments=0, fam_length=8, clip=4.0, noise=0.2)
        wide = {"num_layers": 4, "d_model": 256, "head_dim": 64, "d_ff": 1024, "memory": memory, "scan_layers": True}
        return with_model(dataclasses.replace(base, data=data, steps=4000, checkpoint_every=1000), **wide)
    data = dataclasses.replace(data, block_size=1024, blocks=(2, 4, 8, 12, 18), threshold=0.0, batch_size=128)
    model = presets.palm_1b()
    assert model.memory is not None
    memory = dataclasses.replace(model.memory, segments=0)
    model = dataclasses.replace(model, memory=memory, lora=LoraConfig(rank=64))
    return dataclasses.replace(base, model=model, data=data, optim=_PAPER_OPTIM, steps=5000, checkpoint_every=500)


PASSKEY_LENGTHS = {"cpu": (8, 16, 32, 64, 224), "gpu": (16, 32, 64, 128, 224), "paper": (8, 18, 36, 72, 144, 256)}
PASSKEY_SIZES = tuple(PASSKEY_LENGTHS)


def passkey_evaluation(size: str) -> dict[str, Any]:
    """Exact match of 200 keys up to 14 times the longest trained length, the paper's ratio."""
    return {"lengths": PASSKEY_LENGTHS[size], "trials": 200, "batch_size": 100 if size == "cpu" else 20}


def books_base(size: str) -> TrainConfig:
    """A language model that reads whole documents: plays at `cpu`, source code at `gpu`, PG-19 at `paper`.

    Their tokens are bytes, at `paper`, too, whose vocabulary of 256,000 pieces is not public.
    """
    base = lm.config()
    assert isinstance(base.data, TextData)
    optim = dataclasses.replace(base.optim, warmup_steps=50)
    quiet = dataclasses.replace(base, optim=optim, eval_every=0, checkpoint_every=0)
    if size == "cpu":
        data = dataclasses.replace(base.data, source="shakespeare", length=256, block_size=64)
        memory = MemoryConfig(block_size=64, segments=1, fam_length=8)
        return with_model(dataclasses.replace(quiet, data=data, steps=600), memory=memory, scan_layers=False)
    if size == "gpu":
        data = dataclasses.replace(base.data, length=2048, batch_size=32, block_size=256)
        memory = MemoryConfig(block_size=256, segments=1, fam_length=16)
        wide = {"num_layers": 8, "d_model": 512, "num_heads": 8, "head_dim": 64, "d_ff": 2048, "memory": memory}
        return with_model(dataclasses.replace(quiet, data=data, steps=4000), **wide, dtype="bfloat16")
    data = TextData(source="pg19", mode="packed", batch_size=128, length=8704, block_size=1024, repeat_tokens=256)
    model = dataclasses.replace(presets.palm_1b(), lora=LoraConfig(rank=64))
    return dataclasses.replace(quiet, model=model, data=data, optim=_PAPER_OPTIM, steps=50_000, checkpoint_every=500)


def books_evaluation(size: str) -> dict[str, Any]:
    """Loss by position of whole documents that were not trained on."""
    if size == "cpu":
        return {"max_tokens": 1 << 15, "batch_size": 4, "reset_memory": True}
    return {"max_tokens": 1 << 18, "batch_size": 16, "chunk": 4096, "reset_memory": True}


def layers_base(size: str) -> TrainConfig:
    """A language model with full attention whose layers can be mixed.

    `cpu` has 8 layers of width 64 on plays, `gpu` 16 of width 512 on source code; `paper` is LIMe's 1.2B model (section
    4): 16 layers of width 2,048 with 32 heads, rows of 2,048 tokens.
    """
    base = books_base("cpu")
    assert isinstance(base.data, TextData)
    data = dataclasses.replace(base.data, mode="packed", length=128)
    if size == "cpu":
        narrow = {"num_layers": 8, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "d_ff": 192}
        return with_optim(with_model(dataclasses.replace(base, data=data), **narrow, memory=None), learning_rate=4e-3)
    if size == "gpu":
        data = dataclasses.replace(data, source="python-source", length=1024, batch_size=64)
        wide = {"num_layers": 16, "d_model": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "d_ff": 1536}
        made = dataclasses.replace(base, data=data, steps=3000, optim=dataclasses.replace(base.optim, warmup_steps=200))
        return with_model(made, **wide, memory=None, scan_layers=True, dtype="bfloat16")
    data = dataclasses.replace(data, source="pg19", length=2048, batch_size=512)
    shape = {"num_layers": 16, "d_model": 2048, "num_heads": 32, "num_kv_heads": 32, "head_dim": 64, "d_ff": 8192}
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=200, b2=0.95, weight_decay=0.1, schedule="cosine")
    made = dataclasses.replace(base, data=data, optim=optim, steps=50_000, checkpoint_every=500)
    lean = {"memory": None, "scan_layers": True, "dtype": "bfloat16", "remat": "full"}
    return with_model(made, **shape, **lean, vocab_size=50_432)


def layers_evaluation(size: str) -> dict[str, Any]:
    """Loss by position within the trained length, of the pieces of documents that were not trained on."""
    length = {"cpu": 128, "gpu": 1024, "paper": 2048}[size]
    return {"piece": length, "chunk": length, "max_tokens": 1 << 15, "batch_size": 16}


# Section 3.1.1: Adafactor, b1 0.9, b2 0.99, a constant learning rate, 1e-4 for the 1B model.
_PAPER_OPTIM = OptimConfig(optimizer="adafactor", schedule="constant", learning_rate=1e-4)

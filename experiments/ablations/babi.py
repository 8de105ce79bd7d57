r"""Questions about facts hidden in Shakespeare (like BABILong, arXiv 2406.10149; no row of the paper).

pip install -e ".[shakespeare]"
python -m experiments.ablate babi --size gpu

Kinds 1 to 3 need so many facts, kinds 4 and 5 relations of two and of three; `cpu` has kind 1 alone. Who guesses one
of six places is right one time in six. Published: ARMT with 137M parameters, from a trained GPT-2, has 0.80 of kind 1
at 50 million tokens. Ours: experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import memory_arms, with_data, with_model
from experiments.config import TrainConfig
from experiments.configs import babi

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "FAM, RMT, static query 0.58 in 6 blocks; of 48, 4 times the trained, static query holds 0.51; others do not"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = babi.config()
    kinds = (1,) if size == "cpu" else (1, 2, 3, 4, 5)
    base = with_data(base, questions=kinds, blocks=(6, 8, 12) if size == "cpu" else (14, 16, 24, 32))
    if size == "cpu":
        small = with_model(base, d_model=64, num_layers=2, num_heads=4, head_dim=16, num_kv_heads=4, d_ff=256)
        base = dataclasses.replace(with_data(small, batch_size=16), steps=700, checkpoint_every=0)
    return memory_arms(base)


def evaluation(size: str) -> dict[str, Any]:
    """Exact match by blocks of text."""
    lengths = (6, 12, 24, 48) if size == "cpu" else (14, 32, 128, 512)
    return {"lengths": lengths, "trials": 200, "batch_size": 50, "zero_memory": True}

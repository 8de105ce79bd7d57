r"""Pairs one to a block whose keys repeat: the last value counts (ARMT, arXiv 2407.04841; no row of the paper).

python -m experiments.ablate rewrite --size gpu

`remember` has different keys throughout, `rewrite` four keys that are written again and again. Ours:
experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import memory_arms, with_data, with_model
from experiments.config import TrainConfig
from experiments.configs import rewrite

SIZES = ("cpu", "gpu")
CORE = False


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = rewrite.config()
    if size == "cpu":
        small = with_model(base, d_model=64, num_layers=2, head_dim=16, d_ff=256, scan_layers=False)
        small = with_data(small, pairs=(1, 2, 3, 5, 10), batch_size=32)
        base = dataclasses.replace(small, steps=2500, checkpoint_every=0)
    made: dict[str, TrainConfig] = {}
    for name, live in (("remember", 0), ("rewrite", 4)):
        made |= {f"{arm}-{name}": config for arm, config in memory_arms(with_data(base, live=live)).items()}
    return made


def evaluation(size: str) -> dict[str, Any]:
    """Exact match by the number of pairs."""
    lengths = (1, 2, 5, 10, 20) if size == "cpu" else (10, 50, 100, 200, 500)
    return {"lengths": lengths, "trials": 500, "batch_size": 100, "zero_memory": True}

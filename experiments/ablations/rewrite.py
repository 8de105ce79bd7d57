r"""Pairs one to a block whose keys repeat: the last value counts (ARMT, arXiv 2407.04841; no row of the paper).

python -m experiments.ablate rewrite --size gpu

`remember` has different keys throughout, `rewrite` four keys that are written again and again. `cpu` has what makes two
layers learn it in minutes, as in `retrieval`. Ours: experiments/README.md.
"""

from typing import Any

from experiments.ablations._bases import memory_arms, small_pairs, with_data, with_memory
from experiments.config import TrainConfig
from experiments.configs import rewrite

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "hardly learnt in 2,500 steps by memories: of 5 writes static query 0.28, FAM 0.10, RMT 0.02; full 0.10"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = rewrite.config()
    if size == "cpu":
        base = small_pairs(with_memory(base, block_size=16), steps=2500, block_size=16, pairs=(3, 5, 10), asked=3)
    made: dict[str, TrainConfig] = {}
    for name, live in (("remember", 0), ("rewrite", 4)):
        made |= {f"{arm}-{name}": config for arm, config in memory_arms(with_data(base, live=live)).items()}
    return made


def evaluation(size: str) -> dict[str, Any]:
    """Exact match by the number of pairs."""
    lengths = (1, 2, 5, 10, 20) if size == "cpu" else (10, 50, 100, 200, 500)
    return {"lengths": lengths, "trials": 500, "batch_size": 100, "zero_memory": True}

r"""Key-value pairs read once, then out of sight: how many a FAM holds (GradMem, arXiv 2603.13875; no row of the paper).

python -m experiments.ablate retrieval --size gpu

Published, exact match of 4, 8, 16, 32, 64 and 96 pairs: 1.000, 1.000, 0.998, 0.998, 0.965 and 0.988 of a Transformer
that keeps the pairs; 0.990, 0.985, 0.974, 0.549, 0.226 and 0.152 of ARMT, which like FAM has a memory in each layer;
1.000, 1.000, 0.455, 0.443, 0.193 and 0.129 of RMT with 8 vectors in all, to which a FAM of 2 rows in 4 layers compares.

`cpu` has what makes two layers learn it in minutes: values right after their keys, 16 symbols, four questions a text,
and four pairs to begin with, since with one the key need not be read. Who guesses is right one time in 256. Ours:
experiments/README.md.
"""

from typing import Any

from experiments.ablations._bases import memory_arms, small_pairs, with_memory
from experiments.config import TrainConfig
from experiments.configs import retrieval

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "FAM holds 8 pairs, and 16 half of the time; a static query 2 in part, RMT and the window none; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = retrieval.config()
    if size == "cpu":
        base = small_pairs(base, steps=5000, pairs=(4, 8, 16), asked=4)
    return {**memory_arms(base), "FAM-2": with_memory(base, fam_length=2)}


def evaluation(size: str) -> dict[str, Any]:
    """Exact match by the number of pairs."""
    lengths = (2, 4, 8, 16, 32) if size == "cpu" else (4, 8, 16, 32, 64, 96)
    return {"lengths": lengths, "trials": 1000, "batch_size": 100, "zero_memory": True}

r"""LIMe that may read only the first or the last layers (LIMe, table 7).

python -m experiments.ablate lime_sources --size cpu

Paper, perplexity at 150M relative to all layers (15.93): first two +0.30 %, first four +0.20, last four +1.51, last two
+2.22, none and the fixed average +3.36. Ours: experiments/README.md.
"""

from experiments.ablations._bases import layers_base, layers_evaluation, with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = True
VERDICT = "not reproduced in 600 steps: no choice of sources is ahead of none, only the fixed average"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = layers_base(size)
    sources = ("all", "first:2", "first:4", "last:2", "last:4")
    made = {one.replace(":", "-"): with_model(base, mixing=LimeConfig(sources=one)) for one in sources}
    return {"none": base, **made, "average": with_model(base, mixing=LimeConfig(router="average"))}


evaluation = layers_evaluation

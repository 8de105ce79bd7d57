"""Loss with the smallest router weights cut (LIMe, first version).

python -m experiments.ablate lime_pruning --size cpu

The first version prunes routers with a softmax over layers, whose weights add up to one; here signed weights are cut
as well, by their absolute values. Its runs are those of `lime_methods`. Ours: experiments/README.md.
"""

from typing import Any

from experiments.ablations import lime_methods
from experiments.config import TrainConfig

SIZES = lime_methods.SIZES
CORE = False
VERDICT = "as in the paper: at p = 0.9 a third of the weights can go for 0.004 nats, or a fifth for none"
RUNS_OF = "lime_methods"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    trained = lime_methods.arms(size)
    return {name: trained[name] for name in ("LIMe-static_kv", "LIMe-static_hidden")}


def evaluation(size: str) -> dict[str, Any]:
    """Loss with shares of each head's weight kept."""
    return {"what": "pruning", "length": {"cpu": 128, "gpu": 1024, "paper": 2048}[size]}

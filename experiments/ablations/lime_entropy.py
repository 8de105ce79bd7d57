"""How much of the space the states of each layer fill, with LIMe and without (LIMe, section 6).

python -m experiments.ablate lime_entropy --size cpu

Paper: the matrix Renyi entropy of values is higher with LIMe at nearly all layers, that of hidden states hardly
differs. Values are measured as projected and as mixed. Its runs are those of `lime_methods`. Ours:
experiments/README.md.
"""

from typing import Any

from experiments.ablations import lime_methods
from experiments.config import TrainConfig

SIZES = lime_methods.SIZES
CORE = True
VERDICT = "as in the paper: with LIMe, mixed values keep more entropy in late layers than values have without"
RUNS_OF = "lime_methods"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    trained = lime_methods.arms(size)
    return {name: trained[name] for name in ("none", "LIMe-static_kv")}


def evaluation(size: str) -> dict[str, Any]:
    """Entropy of the states of 64 texts."""
    return {"what": "entropy", "length": {"cpu": 128, "gpu": 1024, "paper": 2048}[size]}

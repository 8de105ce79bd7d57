"""Which layers each layer reads: heat map of the routers (LIMe, section 6).

python -m experiments.ablate lime_routers --size cpu

Paper: layers 2 to 4 lean on the first layer, middle ones on the one before, and the last ones turn to layers 1 and 2
again. Its runs are those of `lime_methods`. Ours: experiments/README.md.
"""

from typing import Any

from experiments.ablations import lime_methods
from experiments.config import TrainConfig

SIZES = lime_methods.SIZES
CORE = True
VERDICT = "in part as in the paper: all later layers read layer 1, and themselves, more than what is between"
RUNS_OF = "lime_methods"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    trained = lime_methods.arms(size)
    return {name: trained[name] for name in ("LIMe-static_kv",)}


def evaluation(size: str) -> dict[str, Any]:
    """Share of each source in what a layer reads."""
    return {"what": "routers"}

"""How well linear probes tell frequent tokens apart by layer, with LIMe and without (LIMe, section 6).

python -m experiments.ablate lime_probes --size cpu

Paper: by values close to 1.0 in late layers with LIMe, where the plain model falls off; by hidden states LIMe is lower
there. The paper tells is, are, was and were apart, here it is the four most frequent tokens. Its runs are those of
`lime_methods`. Ours: experiments/README.md.
"""

from typing import Any

from experiments.ablations import lime_methods
from experiments.config import TrainConfig

SIZES = lime_methods.SIZES
CORE = False
VERDICT = "nothing to see: bytes are told apart at every layer, with LIMe and without"
RUNS_OF = "lime_methods"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    trained = lime_methods.arms(size)
    return {name: trained[name] for name in ("none", "LIMe-static_kv")}


def evaluation(size: str) -> dict[str, Any]:
    """Accuracy of probes of four classes."""
    return {"what": "probes", "length": {"cpu": 128, "gpu": 1024, "paper": 2048}[size]}

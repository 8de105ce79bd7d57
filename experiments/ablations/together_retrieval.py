r"""FAM and LIMe, alone and together, on key-value pairs read once, then out of sight (nobody has published this).

python -m experiments.ablate together_retrieval --size cpu

The data and models of `retrieval`. A window alone cannot see the pairs, with LIMe or without. Ours:
experiments/README.md.
"""

from experiments.ablations import retrieval
from experiments.ablations._bases import with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = retrieval.SIZES
CORE = False
VERDICT = "LIMe adds nothing here, and with it a FAM learns less in the same steps: 4 pairs at 0.62; one seed, one rate"
RUNS_OF = "retrieval"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = retrieval.arms(size)
    made = {name: base[name] for name in ("window", "FAM", "full")}
    return made | {f"{name}-LIMe": with_model(config, mixing=LimeConfig()) for name, config in made.items()}


evaluation = retrieval.evaluation

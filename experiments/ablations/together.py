r"""FAM and LIMe, alone and together, on the loss in books (nobody has published this).

python -m experiments.ablate together --size cpu

Ours: experiments/README.md.
"""

from experiments.ablations._bases import NO_FAM, books_base, books_evaluation, with_memory, with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = True
VERDICT = "no gain at this size: neither FAM nor LIMe nor both are ahead of the window in 600 steps"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    fam = books_base(size)
    window = with_memory(fam, **NO_FAM)
    return {
        "window": window,
        "FAM": fam,
        "LIMe": with_model(window, mixing=LimeConfig()),
        "FAM-LIMe": with_model(fam, mixing=LimeConfig()),
    }


evaluation = books_evaluation

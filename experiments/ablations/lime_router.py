r"""LIMe's routers at other learning rates, with weight decay, and begun otherwise (LIMe, section 5.3).

python -m experiments.ablate lime_router --size cpu

Paper, without numbers: 1e-2 is better for routers than the rate of the rest, 1e-3; they are worse with weight decay,
and if they begin at random throughout (`all-random`), each layer's own keys and values included. `zeros` begins exactly
at the model without LIMe. Ours: experiments/README.md.
"""

from experiments.ablations._bases import layers_base, layers_evaluation, with_model, with_optim
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "reversed at this size: at the rate of the rest, or a tenth of it, routers do better than at ten times"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = with_model(layers_base(size), mixing=LimeConfig())

    return {
        "rate-10": base,
        "rate-1": with_optim(base, router_scale=1.0),
        "rate-0.1": with_optim(base, router_scale=0.1),
        "decay": with_optim(base, router_decay=0.1),
        "zeros": with_model(base, mixing=LimeConfig(init="zeros")),
        "all-random": with_model(base, mixing=LimeConfig(init="all_random")),
    }


evaluation = layers_evaluation

r"""LIMe's routers at other learning rates, and begun at no mixing (LIMe, section 5.3).

python -m experiments.ablate lime_router --size cpu

Paper: 1e-2 is better for routers than the rate of the rest, 1e-3; without numbers. `zeros` begins exactly at the model
without LIMe. Ours: experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import layers_base, layers_evaluation, with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = with_model(layers_base(size), mixing=LimeConfig())

    def at(scale: float) -> TrainConfig:
        return dataclasses.replace(base, optim=dataclasses.replace(base.optim, router_scale=scale))

    zeros = with_model(base, mixing=LimeConfig(init="zeros"))
    return {"rate-10": base, "rate-1": at(1.0), "rate-0.1": at(0.1), "zeros": zeros}


def evaluation(size: str) -> dict[str, Any]:
    """How all arms are measured."""
    return layers_evaluation(size)

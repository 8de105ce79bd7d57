r"""LIMe without mixing across heads, and with a router each for keys and values (asked by reviewers of LIMe).

python -m experiments.ablate lime_heads --size cpu

The paper mixes all heads of all layers by one router for both; it has no number for the alternatives. Ours:
experiments/README.md.
"""

from experiments.ablations._bases import layers_base, layers_evaluation, with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "all behind no mixing, the less they mix the less: same head 0.009 nats, all heads 0.022"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = layers_base(size)
    made = {"LIMe": LimeConfig(), "same-head": LimeConfig(same_head=True), "separate-kv": LimeConfig(separate_kv=True)}
    return {"none": base, **{name: with_model(base, mixing=mixing) for name, mixing in made.items()}}


evaluation = layers_evaluation

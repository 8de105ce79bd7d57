r"""LIMe and the plain model with larger and smaller keys and values to begin with (LIMe, released code).

python -m experiments.ablate lime_kv_init --size cpu

The paper's comparison confounds two things: its code begins the keys and values of LIMe at 0.64 of what those of the
plain model have. Here each has both, so that what LIMe adds can be told from what the start adds. Ours:
experiments/README.md.
"""

from experiments.ablations._bases import layers_base, layers_evaluation, with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "no confound at this size: the smaller start helps both by 0.005 nats"
RELEASED = 0.64  # uniform up to 1 / sqrt(d) against a normal of 0.02, at the paper's width of 2,048


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = layers_base(size)
    plain = {"none": base, "LIMe": with_model(base, mixing=LimeConfig())}
    return plain | {f"{name}-small": with_model(config, kv_init=RELEASED) for name, config in plain.items()}


evaluation = layers_evaluation

"""From a config to its mixer."""

from typing import Any

from lime_jax import config as c
from lime_jax.mixer import Mixer, Shape
from lime_jax.rivals import AttentionResiduals, DenseFormer, DepthAttention, HyperConnections, ValueResidual
from lime_jax.routers import ROUTERS

RIVALS: dict[type, type[Mixer]] = {
    type(None): Mixer,
    c.DenseFormerConfig: DenseFormer,
    c.HyperConnectionsConfig: HyperConnections,
    c.ValueResidualConfig: ValueResidual,
    c.DepthAttentionConfig: DepthAttention,
    c.AttentionResidualsConfig: AttentionResiduals,
}


def make_mixer(config: Any, shape: Shape) -> Mixer:
    """The mixer of a config; None is no mixing.

    Raises:
        ValueError: `config` is not a config of this package.
    """
    if isinstance(config, c.LimeConfig):
        return ROUTERS[config.router](config, shape)
    if type(config) not in RIVALS:
        names = ", ".join(["LimeConfig", *(kind.__name__ for kind in RIVALS if kind is not type(None))])
        raise ValueError(f"mixing={config!r} is not allowed; give one of {names}, or None")
    return RIVALS[type(config)](config, shape)

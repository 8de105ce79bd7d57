"""Layer-Integrated Memory: a learned mixture over the states of earlier layers feeds each layer."""

from lime_jax.config import (
    AttentionResidualsConfig,
    DenseFormerConfig,
    DepthAttentionConfig,
    HyperConnectionsConfig,
    LimeConfig,
    MixingConfig,
    ValueResidualConfig,
    num_router_weights,
)
from lime_jax.depth import Depth
from lime_jax.make import make_mixer
from lime_jax.mixer import Mixer, Shape
from lime_jax.pruning import PruningReport, prune_router
from lime_jax.stack import run_layers

__all__ = [
    "AttentionResidualsConfig",
    "DenseFormerConfig",
    "Depth",
    "DepthAttentionConfig",
    "HyperConnectionsConfig",
    "LimeConfig",
    "Mixer",
    "MixingConfig",
    "PruningReport",
    "Shape",
    "ValueResidualConfig",
    "make_mixer",
    "num_router_weights",
    "prune_router",
    "run_layers",
]

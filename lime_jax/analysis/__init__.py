"""What a model's layers hold and its routers have learnt: functions of arrays, each with a plot of its result."""

from lime_jax.analysis.circuits import (
    DepthCircuits,
    Edge,
    SemanticCircuits,
    depth_circuits,
    semantic_circuits,
)
from lime_jax.analysis.entropy import Entropy, layer_entropy, renyi_entropy
from lime_jax.analysis.plots import (
    plot_depth_circuits,
    plot_entropy,
    plot_heat_map,
    plot_matrix,
    plot_pruning,
    plot_semantic_circuits,
    plot_separability,
)
from lime_jax.analysis.probes import Separability, probe_accuracy, separability
from lime_jax.analysis.pruning import PruningCurve, pruning_curve
from lime_jax.analysis.weights import HeatMap, RouterWeights, heat_map, is_dynamic, router_weights

__all__ = [
    "DepthCircuits",
    "Edge",
    "Entropy",
    "HeatMap",
    "PruningCurve",
    "RouterWeights",
    "SemanticCircuits",
    "Separability",
    "depth_circuits",
    "heat_map",
    "is_dynamic",
    "layer_entropy",
    "plot_depth_circuits",
    "plot_entropy",
    "plot_heat_map",
    "plot_matrix",
    "plot_pruning",
    "plot_semantic_circuits",
    "plot_separability",
    "probe_accuracy",
    "pruning_curve",
    "renyi_entropy",
    "router_weights",
    "semantic_circuits",
    "separability",
]

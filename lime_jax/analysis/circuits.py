"""Circuits: which layers and heads read which (depth), and which tokens make them (semantic).

Both follow the analysis of the first version of the paper (arXiv 2502.09245v1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lime_jax.analysis.weights import HeatMap, circuit_names, is_dynamic, token_weights
from lime_jax.mixer import Mixer, Params


class Edge(NamedTuple):
    """A connection between layers, which count from 1.

    Attributes:
        layer: The reading layer.
        name: The reading view and head.
        source: The layer that is read.
        share: Of all that the head reads.
    """

    layer: int
    name: str
    source: int
    share: float


class DepthCircuits(NamedTuple):
    """How a model's layers hang together.

    Attributes:
        own: Share that each layer reads of itself: [l].
        previous: Of the layer before it: [l].
        earlier: Of all layers before that: [l].
        distance: How many layers back it reads on average: [l].
        retrieved: Share that each layer has in what later layers read, their mean: [j]; NaN for the last.
        edges: The strongest connections to other layers, the strongest first.
    """

    own: np.ndarray
    previous: np.ndarray
    earlier: np.ndarray
    distance: np.ndarray
    retrieved: np.ndarray
    edges: tuple[Edge, ...]


class SemanticCircuits(NamedTuple):
    """The tokens that make a router read a source. Later sources than the own layer have weight 0.

    Attributes:
        tokens: Ids, those with the largest weight first: int [l, c, j, k].
        weights: Their weights: [l, c, j, k].
        mean: Mean weight over the vocabulary: [l, c, j].
        names: Views and reading heads: [c].
        per_layer: Source slots of a layer.
    """

    tokens: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    names: tuple[str, ...]
    per_layer: int

    def strongest(self, count: int) -> list[tuple[int, int, int]]:
        """Indices (l, c, j) of the circuits whose first token is furthest above the mean, the furthest first."""
        gap = self.weights[..., 0] - self.mean
        order = np.argsort(-gap, axis=None, kind="stable")[:count]
        found = [np.unravel_index(place, gap.shape) for place in order if gap.flat[place] > 0]
        return [(int(layer), int(circuit), int(slot)) for layer, circuit, slot in found]

    def name(self, layer: int, circuit: int, slot: int) -> str:
        """What a circuit is called: "layer 3, head 2 <- layer 1", counted from 1."""
        source, place = divmod(slot, self.per_layer)
        part = ("", " feed-forward")[place]
        return f"layer {layer + 1}, {self.names[circuit]} <- layer {source + 1}{part}"


def depth_circuits(heat: HeatMap, edges: int = 20) -> DepthCircuits:
    """Sums up a heat map.

    Args:
        heat: From `heat_map`.
        edges: Connections to name; there may be fewer.
    """
    table = heat.layers
    layers = np.arange(len(table))
    back = layers[:, None] - layers
    own, previous = (np.where(back == step, table, 0.0).sum(1) for step in (0, 1))
    later = back > 0
    with np.errstate(invalid="ignore"):
        retrieved = np.where(later, table, 0.0).sum(0) / later.sum(0)
    shares = np.where((back > 0)[:, None], heat.heads, 0.0)
    order = np.argsort(-shares, axis=None, kind="stable")[:edges]
    found = [np.unravel_index(place, shares.shape) for place in order if shares.flat[place] > 0]
    named = tuple(Edge(int(l) + 1, heat.names[c], int(j) + 1, float(shares[l, c, j])) for l, c, j in found)
    distance = (table * np.maximum(back, 0)).sum(1)
    return DepthCircuits(own, previous, np.where(back > 1, table, 0.0).sum(1), distance, retrieved, named)


def semantic_circuits(
    mixer: Mixer, params: Params, embeddings: Array, *, norm: Array | None = None, top: int = 10, rows: int = 4096
) -> SemanticCircuits:
    """Feeds every word of the vocabulary to every router, and lists those that it gives the most weight.

    Args:
        mixer: From `make_mixer`, with a router that reads the token.
        params: Its parameters as a checkpoint holds them: the `layers` of `mixer.init`.
        embeddings: What stands for each word in a layer's input [v, d]: as in the paper's code, the output embedding
            divided by the scale of the final norm.
        norm: For "dynamic_kv": scale of the norm before each layer's attention [l, d].
        top: Words to list; at most all.
        rows: Words whose weights are computed at once.

    Raises:
        ValueError: The router weighs all tokens alike, or there is none.
    """
    if not is_dynamic(mixer):
        router = getattr(mixer.config, "router", None)
        what = f"mixing={mixer.config!r} has no router" if router is None else f"router={router!r} weighs all alike"
        raise ValueError(f"{what}; semantic circuits need one that reads the token, like 'dynamic_hidden'")
    embeddings = jnp.asarray(embeddings)
    top = min(top, len(embeddings))
    effective = mixer.effective(params)
    tokens, weights, means = [], [], []
    for layer in range(mixer.shape.num_layers):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], effective)
        scale = None if norm is None else norm[layer]
        parts = [
            token_weights(mixer, own, layer, embeddings[start : start + rows], norm=scale)
            for start in range(0, len(embeddings), rows)
        ]
        table = np.concatenate(parts)
        table = table.reshape(len(table), -1, table.shape[-1])  # [v, c, j]
        order = np.argsort(-table, axis=0, kind="stable")[:top]
        tokens.append(np.moveaxis(order, 0, -1))
        weights.append(np.moveaxis(np.take_along_axis(table, order, axis=0), 0, -1))
        means.append(table.mean(0))
    names = circuit_names(mixer)[: means[0].shape[0]]  # what a token adds in dynamic_kv is for keys and values alike
    if getattr(mixer.config, "separate_kv", False):
        names = tuple(name.removeprefix("keys, ") for name in names)
    return SemanticCircuits(np.stack(tokens), np.stack(weights), np.stack(means), names, mixer.per_layer)

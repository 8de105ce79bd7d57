"""Pruning of static routers by cumulative weight: each head keeps its largest weights, up to a share p of all.

The first version of the paper (arXiv 2502.09245v1) prunes routers with a softmax over layers: the weights of a head are
sorted, kept until their sum passes p, the one that crosses included, and renormalised. Signed weights are ranked
by their absolute values, and what is kept stays as it is, because their sum has no meaning.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lime_jax.mixer import Mixer, Params
from lime_jax.routers import Average, DynamicKV, StaticHidden, StaticKV


class PruningReport(NamedTuple):
    """What was cut. Arrays are [l, v, h, j, g]: layer, then keys and values if they have a router each, reading
    head, source layer, source head; axes that the router does not have are of size 1.

    Attributes:
        p: Share of each head's absolute weight that was to be kept.
        live: Weights that could be cut: those that the layer may read. The first layer, which can read only itself,
            has none.
        cut: Weights that were cut.
    """

    p: float
    live: np.ndarray
    cut: np.ndarray

    @property
    def share(self) -> float:
        """Cut weights as a share of all."""
        return float(self.cut.sum() / max(self.live.sum(), 1))

    @property
    def layers(self) -> np.ndarray:
        """The same by layer and source [l, j]; NaN where the layer may not read. 1 is a connection that is gone."""
        cut, live = (table.sum(axis=(1, 2, 4)) for table in (self.cut, self.live))
        return np.where(live > 0, cut / np.maximum(live, 1), np.nan)

    @property
    def connections(self) -> tuple[int, int]:
        """Pairs of layers of which nothing is left, the only ones whose loss saves time; and all pairs."""
        layers = self.layers
        return int(np.sum(layers == 1)), int(np.sum(~np.isnan(layers)))

    def __str__(self) -> str:
        gone, pairs = self.connections
        return (
            f"p={self.p:g}: {self.cut.sum():,} of {self.live.sum():,} weights cut ({self.share:.1%}), "
            f"{gone:,} of {pairs:,} connections between layers gone"
        )


def top_p(weights: np.ndarray, p: float) -> np.ndarray:
    """Which weights to keep: from the largest on until their sum passes the share p, the last one included.

    Args:
        weights: At least 0: [..., n], each row by itself.
        p: Above 0; 1 keeps all, those of weight 0 too.

    Raises:
        ValueError: p is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ValueError(f"p={p!r} is not allowed; it must be above 0 and at most 1")
    if p == 1:  # whatever rounding does to the sum
        return np.ones(weights.shape, bool)
    order = np.argsort(-weights, axis=-1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    keep = np.empty(weights.shape, bool)
    np.put_along_axis(keep, order, before < p * weights.sum(-1, keepdims=True), axis=-1)
    return keep


def prune_router(mixer: Mixer, params: Params, p: float) -> tuple[Params, PruningReport]:
    """Cuts a static router's smallest weights, head by head, over all layers (and heads) that the head reads.

    Args:
        mixer: From `make_mixer`.
        params: Its parameters as a checkpoint holds them: the `layers` of `mixer.init`.
        p: Share of each head's absolute weight to keep, above 0 and up to 1, which changes nothing.

    Returns:
        Parameters of the same structure, for the same model; and what was cut. A weight that is cut is zero.
        For "static_hidden" its logit is minus infinity, so that the others sum to 1 again.

    Raises:
        ValueError: p is outside (0, 1], or the mixer has no static router.
    """
    if isinstance(mixer, StaticHidden):
        name, allowed = "logits", mixer.mask[:, None]
        logits = np.where(allowed, np.asarray(params[name], np.float64), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        live, sources, gone = np.broadcast_to(allowed, weights.shape).copy(), 1, -jnp.inf
    elif isinstance(mixer, StaticKV) and not isinstance(mixer, (Average, DynamicKV)):
        name = "router"
        weights = np.abs(np.asarray(params[name], np.float64))
        live, gone = np.broadcast_to(mixer._live(), weights.shape).copy(), 0.0
        sources = 1 if mixer.config.same_head else 2
    else:
        what = f"router={mixer.config.router!r}" if hasattr(mixer.config, "router") else f"mixing={mixer.config!r}"
        raise ValueError(f"{what} has no weights of its own to prune; it must be 'static_kv' or 'static_hidden'")
    live[0] = False
    weights = np.where(live, weights, 0.0)
    flat = weights.reshape(*weights.shape[: weights.ndim - sources], -1)
    cut = live & ~top_p(flat, p).reshape(weights.shape)
    pruned = jnp.where(cut, gone, params[name])
    # [l, v, h, j, g], whatever the router has of it.
    views = weights.ndim - sources - 2

    def spread(table: np.ndarray) -> np.ndarray:
        table = table if views else table[:, None]
        return table if sources == 2 else table[..., None]

    return {**params, name: pruned}, PruningReport(p, spread(live), spread(cut))

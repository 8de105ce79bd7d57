"""What routers read: their weights as one array, whatever the router, and heat maps of it.

Letters: l reading layer, v view (what the mixture is for, where a router has several), h reading head, j source slot, g
source head, n example (a token); axes that a router does not have are of size 1.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lime_jax.depth import Depth, unit, wide
from lime_jax.mixer import Mixer, Params
from lime_jax.routers import DynamicHidden, DynamicKV, DynamicViews, StaticHidden, StaticKV

_ROWS = 1024  # examples whose weights are computed at once


class RouterWeights(NamedTuple):
    """Weights of all routers of a model. What a layer may not read has weight 0.

    Attributes:
        mean: The weight, averaged over examples if it depends on the token: [l, v, h, j, g].
        size: Its absolute value, averaged likewise: [l, v, h, j, g].
        views: What the mixtures are for; one empty name if there is one for all.
        per_layer: Source slots of a layer.
    """

    mean: np.ndarray
    size: np.ndarray
    views: tuple[str, ...]
    per_layer: int


class HeatMap(NamedTuple):
    """Shares of what is read from each source layer; every row sums to 1 (arXiv 2502.09245, section 6).

    Attributes:
        layers: Absolute weights, averaged over views and heads and divided by the row's sum: [l, j].
        heads: The same for each view and reading head, averaged over source heads only: [l, c, j].
        names: Of the views and heads: [c].
    """

    layers: np.ndarray
    heads: np.ndarray
    names: tuple[str, ...]


def check_router(mixer: Mixer) -> None:
    """Raises a ValueError unless the mixer is one of LIMe's routers."""
    if not isinstance(mixer, (StaticKV, StaticHidden, DynamicHidden, DynamicViews)):
        raise ValueError(f"mixing={mixer.config!r} has no router; give a model whose mixing is a LimeConfig")


def is_dynamic(mixer: Mixer) -> bool:
    """Whether the weights depend on the token."""
    return isinstance(mixer, (DynamicKV, DynamicHidden, DynamicViews))


def router_weights(
    mixer: Mixer,
    params: Params,
    inputs: Array | np.ndarray | None = None,
    *,
    norm: Array | None = None,
    ff_inputs: Array | np.ndarray | None = None,
) -> RouterWeights:
    """The weights of every layer's router.

    Args:
        mixer: From `make_mixer`, with a LimeConfig.
        params: Its parameters as a checkpoint holds them: the `layers` of `mixer.init`, {} if it has none.
        inputs: For routers that read the token: inputs of the layers, before any norm, at some examples [l, n, d].
        norm: For "dynamic_kv": scale of the norm before each layer's attention [l, d].
        ff_inputs: For "dynamic_views" outside of parallel blocks: inputs of the feed-forwards [l, n, d].

    Raises:
        ValueError: The mixer has no router, or the router reads the token and there are no `inputs`.
    """
    check_router(mixer)
    if is_dynamic(mixer) and inputs is None:
        raise ValueError(f"router={mixer.config.router!r} weighs by the token; give the layers' inputs [l, n, d]")
    effective = mixer.effective(params)
    means, sizes = [], []
    for layer in range(mixer.shape.num_layers):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], effective)
        mean = _static(mixer, own, layer)
        size = np.abs(mean)
        if inputs is not None and is_dynamic(mixer):
            # What the token adds: in dynamic_kv to the weight of the head of its own number, else there is no more.
            same = np.eye(mean.shape[1])[:, None] if isinstance(mixer, DynamicKV) else np.ones((1, 1, 1))  # [h, j, g]
            base = np.einsum("vhjg,hjg->vhj", mean, np.broadcast_to(same, mean.shape[1:]))
            total, absolute, count = np.zeros(base.shape), np.zeros(base.shape), len(inputs[layer])
            for start in range(0, count, _ROWS):
                token = token_weights(
                    mixer,
                    own,
                    layer,
                    inputs[layer][start : start + _ROWS],
                    norm=None if norm is None else norm[layer],
                    ff_rows=None if ff_inputs is None else ff_inputs[layer][start : start + _ROWS],
                )
                total += token.sum(0, dtype=np.float64)
                absolute += np.abs(base + token).sum(0, dtype=np.float64)
            mean = mean + (total / count)[..., None] * same
            size = np.where(same, (absolute / count)[..., None], size)
        means.append(mean)
        sizes.append(size)
    return RouterWeights(np.stack(means), np.stack(sizes), views_of(mixer), mixer.per_layer)


def token_weights(
    mixer: Mixer,
    params: Params,
    layer: int,
    rows: Array | np.ndarray,
    *,
    norm: Array | None = None,
    ff_rows: Array | np.ndarray | None = None,
) -> np.ndarray:
    """The part of a layer's weights that is computed from each token: [n, v, h, j].

    For "dynamic_kv" that is what is added to the static router, between heads of one number.

    Args:
        mixer: A router that reads the token.
        params: The layer's, as `mixer.effective` gives them.
        layer: Its number, from 0.
        rows: Inputs of the layer, before any norm: [n, d].
        norm: For "dynamic_kv": scale of the norm before attention [d]; None is 1.
        ff_rows: Inputs of the feed-forward [n, d]; None: `rows`.
    """
    if isinstance(mixer, DynamicViews):
        first = mixer.per_layer * layer
        sites = (("attention", rows, first + 1), ("ff", rows if ff_rows is None else ff_rows, first + mixer.per_layer))
        views = [np.asarray(_views(mixer, site, params, x, live)) for site, x, live in sites]
        return np.concatenate(views, axis=1)[:, :, None]
    scale = params["norm"] if isinstance(mixer, DynamicHidden) else 1.0 if norm is None else norm
    return np.asarray(_heads(mixer, params, rows, scale, layer + 1))[:, None]


@partial(jax.jit, static_argnums=0)
def _heads(mixer: Mixer, params: Params, rows: Array, scale: Array | float, live: int) -> Array:
    """Weights [n, h, j] of rows [n, d], if `live` slots may be read."""
    normed = unit(rows, mixer.shape.norm_eps) * scale
    if isinstance(mixer, DynamicKV):
        return wide(jnp.einsum("nd,dhj->nhj", normed, params["token"]))
    assert isinstance(mixer, DynamicHidden)
    scores = wide(jnp.einsum("nd,dhj->jnh", normed, params["project"]))
    return jnp.moveaxis(mixer._weights(scores, params, Depth(None, live, 0)), 0, -1)


@partial(jax.jit, static_argnums=(0, 1))
def _views(mixer: DynamicViews, site: str, params: Params, rows: Array, live: int) -> Array:
    """Weights [n, v, j] of a sub-layer with inputs [n, d], if `live` slots may be read."""
    # A mixture of unit vectors is the vector of its weights.
    depth = Depth(jnp.eye(mixer.slots), live, 0)
    return jax.vmap(lambda row: mixer._views(params, site, row, depth))(rows)


def views_of(mixer: Mixer) -> tuple[str, ...]:
    """What the mixtures of a router are for."""
    if isinstance(mixer, DynamicViews):
        return ("queries", "keys", "values", "feed-forward")
    return ("keys", "values") if getattr(mixer.config, "separate_kv", False) else ("",)


def circuit_names(mixer: Mixer) -> tuple[str, ...]:
    """Names of a layer's views and reading heads, heads of one view side by side."""
    if isinstance(mixer, DynamicViews):
        return views_of(mixer)
    heads = [f"head {head}" for head in range(1, mixer.shape.num_kv_heads + 1)]
    return tuple(f"{view}, {head}" if view else head for view in views_of(mixer) for head in heads)


def heat_map(mixer: Mixer, weights: RouterWeights) -> HeatMap:
    """Where each layer reads, from the weights of its router. A model without mixing would show the diagonal."""
    size = weights.size.mean(-1)  # [l, v, h, j]
    size = size.reshape(*size.shape[:3], -1, weights.per_layer).sum(-1)
    heads = size.reshape(len(size), -1, size.shape[-1])
    return HeatMap(_shares(heads.mean(1)), _shares(heads), circuit_names(mixer))


def _shares(rows: np.ndarray) -> np.ndarray:
    """Rows over their sums; all zeros, as a router with ReLU may give, stay."""
    total = rows.sum(-1, keepdims=True)
    return rows / np.where(total > 0, total, 1.0)


def _static(mixer: Mixer, params: Params, layer: int) -> np.ndarray:
    """The weights of a layer that no token changes: [v, h, j, g]; zeros if there are none."""
    slots, heads = mixer.slots, mixer.shape.num_kv_heads
    if isinstance(mixer, StaticKV):
        # Mixtures are linear: that of unit vectors, one for each source layer and head, is the vector of the weights.
        bank = jnp.eye(slots * heads).reshape(slots, 1, heads, -1)
        bank = jnp.broadcast_to(bank, (slots, 2, heads, slots * heads))
        mixed = mixer.mixture(params, jnp.zeros(mixer.shape.d_model), Depth(bank, layer + 1, layer))  # [2, h, (j g)]
        weights = np.asarray(mixed, np.float64).reshape(2, heads, slots, heads)
        return weights if mixer.config.separate_kv else weights[:1]
    if isinstance(mixer, StaticHidden):
        scores = mixer._weights(wide(params["logits"]).T, params, Depth(None, layer + 1, layer))
        return np.asarray(scores, np.float64).T[None, :, :, None]
    return np.zeros((len(views_of(mixer)), 1 if isinstance(mixer, DynamicViews) else heads, slots, 1))

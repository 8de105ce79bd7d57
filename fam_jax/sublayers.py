"""The weights of a layer, and what surrounds attention; tokens and FAM rows share all of it."""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike

from fam_jax.config import DecoderConfig
from fam_jax.ops import feed_forward, rms_norm


@struct.dataclass
class LayerParams:
    """Weights of one layer, or of all with a leading layer axis.

    Attributes:
        attn_norm: [d]. Shared with the feed-forward in the parallel block.
        wq: [d, h, k].
        wk: [d, g, k].
        wv: [d, g, k].
        wo: [h, k, d].
        ff_norm: [d]; None in the parallel block.
        w_gate: [d, e].
        w_up: [d, e].
        w_down: [e, d].
    """

    attn_norm: Array
    wq: Array
    wk: Array
    wv: Array
    wo: Array
    ff_norm: Array | None
    w_gate: Array
    w_up: Array
    w_down: Array


def project(params: LayerParams, normed: Array) -> tuple[Array, Array, Array]:
    """Queries [..., h, k] and raw keys and values [..., g, k] of normed rows [..., d]."""
    q = jnp.einsum("...d,dhk->...hk", normed, params.wq)
    k = jnp.einsum("...d,dgk->...gk", normed, params.wk)
    v = jnp.einsum("...d,dgk->...gk", normed, params.wv)
    return q, k, v


def finish(config: DecoderConfig, params: LayerParams, residual: Array, normed: Array, mixed: Array) -> Array:
    """Everything after attention: output projection, residual and feed-forward.

    Args:
        config: The decoder's.
        params: The layer's.
        residual: What attention is added to: [..., d].
        normed: The normed input of the layer, which the parallel block's feed-forward reads: [..., d].
        mixed: Attention's result per head: [..., h, k].

    Returns:
        The layer's output [..., d].
    """
    x = residual + jnp.einsum("...hk,hkd->...d", mixed, params.wo)
    if params.ff_norm is not None:
        normed = rms_norm(x, params.ff_norm, config.norm_eps)
    return x + feed_forward(params.w_gate, params.w_up, params.w_down, normed)


def cast(params: LayerParams, dtype: DTypeLike) -> LayerParams:
    """Matrices in the type of the activations; norm scales as they are, since norms compute in float32 anyway."""
    matrices = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}
    return dataclasses.replace(params, **{name: getattr(params, name).astype(dtype) for name in matrices})

"""The weights of a layer, and what surrounds attention; tokens, FAM rows and the prompt share all of it."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from fam_jax.config import DecoderConfig
from fam_jax.ops import feed_forward, product, rms_norm
from fam_jax.remat import ATTENDED, PROJECTED
from lime_jax import Depth, Mixer
from lime_jax.mixer import Add, Params


@struct.dataclass
class LayerParams:
    """Weights of one layer, or of all with a leading layer axis.

    Attributes:
        local: The layer is a local one, bool []; not a parameter, and None if the model has none.
        attn_norm: [d]. Shared with the feed-forward in the parallel block.
        wq: [d, h, k].
        wk: [d, g, k].
        wv: [d, g, k].
        wo: [h, k, d].
        bq: [h, k]; None without `attention_bias`, and so are the next two.
        bk: [g, k].
        bv: [g, k].
        q_norm: [k]; None without `qk_norm`.
        k_norm: [k]; None without `qk_norm`.
        ff_norm: [d]; None in the parallel block.
        w_gate: [d, e].
        w_up: [d, e].
        w_down: [e, d].
        attn_post_norm: [d]; None without `post_norms`, and so is the next.
        ff_post_norm: [d].
        mixing: What the layer mixer has of its own, as its `effective` gives it.
        lora: Low-rank changes to the weights, as `fam_jax.lora.effective` gives them; empty without.
    """

    local: Array | None
    attn_norm: Array
    wq: Array
    wk: Array
    wv: Array
    wo: Array
    bq: Array | None
    bk: Array | None
    bv: Array | None
    q_norm: Array | None
    k_norm: Array | None
    ff_norm: Array | None
    w_gate: Array
    w_up: Array
    w_down: Array
    attn_post_norm: Array | None
    ff_post_norm: Array | None
    mixing: Params
    lora: dict[str, Array]


class LayerStack(nn.Module):
    """Declares the weights of all layers, stacked."""

    config: DecoderConfig

    @nn.compact
    def __call__(self) -> LayerParams:
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        ones = nn.initializers.ones
        out_scale = (2 * c.num_layers) ** -0.5

        def declare(name: str, initializer: Callable[..., Array], *shape: int) -> Array:
            return self.param(name, initializer, (c.num_layers, *shape), dtype)

        def matrix(name: str, inputs: int, *shape: int, scale: float = 1.0) -> Array:
            return declare(name, nn.initializers.normal(scale * inputs**-0.5), *shape)

        def bias(name: str, heads: int) -> Array | None:
            return declare(name, nn.initializers.zeros, heads, c.head_dim) if c.attention_bias else None

        return LayerParams(
            local=None,
            attn_norm=declare("attn_norm", ones, c.d_model),
            wq=matrix("wq", c.d_model, c.d_model, c.num_heads, c.head_dim),
            wk=matrix("wk", c.d_model, c.d_model, c.num_kv_heads, c.head_dim, scale=c.kv_init),
            wv=matrix("wv", c.d_model, c.d_model, c.num_kv_heads, c.head_dim, scale=c.kv_init),
            wo=matrix("wo", c.num_heads * c.head_dim, c.num_heads, c.head_dim, c.d_model, scale=out_scale),
            bq=bias("bq", c.num_heads),
            bk=bias("bk", c.num_kv_heads),
            bv=bias("bv", c.num_kv_heads),
            q_norm=declare("q_norm", ones, c.head_dim) if c.qk_norm else None,
            k_norm=declare("k_norm", ones, c.head_dim) if c.qk_norm else None,
            ff_norm=None if c.parallel_block else declare("ff_norm", ones, c.d_model),
            w_gate=matrix("w_gate", c.d_model, c.d_model, c.d_ff),
            w_up=matrix("w_up", c.d_model, c.d_model, c.d_ff),
            w_down=matrix("w_down", c.d_ff, c.d_ff, c.d_model, scale=out_scale),
            attn_post_norm=declare("attn_post_norm", ones, c.d_model) if c.post_norms else None,
            ff_post_norm=declare("ff_post_norm", ones, c.d_model) if c.post_norms else None,
            mixing={},
            lora={},
        )


@jax.named_scope("project")
def project(
    config: DecoderConfig, mixer: Mixer, params: LayerParams, x: Array, depth: Depth
) -> tuple[Array, Array, Array, Depth]:
    """What attention works on, before the rotation.

    Args:
        config: The decoder's.
        mixer: The layer mixer; it may take inputs, keys and values from earlier layers.
        params: The layer's.
        x: Input of the layer [..., d].
        depth: Earlier layers at the same rows.

    Returns:
        Queries [..., h, k], keys and values [..., g, k], and the depth with what this layer lets later ones read.
    """
    norm = partial(rms_norm, scale=params.attn_norm, eps=config.norm_eps)
    for_q, for_k, for_v, depth = mixer.attention_inputs(params.mixing, x, norm, depth)
    heads = "g" if for_k.ndim > for_q.ndim else ""  # each head may have an input of its own
    q = product("...d,dhk->...hk", for_q, params.wq, params.lora, "wq")
    k = product(f"...{heads}d,dgk->...gk", for_k, params.wk, params.lora, "wk")
    v = product(f"...{heads}d,dgk->...gk", for_v, params.wv, params.lora, "wv")
    if params.bq is not None and params.bk is not None and params.bv is not None:
        q, k, v = q + params.bq, k + params.bk, v + params.bv
    k, v, depth = mixer.keys_values(params.mixing, for_q, q, k, v, depth)
    if params.q_norm is not None and params.k_norm is not None:
        q, k = rms_norm(q, params.q_norm, config.norm_eps), rms_norm(k, params.k_norm, config.norm_eps)
    q, k, v = (checkpoint_name(part, PROJECTED) for part in (q, k, v))
    return q, k, v, depth


@jax.named_scope("project")
def attention_output(config: DecoderConfig, params: LayerParams, attended: Array) -> Array:
    """What attention adds to the residual stream [..., d], from its result per head [..., h, k]."""
    y = product("...hk,hkd->...d", checkpoint_name(attended, ATTENDED), params.wo, params.lora, "wo")
    return y if params.attn_post_norm is None else rms_norm(y, params.attn_post_norm, config.norm_eps)


def finish(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    x: Array,
    add: Add,
    attended: Array,
    depth: Depth,
    ff_source: Array | None = None,
) -> tuple[Array, Depth]:
    """Everything after attention: output projection, residual and feed-forward.

    Args:
        config: The decoder's.
        mixer: The layer mixer.
        params: The layer's.
        x: Input of the layer [..., d].
        add: Adds a sub-layer's output to what goes from layer to layer, as `mixer.enter` gave it.
        attended: Attention's result per head: [..., h, k].
        depth: Earlier layers at the same rows.
        ff_source: What the feed-forward's mixture takes for its own input, if it is another than its input.

    Returns:
        What goes to the next layer, and the depth with what this layer lets later ones read.
    """
    y = attention_output(config, params, attended)
    if params.ff_norm is None:
        scale = params.attn_norm
    else:
        scale = params.ff_norm
        carry, depth = add(y, depth)
        x, add = mixer.enter(params.mixing, carry, depth, 1)
    norm = partial(rms_norm, scale=scale, eps=config.norm_eps)
    ff_in, depth = mixer.ff_input(params.mixing, x if ff_source is None else ff_source, norm, depth)
    ff_out = feed_forward(params.w_gate, params.w_up, params.w_down, ff_in, params.lora, config.activation)
    if params.ff_post_norm is not None:
        ff_out = rms_norm(ff_out, params.ff_post_norm, config.norm_eps)
    carry, depth = add(y + ff_out if params.ff_norm is None else ff_out, depth)
    return mixer.leave(params.mixing, carry, depth)


def cast(params: LayerParams, dtype: DTypeLike) -> LayerParams:
    """Matrices in the type of the activations; norm scales as they are, since norms compute in float32 anyway."""
    wide = {"attn_norm", "ff_norm", "q_norm", "k_norm", "attn_post_norm", "ff_post_norm"}
    other = {*wide, "local", "mixing", "lora"}
    found = {field.name: getattr(params, field.name) for field in dataclasses.fields(params) if field.name not in other}
    return dataclasses.replace(params, **{name: x.astype(dtype) for name, x in found.items() if x is not None})

"""From token ids to the first layer's input, and from the last layer's output to logits."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from fam_jax.config import DecoderConfig
from fam_jax.loss import VOCAB_BLOCK, TokenLosses, token_losses
from fam_jax.ops import accumulation_dtype, cap, rms_norm
from fam_jax.plan import Layout
from fam_jax.sharding import constrain, gather


def embed_blocks(config: DecoderConfig, params: dict[str, Any], tokens: Array, layout: Layout) -> Array:
    """Embedded tokens [b, t] at their places in the blocks of a call: [b, n, w, d]."""
    source = layout.source.reshape(tokens.shape[0], -1)
    ids = jnp.take_along_axis(tokens, source, axis=1) if tokens.shape[1] else jnp.zeros_like(source)
    table = gather(config.sharding, {"embed": params["embed"].astype(config.dtype)}, looped=False)["embed"]
    x = jnp.take(table, ids, axis=0).reshape(*layout.source.shape, config.d_model)
    return constrain(config.sharding, x, "batch", "block", None, None)


def read_out(config: DecoderConfig, params: dict[str, Any], x: Array) -> Array:
    """Logits [b, t, v] of the last layer's output [b, t, d]."""
    dtype = jnp.dtype(config.dtype)
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    table = gather(config.sharding, {"embed": _output_weights(config, params).astype(dtype)})["embed"]
    logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=accumulation_dtype(dtype))
    logits = cap(logits, config.logit_softcap)
    return constrain(config.sharding, logits, "batch", "block", "vocab")


def read_losses(config: DecoderConfig, params: dict[str, Any], x: Array, targets: Array) -> TokenLosses:
    """Losses of targets [b, t] by the last layer's output [b, t, d], without all their logits."""
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return token_losses(x, _output_weights(config, params), targets, VOCAB_BLOCK, config.sharding, config.logit_softcap)


def _output_weights(config: DecoderConfig, params: dict[str, Any]) -> Array:
    """What logits are products with: [v, d]."""
    return params["embed"] if config.tie_embeddings else params["unembed"].T

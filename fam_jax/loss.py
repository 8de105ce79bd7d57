"""Cross entropy over a large vocabulary, without ever holding the logits of all of it.

The vocabulary is read in blocks: a running log-sum-exp goes over them, and the backward pass computes each block's
logits again. Memory is that of one block, whatever the vocabulary; where the embedding is spread over devices, each
block of it is gathered once.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fam_jax.ops import accumulation_dtype, cap
from fam_jax.sharding import FSDP_TP, ShardingRules, constrain, gather

VOCAB_BLOCK = 8192


class TokenLosses(NamedTuple):
    """What is known of each token's target, arrays [...], float32 (float64 if `x` is).

    Attributes:
        nll: Negative log-likelihood, in nats.
        log_z: Log of the partition function: the log-sum-exp of the logits.
        hit: The target has the largest logit, or is the first that has: bool.
    """

    nll: Array
    log_z: Array
    hit: Array


def token_losses(
    x: Array,
    table: Array,
    targets: Array,
    block: int = VOCAB_BLOCK,
    rules: ShardingRules = FSDP_TP,
    softcap: float | None = None,
) -> TokenLosses:
    """Losses of the logits x table^T.

    Args:
        x: What the logits are computed from: [b, t, d]; products are in its type, sums in float32 at least.
        table: Output weights [v, d].
        targets: int [b, t], from 0 to v - 1.
        block: Most logits of a token at once.
        rules: How `table` and `x` are spread over a mesh, if there is one.
        softcap: Limit of the logits, see `fam_jax.ops.cap`.
    """
    if len(table) > block:
        return _in_blocks(x, table, targets, block, rules, softcap)
    logits, _ = _logits(x, table[:, None], len(table), 0, rules, softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return TokenLosses(log_z - wanted, log_z, jnp.argmax(logits, axis=-1) == targets)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _in_blocks(
    x: Array, table: Array, targets: Array, block: int, rules: ShardingRules, softcap: float | None
) -> TokenLosses:
    """`token_losses` block after block; has gradients, but no forward-mode derivatives."""
    return _forward(x, table, targets, block, rules, softcap)[0]


def _blocks(table: Array, block: int) -> tuple[Array, int]:
    """The table as [size, n, d], and n. Block j has rows j, n + j, 2n + j, ...: of every device's share some."""
    rows = table.shape[0]
    count = -(-rows // block)
    unit = math.gcd(block, 128)  # so that devices can share a block
    size = -(-rows // (count * unit)) * unit
    if count * size > rows:
        table = jnp.pad(table, ((0, count * size - rows), (0, 0)))
    return table.reshape(size, count, -1), count


def _logits(
    x: Array, table: Array, rows: int, number: Array | int, rules: ShardingRules, softcap: float | None
) -> tuple[Array, Array]:
    """Logits [b, t, size] of block `number`, and its part of the table [size, d]."""
    dtype = accumulation_dtype(x.dtype)
    part = jax.lax.dynamic_index_in_dim(table, number, axis=1, keepdims=False)
    part = gather(rules, {"embed": part.astype(x.dtype)})["embed"]
    logits = cap(jnp.einsum("btd,vd->btv", x, part, preferred_element_type=dtype), softcap)
    size, count = table.shape[:2]
    if size * count > rows:
        logits = jnp.where(jnp.arange(size) * count + number < rows, logits, -jnp.inf)
    return constrain(rules, logits, "batch", "block", "vocab"), part


def _forward(x, table, targets, block, rules, softcap):
    blocks, count = _blocks(table, block)
    dtype = accumulation_dtype(x.dtype)

    def step(carry, number):
        best, index, total, wanted = carry
        logits, _ = _logits(x, blocks, table.shape[0], number, rules, softcap)
        top = jnp.max(logits, axis=-1)
        top_index = jnp.argmax(logits, axis=-1).astype(jnp.int32) * count + number
        ahead = (top > best) | ((top == best) & (top_index < index))
        new = jnp.maximum(best, top)
        total = total * jnp.exp(best - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=-1)
        here = jnp.take_along_axis(logits, (targets // count)[..., None], axis=-1)[..., 0]
        wanted = jnp.where(targets % count == number, here, wanted)
        return (new, jnp.where(ahead, top_index, index), total, wanted), None

    nothing = jnp.zeros(targets.shape, dtype)
    start = (nothing - jnp.inf, jnp.zeros(targets.shape, jnp.int32), nothing, nothing)
    (best, index, total, wanted), _ = jax.lax.scan(step, start, jnp.arange(count, dtype=jnp.int32))
    log_z = best + jnp.log(total)
    return TokenLosses(log_z - wanted, log_z, index == targets), (x, table, targets, log_z)


def _backward(block, rules, softcap, saved, cotangents):
    x, table, targets, log_z = saved
    d_nll, d_log_z, _ = cotangents
    blocks, count = _blocks(table, block)

    def step(carry, number):
        d_x, d_blocks = carry
        logits, part = _logits(x, blocks, table.shape[0], number, rules, softcap)
        d_logits = jnp.exp(logits - log_z[..., None]) * (d_nll + d_log_z)[..., None]
        own = (jnp.arange(len(part)) == (targets // count)[..., None]) & (targets % count == number)[..., None]
        d_logits = jnp.where(own, d_logits - d_nll[..., None], d_logits)
        if softcap is not None:  # of tanh; logits that are no rows of the table are -inf, and have no gradient
            d_logits *= 1 - jnp.square(jnp.maximum(logits / softcap, -1))
        d_logits = d_logits.astype(x.dtype)
        d_x += jnp.einsum("btv,vd->btd", d_logits, part, preferred_element_type=d_x.dtype)
        d_part = jnp.einsum("btv,btd->vd", d_logits, x, preferred_element_type=d_x.dtype)
        d_part = constrain(rules, d_part.astype(table.dtype), "vocab", "embed")
        return (d_x, jax.lax.dynamic_update_index_in_dim(d_blocks, d_part, number, axis=1)), None

    start = (jnp.zeros(x.shape, accumulation_dtype(x.dtype)), jnp.zeros_like(blocks))
    (d_x, d_blocks), _ = jax.lax.scan(step, start, jnp.arange(count, dtype=jnp.int32))
    return d_x.astype(x.dtype), d_blocks.reshape(-1, table.shape[1])[: len(table)], None


_in_blocks.defvjp(_forward, _backward)

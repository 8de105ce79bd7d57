"""Feedback Attention Memory: the update of algorithm 2, its positions, its noise, and the learned start.

Per layer and block n, the FAM rows F[n-1] query their own keys and the keys of the whole block, not the memory
segments, and pass through the layer's ordinary weights:

    A = attention(q(F[n-1]), [k(F[n-1]); k(block)], [v(F[n-1]); v(block)]) + F[n-1]
    F[n] = feed_forward(norm(A)) + A

The first update of a document has no residual F[0], because the learned prompt holds no context yet. Two
additions of ours, off by default, let a memory last: a limit to the size of F[n] (`clip`), and noise on it in
training (`noise`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fam_jax.config import DecoderConfig, MemoryConfig
from fam_jax.ops import Source, accumulation_dtype, attend, rms_norm, rotate
from fam_jax.plan import Plan
from fam_jax.sublayers import LayerParams, finish, project


class FamInputs(NamedTuple):
    """What a layer's FAM may start from, and the randomness of training.

    Attributes:
        prompt: The learned prompt as it arrives at this layer: [f, d].
        stored: The stored FAM of Random State Passing at this layer: [f, d]; None if the caller has none.
        noise_key: Key of this layer's FAM noise; None for no noise.
        noise: Size of the noise, relative to the FAM.
    """

    prompt: Array
    stored: Array | None
    noise_key: Array | None
    noise: Array | None


def key_positions(memory: MemoryConfig, position: Array | None, fresh: Array) -> Array:
    """Rotary positions of FAM rows as keys (section B.2.1 and table 7).

    Args:
        memory: Block size, FAM length and the kind of positions.
        position: Absolute position of the block's slot 0: [...]; None with local positions.
        fresh: The rows are the learned prompt: bool [...].

    Returns:
        [..., f], or [1, f] with local positions.
    """
    rows = jnp.arange(memory.fam_length)
    if memory.fam_positions == "fractional":
        relative = (rows + 1) / (memory.fam_length + 1) - 1
    else:
        relative = rows - memory.fam_length
    if position is None:
        return relative[None]
    if memory.fam_positions == "zero":
        return jnp.zeros((*position.shape, memory.fam_length))
    positions = position[..., None] + relative
    if memory.prompt_positions == "pinned":
        positions = jnp.where(fresh[..., None], rows, positions)
    return positions


def query_positions(memory: MemoryConfig, position: Array | None, fresh: Array) -> Array:
    """Rotary positions of FAM rows as queries: where they will be after the update, or where they were."""
    old = key_positions(memory, position, fresh)
    if memory.fam_query == "old" or memory.fam_positions == "zero":
        return old
    after = None if position is None else position + memory.block_size
    new = key_positions(memory, after, jnp.zeros_like(fresh))
    return new + memory.block_size if position is None else new


def update(
    config: DecoderConfig,
    params: LayerParams,
    fam: Array,
    fresh: Array,
    block: Source,
    position: Array | None,
) -> tuple[Array, Source]:
    """One update of one layer's FAM (algorithm 2).

    Args:
        config: The decoder's; it has a FAM.
        params: The layer's weights.
        fam: FAM before the block: [b, f, d].
        fresh: The row's FAM is the learned prompt: bool [b].
        block: Rotated keys and values of the whole block: [b, c, g, k].
        position: Absolute position of the block's slot 0: [b]; None with local positions.

    Returns:
        FAM after the block [b, f, d], and the rotated keys and values of FAM before it [b, f, g, k].
    """
    memory = config.memory
    assert memory is not None
    normed = rms_norm(fam, params.attn_norm, config.norm_eps)
    q, k, v = project(params, normed)
    q = rotate(q, query_positions(memory, position, fresh), config.rope_base)
    own = Source(rotate(k, key_positions(memory, position, fresh), config.rope_base), v)
    residual = fam
    if memory.first_residual == "zero":
        residual = jnp.where(fresh[:, None, None], 0, fam)
    new = finish(config, params, residual, normed, attend(q, [own, block]))
    return new if memory.clip is None else clip_rows(new, memory.clip), own


def clip_rows(fam: Array, limit: float) -> Array:
    """Scales the rows of `fam` [b, f, d] whose root mean square is above `limit` down to it."""
    return (fam * jnp.minimum(1.0, limit / _rms(fam))).astype(fam.dtype)


def _rms(fam: Array) -> Array:
    """Root mean square of each row [b, f, 1]; the smallest normal number at least, so that it can divide."""
    wide = fam.astype(accumulation_dtype(fam.dtype))
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(wide.dtype).tiny))


def add_noise(fam: Array, size: Array | float, key: Array) -> Array:
    """FAM noise: adds Gaussian noise of `size` times the root mean square of each row of `fam` [b, f, d]."""
    scale = size * _rms(fam)
    return (fam + scale * jax.random.normal(key, fam.shape, scale.dtype)).astype(fam.dtype)


def scan_blocks(
    config: DecoderConfig,
    params: LayerParams,
    fam: Array,
    inputs: FamInputs,
    block: Source,
    plan: Plan,
    *,
    skip_incomplete: bool,
) -> tuple[Array, Source, Array]:
    """Carries one layer's FAM over the blocks of a call.

    Args:
        config: The decoder's; it has a FAM.
        params: The layer's weights.
        fam: FAM before the first block: [b, f, d].
        inputs: What documents start from, and the noise key.
        block: Rotated keys and values of the blocks: [b, n, c, g, k].
        plan: Bookkeeping of the same blocks.
        skip_incomplete: Skip the work of a block that no row completes; pays when that is the rule.

    Returns:
        FAM after the last block [b, f, d]; rotated keys and values of the FAM that entered each block
        [b, n, f, g, k]; FAM of row 0 after the block that Random State Passing keeps [f, d].
    """
    memory = config.memory
    assert memory is not None

    def step(carry, block_n):
        fam, kept = carry
        k, v, index, complete, fresh, passed, position, store = block_n
        if inputs.stored is not None:
            fam = jnp.where(passed[:, None, None], inputs.stored, fam)
        entering = jnp.where(fresh[:, None, None], inputs.prompt, fam)

        def compress(entering):
            new, own = update(config, params, entering, fresh, Source(k, v), position)
            if inputs.noise_key is not None and inputs.noise is not None:
                new = add_noise(new, inputs.noise, jax.random.fold_in(inputs.noise_key, index))
            return new, own

        def only_keys(entering):
            _, fam_k, fam_v = project(params, rms_norm(entering, params.attn_norm, config.norm_eps))
            return fam, Source(rotate(fam_k, key_positions(memory, position, fresh), config.rope_base), fam_v)

        if skip_incomplete:
            new, own = jax.lax.cond(jnp.any(complete), compress, only_keys, entering)
        else:
            new, own = compress(entering)
        fam = jnp.where(complete[:, None, None], new, fam)
        kept = jnp.where(store, fam[0], kept)
        return (fam, kept), (own.k, own.v)

    if config.remat:
        step = jax.checkpoint(step, prevent_cse=False)
    over_blocks = (block.k, block.v, plan.complete, plan.fresh, plan.passed, plan.position)
    k, v, complete, fresh, passed, position = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), over_blocks)
    carry = (fam, jnp.zeros(fam.shape[1:], fam.dtype))
    xs = (k, v, plan.index, complete, fresh, passed, position, plan.store)
    (fam, kept), (fam_k, fam_v) = jax.lax.scan(step, carry, xs)
    return fam, Source(jnp.moveaxis(fam_k, 0, 1), jnp.moveaxis(fam_v, 0, 1)), kept


def climb(config: DecoderConfig, params: LayerParams, prompt: Array) -> Array:
    """Takes the prompt rows [f, d] through one layer: they see each other and nothing else (appendix B.1).

    Were they to see the first block, its tokens would read a summary of their own future at the next layer.
    """
    memory = config.memory
    assert memory is not None
    normed = rms_norm(prompt, params.attn_norm, config.norm_eps)
    q, k, v = project(params, normed)
    start = None if memory.positions == "local" else jnp.zeros(())
    positions = key_positions(memory, start, jnp.ones((), bool)).reshape(-1)
    q, k = rotate(q, positions, config.rope_base), rotate(k, positions, config.rope_base)
    return finish(config, params, prompt, normed, attend(q, [Source(k, v)]))

"""Feedback Attention Memory: the update of algorithm 2, its positions, its noise, and the learned start.

Per layer and block n, the FAM rows F[n-1] query their own keys and the keys of the whole block, not the memory
segments, and pass through the layer's ordinary weights:

    A = attention(q(F[n-1]), [k(F[n-1]); k(block)], [v(F[n-1]); v(block)]) + F[n-1]
    F[n] = feed_forward(norm(A)) + A

The first update of a document has no residual F[0], because the learned prompt holds no context yet. Tokens see the
keys and values of F[n-1], and if asked for those of some blocks before (table 6). The paper's static summary tokens
(section C.3) differ in one thing: query and residual are the learned start P at every update,

    A = attention(q(P), [k(F[n-1]); k(block)], [v(F[n-1]); v(block)]) + P

Two additions of ours, off by default, let a memory last: a limit to the size of F[n] (`clip`), and noise on it in
training (`noise`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from fam_jax import sequence
from fam_jax.config import DecoderConfig, MemoryConfig
from fam_jax.ops import Source, accumulation_dtype, attend, rotate
from fam_jax.plan import Plan
from fam_jax.remat import UPDATED
from fam_jax.rope import frequencies
from fam_jax.sharding import constrain
from fam_jax.sublayers import LayerParams, attention_output, finish, project
from lime_jax import Depth, Mixer
from lime_jax.depth import NO_DEPTH


class FamInputs(NamedTuple):
    """What a layer's FAM may start from, and the randomness of training.

    Attributes:
        prompt: The learned prompt as it arrives at this layer, or the layer's own prefix: [f, d]; None where a prompt
            climbs along with the tokens.
        stored: The stored FAM of Random State Passing at this layer: [f, d]; None if the caller has none.
        noise_key: Key of this layer's FAM noise; None for no noise.
        active: This layer has a FAM: bool []; None if all have.
    """

    prompt: Array | None
    stored: Array | None
    noise_key: Array | None
    active: Array | None = None


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
    mixer: Mixer,
    params: LayerParams,
    fam: Array,
    fresh: Array,
    q: Array,
    sources: list[Source],
    depth: Depth,
) -> Array:
    """One update of one layer's FAM (algorithm 2), from its queries on.

    Without `fam_ff` it ends before the feed-forward, with attention and residual.

    Args:
        config: The decoder's; it has a FAM.
        mixer: The layer mixer of memory rows.
        params: The layer's weights.
        fam: FAM before the block, of static summary tokens the learned start: [b, f, d].
        fresh: The row's FAM is the learned prompt: bool [b].
        q: Rotated queries of the FAM rows: [b, f, h, k].
        sources: Their own keys and values, and those of the whole block.
        depth: Earlier layers' FAM before the block.

    Returns:
        FAM after the block [b, f, d].
    """
    memory = config.memory
    assert memory is not None
    residual = fam
    if memory.first_residual == "zero" and memory.kind == "fam":
        residual = jnp.where(fresh[:, None, None], 0, fam)
    # Other layers may read only the FAM as it entered the block: the rest has seen the block's last token.
    ff_source = fam if mixer.mixes_ff else None
    attended = attend(q, sources, config.attention_softcap)
    if memory.fam_ff:
        new, _ = finish(config, mixer, params, fam, lambda y, later: (residual + y, later), attended, depth, ff_source)
    else:
        new = residual + attention_output(config, params, attended)
    return new if memory.clip is None else clip_rows(new, memory.clip)


def clip_rows(fam: Array, limit: float) -> Array:
    """Scales the rows of `fam` [b, f, d] whose root mean square is above `limit` down to it."""
    return (fam * jnp.minimum(1.0, limit / _rms(fam))).astype(fam.dtype)


def _rms(fam: Array) -> Array:
    """Root mean square of each row [b, f, 1]; the smallest normal number at least, so that it can divide."""
    wide = fam.astype(accumulation_dtype(fam.dtype))
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(wide.dtype).tiny))


def add_noise(fam: Array, size: float, key: Array) -> Array:
    """FAM noise: adds Gaussian noise of `size` times the root mean square of each row of `fam` [b, f, d]."""
    scale = size * _rms(fam)
    return (fam + scale * jax.random.normal(key, fam.shape, scale.dtype)).astype(fam.dtype)


def scan_blocks(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    fam: Array,
    inputs: FamInputs,
    block: Source,
    plan: Plan,
    depth: Depth,
    *,
    updates: bool,
) -> tuple[Array, Source, Array, tuple[Array, ...], Array | None]:
    """Carries one layer's FAM over the blocks of a call.

    Args:
        config: The decoder's; it has a FAM.
        mixer: The layer mixer of memory rows.
        params: The layer's weights.
        fam: FAM before the first block: [b, f, d].
        inputs: What documents start from, and the noise key.
        block: Rotated keys and values of the blocks: [b, n, c, g, k].
        plan: Bookkeeping of the same blocks.
        depth: Earlier layers' FAM as it entered each block: rows [b, n, f].
        updates: Whether the FAM is updated where a block is complete; without, it only enters, as it is left then.

    Returns:
        FAM after the last block [b, f, d]; rotated keys and values of the FAM that entered each block
        [b, n, f, g, k]; FAM of row 0 after the block that Random State Passing keeps [f, d]; what later layers may read
        of the FAM that entered each block, slots of rows [b, n, f]; and the keys before the rotation, if tokens see
        more than one FAM, else None.
    """
    memory = config.memory
    assert memory is not None

    def per_row(start):
        # One for each row, where the row is: in the loop they would be moved, and their gradients summed, every block.
        return constrain(config.sharding, jnp.broadcast_to(start, fam.shape), "batch", None, None)

    inputs = inputs._replace(prompt=per_row(inputs.prompt))
    if inputs.stored is not None:
        inputs = inputs._replace(stored=per_row(inputs.stored))

    def step(operands, carry, block_n):
        (params, inputs, (live, layer_number)), static_q = operands
        fam, kept = carry
        k, v, index, complete, fresh, passed, position, store, bank, pushed = block_n
        if inputs.stored is not None:
            fam = jnp.where(passed[:, None, None], inputs.stored, fam)
        entering = jnp.where(fresh[:, None, None], inputs.prompt, fam)
        here = Depth(bank, live, layer_number, (), pushed)
        q, fam_k, fam_v, here = project(config, mixer, params, entering, here)
        turns = frequencies(config, params.local)
        own = Source(rotate(fam_k, key_positions(memory, position, fresh), turns), fam_v)
        reader = entering
        if static_q is not None:
            reader, q = inputs.prompt, static_q

        def compress():
            queries = rotate(q, query_positions(memory, position, fresh), turns)
            new = update(config, mixer, params, reader, fresh, queries, [own, Source(k, v)], here)
            if inputs.noise_key is not None:
                new = add_noise(new, memory.noise, jax.random.fold_in(inputs.noise_key, index))
            return new

        if updates:
            fam = jnp.where(complete[:, None, None], checkpoint_name(compress(), UPDATED), fam)
        # Were the carry laid out otherwise than it came in, every block would move it.
        fam = constrain(config.sharding, fam, "batch", None, None)
        kept = jnp.where(store, jax.lax.stop_gradient(fam), kept)
        slots = (*here.own, *[entering] * (mixer.per_layer - len(here.own)))
        return (fam, kept), (own.k, own.v, slots, fam_k if memory.fam_blocks > 1 else None)

    def scan(fam, operands):
        *shared, xs = operands
        params, inputs, _ = shared
        static_q = None
        if memory.kind == "summary":
            static_q = project(config, mixer, params, inputs.prompt, NO_DEPTH)[0]
        # No checkpoint of its own: where layers are computed again, updates would be a third time.
        one = partial(step, (shared, static_q))
        with jax.named_scope("fam_scan"):  # by which the loop is found in a compiled program
            (fam, kept), out = jax.lax.scan(one, (fam, jnp.zeros_like(fam)), xs)
        return fam, (kept, out)

    of_blocks = (block.k, block.v, plan.complete, plan.fresh, plan.passed, plan.position, depth.pushed)
    k, v, complete, fresh, passed, position, pushed = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), of_blocks)
    bank = None if depth.bank is None else jnp.moveaxis(depth.bank, 2, 0)
    fam = constrain(config.sharding, fam, "batch", None, None)
    xs = (k, v, plan.index, complete, fresh, passed, position, plan.store, bank, pushed)
    fam, (kept, out) = sequence.pass_along(scan, fam, (params, inputs, (depth.live, depth.layer), xs))
    fam_k, fam_v, slots, plain_k = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
    return sequence.from_last(fam), Source(fam_k, fam_v), sequence.total(kept[0]), slots, plain_k


def earlier(config: DecoderConfig, turns: Array, k: Array, v: Array, plan: Plan) -> list[Source]:
    """Keys and values of the FAM before the last, from the latest on, for the tokens of each block (table 6).

    They keep the slots of the blocks that they compressed.

    Args:
        config: The decoder's; its `fam_blocks` is more than 1.
        turns: Frequencies of the rotary positions of the layer.
        k: Keys, before the rotation, of the FAM that entered the `fam_blocks - 1` blocks before those of the plan, and
            these: [b, fam_blocks - 1 + n, f, g, k].
        v: Values of the same.
        plan: Bookkeeping of n blocks.
    """
    memory = config.memory
    assert memory is not None
    assert plan.blocks is not None
    count, windows = memory.fam_blocks - 1, plan.blocks.shape[1]
    sources = []
    for back in range(1, memory.fam_blocks):
        there = slice(count - back, count - back + windows)
        start = None if plan.position is None else plan.position - back * memory.block_size
        positions = key_positions(memory, start, jnp.zeros(plan.blocks.shape, bool))
        positions = positions - back * memory.block_size if start is None else positions
        mask = (back <= plan.blocks)[:, :, None, None]
        sources.append(Source(rotate(k[:, there], positions, turns), v[:, there], mask))
    return sources


def new_prompt(rows: Array, embed: Array, token: int | None = None) -> Array:
    """The FAM prompt that a trained model begins with.

    Models learn to leave attention that nothing needs on the token that texts begin with. Rows that resemble it do
    little harm before any training, and stand in for it where a window has lost it.

    Args:
        rows: Noise of variance 1 that tells the rows apart: [f, d].
        embed: The model's embedding: [v, d].
        token: Of which the rows are copies, but for a tenth of noise; None makes them noise as large as embeddings are.

    Returns:
        The prompt [f, d].

    Raises:
        ValueError: There is no such token.
    """
    if token is not None and not 0 <= token < len(embed):
        raise ValueError(f"prompt_token={token!r} is not allowed; it must be one of the {len(embed)} tokens, or None")
    size = jnp.std(embed)
    return (size * rows if token is None else embed[token] + 0.1 * size * rows).astype(rows.dtype)


def climb(
    config: DecoderConfig, mixer: Mixer, params: LayerParams, carry: Array, depth: Depth
) -> tuple[Array, Array, Depth]:
    """Takes the prompt through one layer: its rows see each other and nothing else (appendix B.1).

    Were they to see the first block, its tokens would read a summary of their own future at the next layer.

    Args:
        config: The decoder's; it has a FAM.
        mixer: The layer mixer.
        params: The layer's weights.
        carry: The prompt as it leaves the layer before; rows [f, d], more axes with some mixers.
        depth: Earlier layers at the same rows.

    Returns:
        The prompt as it leaves this layer; its rows as this layer sees them [f, d]; the depth with what this layer
        lets later ones read.
    """
    memory = config.memory
    assert memory is not None

    def everywhere(x):
        # A few rows are soonest computed by every device.
        return constrain(config.sharding, x, *[None] * x.ndim)

    prompt, add = mixer.enter(params.mixing, everywhere(carry), depth, 0)
    q, k, v, depth = project(config, mixer, params, everywhere(prompt), depth)
    start = None if memory.positions == "local" else jnp.zeros(())
    positions = key_positions(memory, start, jnp.ones((), bool)).reshape(-1)
    turns = frequencies(config, params.local)
    attended = attend(rotate(q, positions, turns), [Source(rotate(k, positions, turns), v)], config.attention_softcap)
    carry, depth = finish(config, mixer, params, prompt, add, attended, depth)
    return everywhere(carry), prompt, depth

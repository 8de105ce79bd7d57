"""The memories that the paper compares FAM with (appendices B.4.8 and C), in the same decoder.

Static summary tokens (C.3) are FAM with another query and residual: see `fam_jax.fam`.

Feedback Memory (C.2) caches, as the segments of a layer l, keys and values of its outputs O[l] in place of its inputs:

    K, V = QKV(norm(O[l]))

RMT and AutoCompressors (B.4.8) feed back from the last layer to the first. A block is an ordinary causal Transformer
on the concatenation of rows of memory R, the block's tokens X, and rows to be written W; M[n] are the outputs of the
last layer, before the final norm, at W, and P learned rows at the embeddings:

    [.., O, M[n]] = layers([R; X; W])
    RMT:              R = W = M[n-1], and P in a document's first block
    AutoCompressors:  R = [M[n-s]; ..; M[n-1]], those there are, and W = P

So rows of memory see no segments, and rows of R nothing but R. Positions go on through the concatenation: those of R
end, as FAM's do, just before the block, and those of W begin just after it. R passes through all layers again in every
call, so that a token that is read alone costs as much as these rows with it.
"""

import jax.numpy as jnp
from jax import Array

from fam_jax.config import DecoderConfig
from fam_jax.ops import Source, attend, rotate
from fam_jax.plan import Plan
from fam_jax.rope import frequencies
from fam_jax.sharding import constrain
from fam_jax.state import LayerMemory
from fam_jax.sublayers import LayerParams, finish, project
from lime_jax import Depth, Mixer
from lime_jax.depth import NO_DEPTH


def of_outputs(config: DecoderConfig, mixer: Mixer, params: LayerParams, outputs: Array) -> tuple[Array, Array]:
    """Keys, not rotated yet, and values [..., g, k] of a layer's own outputs [..., d] (section C.2)."""
    _, k, v, _ = project(config, mixer, params, outputs, NO_DEPTH)
    return k, v


def begin_block(config: DecoderConfig, prompt: Array, summaries: Array, plan: Plan) -> dict[str, Array]:
    """R and W of a block at the embeddings (B.4.8): "read" [b, 1, s f, d] and "write" [b, 1, f, d].

    Args:
        config: The decoder's; its memory is RMT or AutoCompressors.
        prompt: P: [f, d].
        summaries: M of the blocks before: [b, s, f, d].
        plan: Bookkeeping of one block.
    """
    memory = config.memory
    assert memory is not None
    batch, kept, rows, width = summaries.shape
    if memory.kind == "rmt":
        latest = jnp.where(plan.fresh[:, :, None, None], prompt, summaries)
        return {"read": latest, "write": latest}
    write = jnp.broadcast_to(prompt, (batch, 1, rows, width))
    return {"read": summaries.reshape(batch, 1, kept * rows, width), "write": write}


def without_missing(memory: LayerMemory, blocks: int) -> LayerMemory:
    """Without the summaries of more than so many blocks, which a text that begins with the call cannot have."""
    if memory.summaries is None:
        return memory
    return memory._replace(summaries=memory.summaries[:, -blocks:])


def with_missing(config: DecoderConfig, memory: LayerMemory) -> LayerMemory:
    """What `without_missing` has left out, again, as zeros."""
    if memory.summaries is None or config.memory is None:
        return memory
    missing = config.memory.kept_summaries - memory.summaries.shape[1]
    return memory._replace(summaries=jnp.pad(memory.summaries, ((0, 0), (missing, 0), (0, 0), (0, 0))))


def end_block(summaries: Array, written: Array, plan: Plan) -> Array:
    """The summaries [b, s, f, d] after a block, with `written`, M[n] [b, 1, f, d], if the block is complete."""
    moved = jnp.concatenate([summaries[:, 1:], written], axis=1)
    return jnp.where(plan.complete[:, :, None, None], moved, summaries)


def read(
    config: DecoderConfig, mixer: Mixer, params: LayerParams, carry: Array, plan: Plan, depth: Depth
) -> tuple[Array, Source, Depth]:
    """Takes R through a layer.

    Args:
        config: The decoder's; its memory is RMT or AutoCompressors.
        mixer: The layer mixer.
        params: The layer's weights.
        carry: R as it leaves the layer before: [b, 1, s f, d], more axes with some mixers.
        plan: Bookkeeping of one block.
        depth: Earlier layers at the same rows.

    Returns:
        R as it leaves the layer; its keys and values for the block's tokens and for W; the depth with what this layer
        lets later ones read.
    """
    memory = config.memory
    assert memory is not None
    rows = jnp.arange(carry.shape[2]) - carry.shape[2]
    there = None
    if memory.kind == "autocompressor":
        assert plan.blocks is not None
        there = (rows >= -memory.fam_length * plan.blocks[:, :, None])[:, :, None]
    return _through(config, mixer, params, carry, rows, there, [], plan, depth)


def write(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    carry: Array,
    sources: list[Source],
    plan: Plan,
    depth: Depth,
) -> tuple[Array, Depth]:
    """Takes W [b, 1, f, d] through a layer, which sees R and the whole block, `sources`. See `read`."""
    memory = config.memory
    assert memory is not None
    rows = memory.block_size + jnp.arange(memory.fam_length)
    carry, _, depth = _through(config, mixer, params, carry, rows, None, sources, plan, depth)
    return carry, depth


def _through(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    carry: Array,
    rows: Array,
    there: Array | None,
    sources: list[Source],
    plan: Plan,
    depth: Depth,
) -> tuple[Array, Source, Depth]:
    """A layer at rows of memory, each of which sees `sources`, and of its own kind those up to itself.

    Args:
        config: The decoder's.
        mixer: The layer mixer.
        params: The layer's weights.
        carry: The rows as they leave the layer before: [b, 1, r, d], more axes with some mixers.
        rows: Their slots, counted from the block's first: int [r].
        there: Rows that hold something, bool [b, 1, 1, r]; None if all do.
        sources: What else they see.
        plan: Bookkeeping of one block.
        depth: Earlier layers at the same rows.
    """
    x, add = mixer.enter(params.mixing, carry, depth, 0)
    q, k, v, depth = project(config, mixer, params, x, depth)
    turns = frequencies(config, params.local)
    positions = rows if plan.position is None else plan.position[:, :, None] + rows
    own = Source(rotate(k, positions, turns), v, there)
    seen = rows <= rows[:, None]
    if there is not None:  # a row that holds nothing sees itself, as a query must see something
        seen = (seen & there) | jnp.eye(len(rows), dtype=bool)
    attended = attend(rotate(q, positions, turns), [*sources, own._replace(mask=seen)], config.attention_softcap)
    carry, depth = finish(config, mixer, params, x, add, attended, depth)
    return constrain(config.sharding, carry, "batch", None, None, None), own, depth

"""One layer over the blocks of a call (TransformerFAM, algorithms 1 and 2).

`layer` serves all schedules: given all blocks it is the layer schedule, given one block a step of the block schedule,
and of a diagonal of the wavefront. Tokens of all blocks are projected and attend in parallel; only the FAM rows go from
block to block. In a call shorter than a block it leaves out what the end of a block does to a layer's memory, which
`end_block` adds: few of such calls come to one, and it needs nothing of other layers but their FAM, so that all layers
do it side by side.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fam_jax import cudnn, rivals, sequence, splash
from fam_jax.config import DecoderConfig
from fam_jax.fam import FamInputs, earlier, scan_blocks
from fam_jax.ops import Source, attend, attend_by_block, rotate
from fam_jax.plan import Plan
from fam_jax.rope import frequencies
from fam_jax.sharding import constrain
from fam_jax.state import LayerMemory
from fam_jax.sublayers import LayerParams, finish, project
from lime_jax import Depth, Mixer
from lime_jax.depth import NO_DEPTH


def layer(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    carries: dict[str, Array],
    memory: LayerMemory,
    inputs: FamInputs | None,
    plan: Plan,
    depths: dict[str, Depth],
) -> tuple[dict[str, Array], LayerMemory, Array, dict[str, tuple[Array, ...]]]:
    """Runs one layer.

    Args:
        config: The decoder's.
        mixer: What the layer reads of earlier layers.
        params: The layer's weights, in the type of the activations, gathered (see `fam_jax.sharding`).
        carries: What the layer before left, of `tokens` in windows: [b, n, w, d], more axes with some mixers. `w` is
            the block size, or less if `n` is 1. RMT and AutoCompressors, of which `n` is 1, add the rows that they
            `read` and `write` (see `fam_jax.rivals`).
        memory: What the layer remembers of earlier calls.
        inputs: Start of the FAM and its noise; None without a FAM.
        plan: Bookkeeping of the same blocks.
        depths: Earlier layers, at the rows of the carries and at the `fam` rows as they entered each block; none
            without mixing.

    Returns:
        What goes to the next layer; what this layer remembers now; the FAM that Random State Passing keeps [f, d]; what
        later layers may read, slots by name of their bank. In windows shorter than a block, `end_block` has the memory
        and the FAM to keep of those that are complete.
    """
    rules = config.sharding
    depth, fam_depth = (depths.get(name, NO_DEPTH) for name in ("tokens", "fam"))
    x, add = mixer.enter(params.mixing, carries["tokens"], depth, 0)
    windows = x.shape[1]
    q, k, v, depth = project(config, mixer, params, x, depth)
    k, v = _fill(k, memory.open_k, plan), _fill(v, memory.open_v, plan)
    q = constrain(rules, q, "batch", "block", None, "heads", None)
    k, v = (constrain(rules, part, "batch", "block", None, "kv_heads", None) for part in (k, v))

    q, (own, *segments), all_k, all_v = seen_blocks(config, params, memory, q, k, v, plan)
    kept = jnp.zeros(memory.fam.shape[1:], memory.fam.dtype)
    block, rest = own._replace(mask=None), list[Source]()
    slots_of: dict[str, tuple[Array, ...]] = {"fam": ()}
    if inputs is not None:
        rest, memory, kept, slots_of["fam"] = _fam(
            config, mixer, params, memory, inputs, block, plan, fam_depth, updates=plan.slot is None
        )
    rows: dict[str, Array] = {}
    if "read" in carries:
        rows, slots_of, read = _memory_rows(config, mixer, params, carries, block, plan, depths)
        rest = [read]
    if splash.chosen(config) and plan.slot is None:
        attended = splash.attend_blocks(rules, q, block, rest, segments, plan.segments, config.attention_softcap)
    elif cudnn.chosen(config) and plan.slot is None and sequence.devices() == 1:
        attended = cudnn.attend_blocks(q, block, rest, segments, plan.segments)
    else:
        attention = attend_by_block if config.remat != "none" and windows > 1 else attend
        attended = attention(q, [own, *segments, *rest], config.attention_softcap)
    carry, depth = finish(config, mixer, params, x, add, attended, depth)
    carry = constrain(rules, carry, "batch", "block", None, None)

    every = {"open_k": all_k, "open_v": all_v}
    if memory.output_k is not None and memory.output_v is not None:
        output_k, output_v = rivals.of_outputs(config, mixer, params, carry)
        every["output_k"] = _behind(memory.segment_k, _fill(output_k, memory.output_k, plan))
        every["output_v"] = _behind(memory.segment_v, _fill(output_v, memory.output_v, plan))
    if plan.slot is None:
        memory = _advance_all(config, memory, every, plan)
    else:
        memory = memory._replace(**{name: blocks[:, -1] for name, blocks in every.items()})
    return {"tokens": carry, **rows}, memory, kept, {"tokens": depth.own, **slots_of}


def end_block(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    memory: LayerMemory,
    inputs: FamInputs | None,
    plan: Plan,
    depth: Depth,
) -> tuple[LayerMemory, Array]:
    """Updates the FAM, and makes the open block the latest segment, in the rows whose block is complete.

    Args:
        config: The decoder's.
        mixer: What the layer reads of earlier layers.
        params: The layer's weights.
        memory: What `layer` left of a window shorter than a block.
        inputs: Start of the FAM and its noise; None without a FAM.
        plan: Bookkeeping of the same window.
        depth: Earlier layers at the FAM rows as they entered the block.

    Returns:
        What the layer remembers now, and the FAM that Random State Passing keeps [f, d].
    """
    kept = jnp.zeros(memory.fam.shape[1:], memory.fam.dtype)
    every = {
        name: _behind(getattr(memory, f"segment_{name[-1]}"), opened[:, None])
        for name in ("open_k", "open_v", "output_k", "output_v")
        if (opened := getattr(memory, name)) is not None
    }
    if inputs is not None:
        block = Source(_turned(config, params, plan, memory.open_k[:, None]), memory.open_v[:, None])
        _, memory, kept, _ = _fam(config, mixer, params, memory, inputs, block, plan, depth, updates=True)
    return _advance_all(config, memory, every, plan), kept


def seen_blocks(
    config: DecoderConfig, params: LayerParams, memory: LayerMemory, q: Array, k: Array, v: Array, plan: Plan
) -> tuple[Array, list[Source], Array, Array]:
    """What tokens see of their own block and of the past ones.

    Args:
        config: The decoder's.
        params: The layer's weights.
        memory: What the layer remembers of earlier calls.
        q: Queries of tokens in windows, not rotated yet: [b, n, w, h, k].
        k: Keys of the blocks, not rotated yet: [b, n, c, g, k].
        v: Their values.
        plan: Bookkeeping of the blocks.

    Returns:
        Rotated queries; keys and values of the own block and of those before it, the latest first; and keys, not
        rotated, and values of the segments before the blocks and of the blocks: [b, m + n, c, g, k].
    """
    windows, width, size = q.shape[1], q.shape[2], k.shape[2]
    slots = jnp.arange(size)
    query_slots = jnp.arange(width) + (0 if plan.slot is None else plan.slot[:, :, None])
    start = 0 if plan.position is None else plan.position[:, :, None]
    window = _window(config, params.local)
    q = rotate(q, start + query_slots, frequencies(config, params.local))
    seen = slots <= query_slots[..., None]
    if window is not None:
        seen &= query_slots[..., None] - slots < window
    own = Source(_turned(config, params, plan, k), v, seen)

    all_k, all_v = _behind(memory.segment_k, k), _behind(memory.segment_v, v)
    sources = [own]
    for back in range(1, config.segments + 1):
        first = config.segments - back
        blocks = slice(first, first + windows)
        k, v, mask = _segment(config, all_k[:, blocks], all_v[:, blocks], back, query_slots, window, plan)
        sources.append(Source(_turned(config, params, plan, k, back), v, mask))
    return q, sources, all_k, all_v


def _fam(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    memory: LayerMemory,
    inputs: FamInputs,
    block: Source,
    plan: Plan,
    depth: Depth,
    *,
    updates: bool,
) -> tuple[list[Source], LayerMemory, Array, tuple[Array, ...]]:
    """The FAM over the blocks of a call, if this layer has one; see `scan_blocks`.

    Returns:
        What tokens see of it; the layer's memory with the FAM that it is left with; the FAM that Random State Passing
        keeps [f, d]; what later layers may read of it.
    """
    rows_mixer = mixer if mixer.mixes_rows else Mixer(None, mixer.shape)
    # All layers are one program: without a FAM, one never takes the update, and its tokens do not see the start.
    taken = plan if inputs.active is None else dataclasses.replace(plan, complete=plan.complete & inputs.active)
    fam, source, kept, slots, k = scan_blocks(
        config, rows_mixer, params, memory.fam, inputs, block, taken, depth, updates=updates
    )
    left, sources = memory._replace(fam=fam), [source]
    if memory.fam_k is not None and memory.fam_v is not None and k is not None:
        k, v = _behind(memory.fam_k, k), _behind(memory.fam_v, source.v)
        sources += earlier(config, frequencies(config, params.local), k, v, plan)
        if updates:
            done, count = _done(plan), memory.fam_k.shape[1]
            left = left._replace(fam_k=_advance(k, done, count)[0], fam_v=_advance(v, done, count)[0])
    if inputs.active is not None:
        seen = jnp.broadcast_to(inputs.active, (1, len(plan.index), 1, 1))
        sources = [one._replace(mask=seen if one.mask is None else one.mask & seen) for one in sources]
    return sources, left, kept, slots


def _memory_rows(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    carries: dict[str, Array],
    block: Source,
    plan: Plan,
    depths: dict[str, Depth],
) -> tuple[dict[str, Array], dict[str, tuple[Array, ...]], Source]:
    """The rows that RMT and AutoCompressors read and write; see `fam_jax.rivals`.

    Returns:
        The rows as they leave this layer, what later layers may read of them, and what tokens see.
    """
    read, source, depth = rivals.read(config, mixer, params, carries["read"], plan, depths.get("read", NO_DEPTH))

    def write():
        start = depths.get("write", NO_DEPTH)
        written, depth = rivals.write(config, mixer, params, carries["write"], [source, block], plan, start)
        return written, depth.own

    # In a call shorter than a block, the rule is that no block ends.
    written, own = write() if plan.slot is None else _or_zeros(jnp.any(plan.complete), write)
    return {"read": read, "write": written}, {"read": depth.own, "write": own}, source


def _or_zeros(wanted: Array, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, or zeros, without computing it."""
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(wanted, compute, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))


def _fill(new: Array, opened: Array, plan: Plan) -> Array:
    """Keys or values of whole blocks: new ones [b, n, w, g, k], and those of the open block [b, c, g, k].

    Slots that hold no token yet are zero, so that a state does not depend on what padding was read.
    """
    size = opened.shape[1]
    slots = jnp.arange(size)
    if plan.slot is not None:
        column = jnp.clip(slots - plan.slot[:, :, None], 0, new.shape[2] - 1)
        new = jnp.take_along_axis(new, column[..., None, None], axis=2)
    first, end = plan.first[:, :, None], plan.end[:, :, None]
    new = jnp.where(((slots >= first) & (slots < end))[..., None, None], new, 0)
    old = jnp.where((slots < plan.first[:, :1, None])[..., None, None], opened[:, None], 0)
    return new.at[:, :1].add(old)


def _window(config: DecoderConfig, local: Array | None) -> Array | int | None:
    """A token sees only keys less than this many tokens back; None if it sees all."""
    limit = None if config.memory is None else config.memory.window
    if local is None:
        return limit
    assert config.local_window is not None
    most = np.iinfo(np.int32).max if limit is None else limit
    return jnp.where(local, min(config.local_window, most), most)


def _segment(
    config: DecoderConfig, k: Array, v: Array, back: int, query_slots: Array, window: Array | int | None, plan: Plan
) -> Source:
    """Keys, not rotated yet, and values [b, n, c, g, k] of the block `back` blocks before each block."""
    memory = config.memory
    assert memory is not None
    if memory.stop_gradient:
        k, v = jax.lax.stop_gradient((k, v))
    slots = jnp.arange(k.shape[2]) - back * k.shape[2]
    mask = (back <= plan.segments)[:, :, None, None]
    if window is not None:
        mask = mask & (query_slots[..., None] - slots < window)
    return Source(k, v, mask)


def _turned(config: DecoderConfig, params: LayerParams, plan: Plan, k: Array, back: int = 0) -> Array:
    """Rotated keys, of [b, n, c, g, k], at their places `back` blocks before those of the plan."""
    start = 0 if plan.position is None else plan.position[:, :, None]
    slots = jnp.arange(k.shape[2]) - back * k.shape[2]
    return rotate(k, start + slots, frequencies(config, params.local))


def _behind(segments: Array, blocks: Array) -> Array:
    """The segments before the blocks of this device, and these, [b, n, c, g, k], as one: [b, m + n, c, g, k]."""
    return jnp.concatenate([sequence.before(segments, blocks), blocks], axis=1)


def _done(plan: Plan) -> Array:
    """Blocks that the call completes: int32 [b]."""
    return sequence.total(jnp.sum(plan.complete, axis=1))


def _advance_all(config: DecoderConfig, memory: LayerMemory, every: dict[str, Array], plan: Plan) -> LayerMemory:
    """What a layer remembers once the complete ones of its blocks are past.

    Args:
        config: The decoder's.
        memory: Before the blocks.
        every: Segments and blocks, see `_behind`, by the field of `memory` that holds the open block.
        plan: Bookkeeping of the blocks.
    """
    done, left = _done(plan), dict[str, Array]()
    for name, blocks in every.items():  # where there are keys of outputs, which come last, segments hold those
        left[f"segment_{name[-1]}"], left[name] = _advance(blocks, done, config.segments)
    return memory._replace(**left)


def _advance(blocks: Array, done: Array, segments: int) -> tuple[Array, Array]:
    """The segments and the open block once `done` blocks [b] are complete.

    Args:
        blocks: The segments before the blocks of this device, and these blocks: [b, m + n, c, g, k].
        done: Blocks that the call completed.
        segments: m.

    Returns:
        The last m complete blocks [b, m, c, g, k], and the one after them [b, c, g, k], zero if there is none.
    """
    count = blocks.shape[1]
    wanted = done[:, None] + jnp.arange(segments + 1) - sequence.number() * (count - segments)
    # Of the segments before, only the first device's are not another device's blocks.
    here = (wanted >= jnp.where(sequence.number() == 0, 0, segments)) & (wanted < count)
    latest = jnp.take_along_axis(blocks, jnp.clip(wanted, 0, count - 1)[:, :, None, None, None], axis=1)
    latest = sequence.total(jnp.where(here[:, :, None, None, None], latest, 0))
    return latest[:, :segments], latest[:, segments]

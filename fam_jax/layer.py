"""One layer over the blocks of a call (TransformerFAM, algorithms 1 and 2).

`layer` serves both schedules: given all blocks it is the layer schedule, given one block it is a step of the
block schedule. Tokens of all blocks are projected and attend in parallel; only the FAM rows go from
block to block.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fam_jax import sequence
from fam_jax.config import DecoderConfig
from fam_jax.fam import FamInputs, scan_blocks
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
    carry: Array,
    memory: LayerMemory,
    inputs: FamInputs | None,
    plan: Plan,
    depths: dict[str, Depth],
) -> tuple[Array, LayerMemory, Array, dict[str, tuple[Array, ...]]]:
    """Runs one layer.

    Args:
        config: The decoder's.
        mixer: What the layer reads of earlier layers.
        params: The layer's weights, in the type of the activations, gathered (see `fam_jax.sharding`).
        carry: What the layer before left, in windows: [b, n, w, d], more axes with some mixers. `w` is the block
            size, or less if `n` is 1.
        memory: What the layer remembers of earlier calls.
        inputs: Start of the FAM and its noise; None without a FAM.
        plan: Bookkeeping of the same blocks.
        depths: Earlier layers, at the `tokens` and at the `fam` rows as they entered each block; none without mixing.

    Returns:
        What goes to the next layer; what this layer remembers now; the FAM that Random State Passing keeps [f, d]; what
        later layers may read, slots by name of their bank.
    """
    rules = config.sharding
    depth, fam_depth = (depths.get(name, NO_DEPTH) for name in ("tokens", "fam"))
    x, add = mixer.enter(params.mixing, carry, depth, 0)
    _, windows, width, _ = x.shape
    size = memory.open_k.shape[1]
    q, k, v, depth = project(config, mixer, params, x, depth)
    k, v = _fill(k, memory.open_k, plan), _fill(v, memory.open_v, plan)
    q = constrain(rules, q, "batch", "block", None, "heads", None)
    k, v = (constrain(rules, part, "batch", "block", None, "kv_heads", None) for part in (k, v))

    slots = jnp.arange(size)
    query_slots = jnp.arange(width) + (0 if plan.slot is None else plan.slot[:, :, None])
    start = 0 if plan.position is None else plan.position[:, :, None]
    turns, window = frequencies(config, params.local), _window(config, params.local)
    q = rotate(q, start + query_slots, turns)
    seen = slots <= query_slots[..., None]
    if window is not None:
        seen &= query_slots[..., None] - slots < window
    own = Source(rotate(k, start + slots, turns), v, seen)

    all_k = jnp.concatenate([sequence.before(memory.segment_k, k), k], axis=1)
    all_v = jnp.concatenate([sequence.before(memory.segment_v, v), v], axis=1)
    sources = [own]
    for back in range(1, config.segments + 1):
        first = config.segments - back
        blocks = slice(first, first + windows)
        k, v, mask = _segment(config, all_k[:, blocks], all_v[:, blocks], back, query_slots, window, plan)
        sources.append(Source(rotate(k, start + slots - back * size, turns), v, mask))

    kept = jnp.zeros(memory.fam.shape[1:], memory.fam.dtype)
    fam = memory.fam
    fam_slots: tuple[Array, ...] = ()
    if inputs is not None:
        rows_mixer = mixer if mixer.mixes_rows else Mixer(None, mixer.shape)
        fam, fam_source, kept, fam_slots = scan_blocks(
            config,
            rows_mixer,
            params,
            fam,
            inputs,
            Source(own.k, own.v),
            plan,
            fam_depth,
            skip_incomplete=width < size,
        )
        sources.append(fam_source)
    attention = attend_by_block if config.remat != "none" and windows > 1 else attend
    attended = attention(q, sources, config.attention_softcap)
    carry, depth = finish(config, mixer, params, x, add, attended, depth)
    carry = constrain(rules, carry, "batch", "block", None, None)

    done = sequence.total(jnp.sum(plan.complete, axis=1))
    segment_k, open_k = _advance(all_k, done, config.segments)
    segment_v, open_v = _advance(all_v, done, config.segments)
    remembered = LayerMemory(segment_k, segment_v, open_k, open_v, fam)
    return carry, remembered, kept, {"tokens": depth.own, "fam": fam_slots}


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

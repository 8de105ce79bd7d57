"""Which token goes into which block: the bookkeeping of one call, worked out once for all layers.

Rows of a batch stand at different offsets in their open blocks, have different lengths, and start documents
at different blocks. A `Plan` turns this into arrays over (row, block), so that the layers need no other
knowledge, and the schedules cannot disagree about it.

Tokens are laid out in windows, one per block that the call can touch. A call of at least a block uses windows
of a whole block, column c being slot c of the block. A shorter call uses windows of its own length, the
first column being the row's next free slot; two of them, because the tokens may run over a block's end.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from fam_jax.call import Call
from fam_jax.config import DecoderConfig


@struct.dataclass
class Plan:
    """Per row and block of a call, arrays [b, n] unless stated; `None` means zero everywhere.

    Attributes:
        index: Number of the block within the call: int32 [n].
        slot: Slot of the window's first column. None with windows of a whole block.
        first: Slots below this one were filled by earlier calls.
        end: Slots from this one on are empty after the call.
        complete: The call fills the block: FAM is updated and the block becomes a memory segment.
        fresh: The FAM that enters the block is the learned prompt.
        passed: A document starts here from the FAM stored by Random State Passing.
        segments: Memory segments that belong to the same document.
        position: Absolute position of slot 0, float32. None with local positions.
        store: Random State Passing keeps row 0's FAM after this block: bool [n].
        blocks: Complete blocks of the same document before this one, int32. None if only memory segments ask for it.
    """

    index: Array
    slot: Array | None
    first: Array
    end: Array
    complete: Array
    fresh: Array
    passed: Array
    segments: Array
    position: Array | None
    store: Array
    blocks: Array | None = None

    def per_block(self) -> "Plan":
        """Plans of one block each, stacked over a new leading axis."""

        def split(leaf):
            return leaf[:, None] if leaf.ndim == 1 else jnp.moveaxis(leaf, 1, 0)[:, :, None]

        return jax.tree.map(split, self)


@struct.dataclass
class Layout:
    """Where the tokens of a call go, and the counters of `StreamState` after it.

    Attributes:
        source: Token of each window column: int32 [b, n, w]; clipped into range where there is none.
        target: Window column of each token, counted over all windows: int32 [b, t]. None if it is 0, 1, 2, ...
        counters: `fresh`, `offset`, `blocks` and `shift` after the call, each [b].
        overflow: The row has more tokens than full attention's cache holds: bool [b].
    """

    source: Array
    target: Array | None
    counters: dict[str, Array]
    overflow: Array


def num_windows(time: int, block_size: int, aligned: bool) -> int:
    """Blocks that `time` tokens can touch; one more if the open block may already hold some."""
    slack = 0 if aligned else block_size - 1
    return max(1, -(-(time + slack) // block_size))


def make_plan(config: DecoderConfig, call: Call, *, key: Array | None, rsp_valid: Array | None) -> tuple[Plan, Layout]:
    """Works out a call.

    Args:
        config: The decoder's.
        call: The arguments; of the state only the counters are read.
        key: Draws the RSP coin and the position offset; None for neither.
        rsp_valid: bool []; there is a stored FAM. None if the caller passes none.

    Returns:
        The plan of the blocks and the layout of the tokens.
    """
    memory, state = config.memory, call.state
    size = state.open_k.shape[2]
    time = max(call.tokens.shape[1], 1)  # a call without tokens is laid out as one of padding
    windows = 1 if memory is None else num_windows(time, size, call.aligned)
    whole_blocks = time >= size
    width = size if whole_blocks else time
    number = jnp.arange(windows + 1)  # one more than there are: the block that is open after the call

    missing = windows - call.reset.shape[1]
    reset = jnp.pad(call.reset, ((0, 0), (0, missing + 1)))
    padded = jnp.pad(call.padded, ((0, 0), (0, missing)))
    begin = jnp.where(reset[:, 0], 0, state.offset)
    total = begin + call.lengths
    reset &= total[:, None] >= number * size  # a row that does not get as far as a block does not reset there

    # Full attention is one block that never ends.
    open_block = total // size if memory is not None else jnp.zeros_like(total)
    offset = total - open_block * size
    first = jnp.where(number == 0, begin[:, None], 0)
    end = jnp.clip(total[:, None] - number * size, 0, size)
    # A row that is through before the others adds nothing to the block that it leaves open.
    through = number > open_block[:, None]
    first, end = (jnp.where(through, offset[:, None], edge) for edge in (first, end))
    complete = (end == size) & (memory is not None)

    last_reset = jax.lax.cummax(jnp.where(reset, number, -1), axis=1)
    blocks = jnp.where(last_reset >= 0, number - last_reset, state.blocks[:, None] + number)
    passed = jnp.zeros_like(reset)
    if key is not None and rsp_valid is not None and memory is not None and memory.rsp > 0:
        coin = jax.random.bernoulli(jax.random.fold_in(key, 0), memory.rsp, reset.shape)
        passed = reset & coin & rsp_valid
    fresh = jnp.where(reset, ~passed, (number == 0) & state.fresh[:, None])

    shift = jnp.broadcast_to(state.shift[:, None], reset.shape)
    drawn = jnp.zeros_like(shift)
    if key is not None and memory is not None and memory.rpo:
        drawn = _random_offsets(jax.random.fold_in(key, 1), reset.shape, config.rope_base)
    shift = jnp.where(last_reset >= 0, jnp.take_along_axis(drawn, jnp.maximum(last_reset, 0), axis=1), shift)

    def after(array):  # the value for the block that is open after the call
        return jnp.take_along_axis(array, open_block[:, None], axis=1)[:, 0]

    counters = {
        "fresh": after(fresh),
        "offset": offset.astype(jnp.int32),
        "blocks": after(blocks).astype(jnp.int32),
        "shift": after(shift),
    }
    absolute = memory is not None and memory.positions == "absolute"
    counted = memory is not None and (memory.fam_blocks > 1 or memory.kept_summaries > 0)
    storable = jnp.where(complete[0, :-1] & ~padded[0], number[:-1], -1)
    plan = Plan(
        index=number[:-1],
        slot=None if whole_blocks else first[:, :-1],
        first=first[:, :-1],
        end=end[:, :-1],
        complete=complete[:, :-1],
        fresh=fresh[:, :-1],
        passed=passed[:, :-1],
        segments=jnp.minimum(blocks, config.segments)[:, :-1],
        position=(shift + blocks.astype(jnp.float32) * size)[:, :-1] if absolute else None,
        store=(storable == jnp.max(storable)) & (storable >= 0),
        blocks=blocks[:, :-1] if counted else None,
    )
    source, target = _token_layout(plan, begin, time, size, width, call.aligned)
    return plan, Layout(source=source, target=target, counters=counters, overflow=(total > size) & (memory is None))


def _random_offsets(key: Array, shape: tuple[int, ...], rope_base: float) -> Array:
    """Uniform up to the longest rotary wavelength, and zero half of the time (appendix B.2.2)."""
    size_key, coin_key = jax.random.split(key)
    longest = 2 * np.pi * rope_base
    return jax.random.uniform(size_key, shape, maxval=longest) * jax.random.bernoulli(coin_key, 0.5, shape)


def _token_layout(
    plan: Plan, begin: Array, time: int, size: int, width: int, aligned: bool
) -> tuple[Array, Array | None]:
    """`source` and `target` of the layout."""
    windows = plan.index.shape[0]
    slot = jnp.zeros_like(plan.first) if plan.slot is None else plan.slot
    offset = plan.index * size + slot - begin[:, None]
    source = offset[:, :, None] + jnp.arange(width)
    source = jnp.clip(source, 0, time - 1)
    if aligned or (windows == 1 and width < size):
        return source, None  # token i is in column i
    place = begin[:, None] + jnp.arange(time)
    window = place // size
    column = place % size - jnp.take_along_axis(slot, jnp.minimum(window, windows - 1), axis=1)
    return source, jnp.clip(window * width + column, 0, windows * width - 1)

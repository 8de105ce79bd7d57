"""The streaming state: all that a decoder remembers of what it has read, as a value."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from fam_jax.config import DecoderConfig


class LayerMemory(NamedTuple):
    """What one layer remembers; the fields of `StreamState` of the same names without the layer axis.

    Of `summaries` there is one for all layers.
    """

    segment_k: Array
    segment_v: Array
    open_k: Array
    open_v: Array
    fam: Array
    fam_k: Array | None = None
    fam_v: Array | None = None
    output_k: Array | None = None
    output_v: Array | None = None
    summaries: Array | None = None


@struct.dataclass
class StreamState:
    """State of `batch` rows that have each read some text. Its size does not depend on how much.

    With `b` rows, `l` layers, `m` memory segments, blocks of `c` tokens, `f` FAM rows, `g` key/value heads of
    width `k` and model width `d`. Keys are cached before the rotary rotation, so that they can be rotated
    by their distance to the block that reads them.

    Attributes:
        segment_k: Keys of the last complete blocks, oldest first: [l, b, m, c, g, k].
        segment_v: Their values: [l, b, m, c, g, k].
        open_k: Keys of the block that is not complete yet; zero where nothing is: [l, b, c, g, k]. With full
            attention it is the whole cache, `c` being its capacity.
        open_v: Its values: [l, b, c, g, k].
        fam: FAM of each layer after the last complete block: [l, b, f, d].
        fresh: bool [b]; this row's FAM is still the learned prompt, whatever `fam` holds.
        offset: Tokens in the open block: int32 [b].
        blocks: Complete blocks since the document began: int32 [b].
        shift: Random Position Offset of the row's document, in tokens: float32 [b].
        fam_k: Keys of the FAM that entered the latest complete blocks, oldest first, if tokens see more than one FAM:
            [l, b, fam_blocks - 1, f, g, k]. This and all that follows is None in a memory that has no use for it.
        fam_v: Their values.
        output_k: Keys that the layer makes of its own outputs in the open block, for Feedback Memory, whose segments
            hold such keys: [l, b, c, g, k].
        output_v: The values.
        summaries: Outputs of the last layer at the memory rows of the latest complete blocks, oldest first, of RMT (one
            block) and AutoCompressors (s): [b, s, f, d].
    """

    segment_k: Array
    segment_v: Array
    open_k: Array
    open_v: Array
    fam: Array
    fresh: Array
    offset: Array
    blocks: Array
    shift: Array
    fam_k: Array | None = None
    fam_v: Array | None = None
    output_k: Array | None = None
    output_v: Array | None = None
    summaries: Array | None = None

    # For `fam_jax.sharding`.
    logical_axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "segment_k": (None, "batch", None, None, "kv_heads", None),
        "segment_v": (None, "batch", None, None, "kv_heads", None),
        "open_k": (None, "batch", None, "kv_heads", None),
        "open_v": (None, "batch", None, "kv_heads", None),
        "fam": (None, "batch", None, None),
        "fresh": ("batch",),
        "offset": ("batch",),
        "blocks": ("batch",),
        "shift": ("batch",),
        "fam_k": (None, "batch", None, None, "kv_heads", None),
        "fam_v": (None, "batch", None, None, "kv_heads", None),
        "output_k": (None, "batch", None, "kv_heads", None),
        "output_v": (None, "batch", None, "kv_heads", None),
        "summaries": ("batch", None, None, None),
    }

    @property
    def layers(self) -> LayerMemory:
        """The part that belongs to layers, each field stacked over layers, and the summaries."""
        return LayerMemory(**{name: getattr(self, name) for name in LayerMemory._fields})

    def forget(self) -> "StreamState":
        """With zeros for the FAM, or for what a rival carries in its place; segments stay. For controls."""
        names = ("fam", "fam_k", "fam_v", "summaries")
        return dataclasses.replace(
            self, **{name: jnp.zeros_like(old) for name in names if (old := getattr(self, name)) is not None}
        )

    def restart(self) -> "StreamState":
        """With the FAM as at a text's beginning; segments and positions stay. For controls."""
        return dataclasses.replace(self, fresh=jnp.ones_like(self.fresh))

    def rows(self, indices: ArrayLike | slice) -> "StreamState":
        """The state of the given rows, in this order; repeat an index to ask one document many questions.

        Args:
            indices: int [rows]; a slice is fine too.

        Raises:
            ValueError: Indices are not a list of row numbers, or there is no such row.
        """
        index = indices if isinstance(indices, slice) else jnp.asarray(indices)
        if isinstance(index, jax.Array):
            rows = len(self.offset)
            if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
                raise ValueError(f"indices={indices!r} is not allowed; give a slice or a list of row numbers")
            if not isinstance(index, jax.core.Tracer) and bool(jnp.any((index < -rows) | (index >= rows))):
                raise ValueError(f"indices={indices!r} is not allowed; the state has {rows} rows")
        layers = jax.tree.map(lambda leaf: leaf[:, index], self.layers._replace(summaries=None))
        if self.summaries is not None:
            layers = layers._replace(summaries=self.summaries[index])
        return dataclasses.replace(
            self,
            **layers._asdict(),
            fresh=self.fresh[index],
            offset=self.offset[index],
            blocks=self.blocks[index],
            shift=self.shift[index],
        )


@struct.dataclass
class RSPState:
    """The FAM that Random State Passing keeps from step to step (TransformerFAM, appendix B.2.3).

    Attributes:
        fam: FAM of every layer after some earlier step: [l, f, d].
        valid: bool []; False until a first one has been stored.
    """

    fam: Array
    valid: Array

    logical_axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"fam": (None, None, "embed"), "valid": ()}

    @classmethod
    def zeros(cls, config: DecoderConfig) -> "RSPState":
        """The state before any training step. Raises ValueError if the model has no FAM."""
        if not config.fam_length:
            raise ValueError("Random State Passing stores the FAM, but this model has fam_length=0")
        shape = (config.num_layers, config.fam_length, config.d_model)
        return cls(fam=jnp.zeros(shape, config.dtype), valid=jnp.zeros((), bool))


def init_state(config: DecoderConfig, batch: int, max_length: int | None = None) -> StreamState:
    """State of rows that have read nothing.

    Args:
        config: The decoder's.
        batch: Rows.
        max_length: Capacity of the cache in tokens. Needed with full attention and refused otherwise: a block
            memory has no limit.

    Raises:
        ValueError: `batch` or `max_length` is missing or impossible.
    """
    if not _is_count(batch):
        raise ValueError(f"batch={batch!r} is not allowed; a state needs a whole number of rows, at least one")
    if config.memory is None:
        if not _is_count(max_length):
            raise ValueError(
                f"max_length={max_length!r} is not allowed; with full attention (memory=None) give the whole "
                "number of tokens that the cache must hold"
            )
        capacity = max_length
    else:
        if max_length is not None:
            raise ValueError(
                f"max_length={max_length!r} has no meaning with a block memory, which reads any length; leave it out"
            )
        capacity = config.memory.block_size
    keys = (capacity, config.num_kv_heads, config.head_dim)
    open_shape = (config.num_layers, batch, *keys)
    segment_shape = (config.num_layers, batch, config.segments, *keys)
    memory, rest = config.memory, dict[str, tuple[int, ...]]()
    if memory is not None and memory.fam_blocks > 1:
        rest = dict.fromkeys(("fam_k", "fam_v"), (memory.fam_blocks - 1, memory.rows, *keys[1:]))
    if memory is not None and memory.kind == "feedback":
        rest = dict.fromkeys(("output_k", "output_v"), (memory.block_size, *keys[1:]))
    more = {name: jnp.zeros((config.num_layers, batch, *shape), config.dtype) for name, shape in rest.items()}
    if memory is not None and memory.kept_summaries:
        shape = (batch, memory.kept_summaries, memory.fam_length, config.d_model)
        more["summaries"] = jnp.zeros(shape, config.dtype)
    # A FAM-less model has a FAM of no rows: the same code and the same tree serve both.
    fam_shape = (config.num_layers, batch, config.fam_length, config.d_model)
    return StreamState(
        segment_k=jnp.zeros(segment_shape, config.dtype),
        segment_v=jnp.zeros(segment_shape, config.dtype),
        open_k=jnp.zeros(open_shape, config.dtype),
        open_v=jnp.zeros(open_shape, config.dtype),
        fam=jnp.zeros(fam_shape, config.dtype),
        fresh=jnp.ones((batch,), bool),
        offset=jnp.zeros((batch,), jnp.int32),
        blocks=jnp.zeros((batch,), jnp.int32),
        shift=jnp.zeros((batch,), jnp.float32),
        **more,
    )


def check_state(config: DecoderConfig, state: StreamState, batch: int) -> None:
    """Raises a ValueError, naming the field, unless `state` fits the model and the number of rows."""
    if not isinstance(state, StreamState):
        raise ValueError(f"state is a {type(state).__name__}; pass the `state` of an earlier call or of init_state")
    capacity = state.open_k.shape[2] if config.memory is None else None
    expected = jax.eval_shape(lambda: init_state(config, batch, capacity))
    for field, want in expected.__dict__.items():
        have = getattr(state, field)
        if want is None and have is not None:
            raise ValueError(
                f"state.{field} is {describe(have)}, but this model's memory has none; pass the state of that config"
            )
        if want is not None and (getattr(have, "shape", None) != want.shape or have.dtype != want.dtype):
            raise ValueError(
                f"state.{field} is {describe(have)}, but this model and {batch} rows of tokens need "
                f"{describe(want)}; pass the state of the same config and batch"
            )


def check_rsp(config: DecoderConfig, rsp: RSPState) -> None:
    """Raises a ValueError, naming the field, unless `rsp` fits the model; its FAM may have any floating type."""
    if not isinstance(rsp, RSPState):
        raise ValueError(
            f"rsp is a {type(rsp).__name__}; pass RSPState.zeros(config) at first, then the `rsp` of an earlier call"
        )
    if not config.fam_length:
        raise ValueError("rsp was given, but this model has no FAM to start from it; leave it out")
    expected = jax.eval_shape(lambda: RSPState.zeros(config))
    for field, want, kind in (("fam", expected.fam, jnp.floating), ("valid", expected.valid, jnp.bool_)):
        have = getattr(rsp, field)
        if np.shape(have) != want.shape or not jnp.issubdtype(jnp.result_type(have), kind):
            raise ValueError(
                f"rsp.{field} is {describe(have)}, but this model needs {describe(want)}; begin with "
                "RSPState.zeros(config)"
            )


def describe(value: Any) -> str:
    """Type and shape of an array for a message; of anything else the name of its type."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return type(value).__name__
    return f"{value.dtype}{list(value.shape)}"


def _is_count(value: Any) -> bool:
    """Whether a number of rows or tokens is one. A dimension that `jax.export` leaves open is."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return jax.export.is_symbolic_dim(value) or (whole and value >= 1)

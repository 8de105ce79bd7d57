"""The arguments of a call of the decoder: checked, and filled in where they were left out."""

import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fam_jax.config import DecoderConfig
from fam_jax.state import StreamState, check_state, describe, init_state


class Call(NamedTuple):
    """What `Decoder.__call__` was given, complete.

    Attributes:
        tokens: int [b, t].
        state: Where rows stand.
        lengths: Real tokens of each row: int32 [b].
        reset: The row starts a document at this block: bool [b, ceil(t / block)].
        padded: The block ends in padding: bool [b, ceil(t / block)].
        aligned: No row has tokens in its open block.
    """

    tokens: Array
    state: StreamState
    lengths: Array
    reset: Array
    padded: Array
    aligned: bool


def check_call(
    config: DecoderConfig,
    tokens: Any,
    state: StreamState | None,
    lengths: Any,
    reset: Any,
    padded: Any,
    aligned: bool,
) -> Call:
    """Checks the arguments of `Decoder.__call__`; what only a device knows is checked where it is known.

    Raises:
        ValueError: An argument has a wrong type, shape or value. The message names it and what is needed.
    """
    if jnp.dtype(config.dtype) == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError("dtype='float64' needs jax.config.update('jax_enable_x64', True); without, JAX uses float32")
    tokens = as_array("tokens", tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integer ids of shape [batch, time], not {describe(tokens)}")
    if _known(tokens):
        check_ids(tokens, config.vocab_size)
    tokens = jnp.asarray(tokens)
    batch, time = tokens.shape
    full = config.memory is None
    starts = state is None
    if state is None:
        state = init_state(config, batch, max(time, 1) if full else None)
    else:
        check_state(config, state, batch)
    size = state.open_k.shape[2]
    shape = (batch, 1 if full else max(1, -(-time // size)))
    reset = _flags("reset", reset, shape, size)
    if starts:
        reset = reset.at[:, 0].set(True)
    padded = _flags("padded", padded, shape, size)

    lengths = jnp.full((batch,), time, jnp.int32) if lengths is None else as_array("lengths", lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths is {describe(lengths)}, but {batch} rows need int32{[batch]}")
    if not _known(lengths):
        lengths = jnp.clip(lengths, 0, time)
    elif bool(((lengths < 0) | (lengths > time)).any()):
        raise ValueError(f"lengths={lengths} is not allowed; each must be between 0 and the {time} columns of tokens")
    lengths = jnp.asarray(lengths, jnp.int32)
    begin = jnp.where(reset[:, 0], 0, state.offset)
    if aligned and _known(begin) and bool(jnp.any(begin > 0)):
        raise ValueError(f"aligned=True, but rows stand inside a block: state.offset={state.offset}; leave aligned out")
    if full and (time > size or (_known(begin, lengths) and bool(jnp.any(begin + lengths > size)))):
        after = f" after state.offset={state.offset}" if _known(begin) else ""
        raise ValueError(
            f"the cache of full attention holds {size} tokens, too few for {time} more{after}; begin with a larger "
            "state from init_state(batch, max_length=...)"
        )
    return Call(tokens, state, lengths, reset, padded, aligned or starts)


def check_targets(config: DecoderConfig, call: Call, targets: Any) -> Array:
    """The targets of a call's tokens as JAX array. Raises ValueError if they are not ids, one for each token."""
    targets = as_array("targets", targets)
    if targets.shape != call.tokens.shape or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets is {describe(targets)}, but tokens are int32{list(call.tokens.shape)}: each needs the id after it"
        )
    if _known(targets):
        check_ids(targets, config.vocab_size, "targets")
    return jnp.asarray(targets, jnp.int32)


def as_array(name: str, value: Any) -> Any:
    """An argument as it is if it is JAX's, or else as NumPy array. Raises ValueError if its rows differ in length."""
    if isinstance(value, jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(
            f"{name}={reprlib.repr(value)} is not allowed: its rows differ in length; pad rows of tokens on the "
            "right, and tell their `lengths`"
        ) from None


def check_ids(ids: Any, vocab_size: int, name: str = "tokens") -> np.ndarray:
    """Token ids as int32 NumPy array, checked on the host; a device cannot raise on an id outside its table.

    Raises:
        ValueError: Not integers, outside 0..vocab_size-1, or in rows that differ in length.
    """
    array = np.asarray(as_array(name, ids))
    if array.size == 0:  # an empty list has no integer type
        return array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: token ids must be integers, not {array.dtype}")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"{name}: token id {outside[0]} is outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}); "
            "use the tokenizer that the model was trained with"
        )
    return array.astype(np.int32)


def _flags(name: str, value: Any, shape: tuple[int, int], size: int) -> Array:
    """A flag per row and block; all False if left out."""
    flags = jnp.zeros(shape, bool) if value is None else as_array(name, value)
    if flags.shape != shape or flags.dtype != bool:
        raise ValueError(
            f"{name} is {describe(flags)}, but this call needs bool{list(shape)}: a flag for every row and block "
            f"of {size} tokens"
        )
    return jnp.asarray(flags)


def _known(*arrays: Array) -> bool:
    """Whether the values are known now, outside of `jax.jit` and other transformations."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)

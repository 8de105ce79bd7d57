"""Generation: greedy or sampled, batched, with the streaming state passed in and out."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.experimental import multihost_utils

from fam_jax.call import as_array, check_ids
from fam_jax.config import check_int
from fam_jax.decoder import Decoder
from fam_jax.state import StreamState, check_state


@struct.dataclass
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        ids: New tokens, int32 [b, max_new_tokens]. A row that stopped repeats its stop token.
        lengths: New tokens of each row, its stop token included: int32 [b].
        state: Has read the prompt and the new tokens, so the conversation can go on.
    """

    ids: Array
    lengths: Array
    state: StreamState


def generate(
    model: Decoder,
    variables: Any,
    prompt: Any,
    max_new_tokens: int,
    *,
    lengths: Any = None,
    state: StreamState | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    key: Array | None = None,
) -> GenerateOutput:
    """Continues each prompt.

    What a row gets does not depend on the rows beside it: sampling draws with its own key, `key` folded with the
    row's number.

    Args:
        model: The decoder.
        variables: Its parameters.
        prompt: Ids, int [b, t], t at least 1, right-padded if rows differ in length.
        max_new_tokens: Tokens to generate, at least 1.
        lengths: Real tokens of each prompt row, at least 1: int [b]. None: all.
        state: Where earlier reading stopped; None starts documents.
        temperature: 0 takes the most likely token; above, logits are divided by it before sampling.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the fewest most likely tokens that together have at least this probability.
        stop_tokens: Ids that end a row.
        key: Random key; needed if the temperature is above 0.

    Returns:
        New tokens and the state after them.

    Raises:
        ValueError: An argument is impossible, or a full-attention cache is too small for prompt and answer.
    """
    vocab = model.config.vocab_size
    prompt = check_ids(prompt, vocab, "prompt")
    if prompt.ndim != 2 or prompt.shape[1] == 0 or prompt.shape[0] == 0:
        raise ValueError(f"prompt must be of shape [batch, time] with at least one token, not {list(prompt.shape)}")
    batch, time = prompt.shape
    lengths = np.full(batch, time) if lengths is None else np.asarray(as_array("lengths", lengths))
    if lengths.shape != (batch,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths must be {batch} integers, one per row, not {lengths.dtype}{list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > time:
        raise ValueError(f"lengths={lengths.tolist()} is not allowed; each row needs 1 to {time} prompt tokens")
    check_int("generate", "max_new_tokens", max_new_tokens, 1)
    max_new_tokens = int(max_new_tokens)
    heat = _number(temperature)
    if not 0 <= heat < math.inf:
        raise ValueError(f"temperature={temperature!r} is not allowed; it must be 0 (greedy) or a positive number")
    if top_k is not None:
        check_int("generate", "top_k", top_k, 1)
        if top_k > vocab:
            raise ValueError(f"top_k={top_k} is not allowed; it must be at most the vocabulary, {vocab}")
        top_k = int(top_k)
    nucleus = None if top_p is None else _number(top_p)
    if nucleus is not None and not 0 < nucleus <= 1:
        raise ValueError(f"top_p={top_p!r} is not allowed; it must be above 0 and at most 1")
    if heat > 0 and key is None:
        raise ValueError(f"temperature={temperature!r} samples, which needs key=jax.random.key(seed)")
    stop = check_ids(stop_tokens, vocab, "stop_tokens")
    if stop.ndim != 1:
        raise ValueError(f"stop_tokens={stop_tokens!r} is not allowed; give a sequence of ids")
    state = _check_room(model, state, lengths, max_new_tokens)

    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(jnp.arange(batch))
    return _generate(
        model,
        max_new_tokens,
        heat == 0,
        top_k,
        nucleus,
        variables,
        jnp.asarray(prompt),
        jnp.asarray(lengths, jnp.int32),
        state,
        jnp.asarray(stop),
        jnp.float32(heat),
        keys,
    )


def _number(value: Any) -> float:
    """A number of any type as float; NaN for anything else, which no comparison admits."""
    try:
        return math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _on_host(x: Any) -> np.ndarray:
    """The whole array, also if parts of it are with other processes."""
    here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if here else multihost_utils.process_allgather(x, tiled=True))


def _check_room(model: Decoder, state: StreamState | None, lengths: np.ndarray, new: int) -> StreamState:
    """The state to start from, which fits the model; with full attention, one that is large enough."""
    batch = len(lengths)
    if state is not None:
        check_state(model.config, state, batch)
    if model.config.memory is not None:
        return model.init_state(batch) if state is None else state
    if state is None:
        return model.init_state(batch, int(lengths.max()) + new)
    needed, capacity = int((_on_host(state.offset) + lengths).max()) + new, state.open_k.shape[2]
    if needed > capacity:
        raise ValueError(
            f"the cache of full attention holds {capacity} tokens, but prompt and answer need {needed}; "
            f"begin with init_state(batch, max_length={needed}) or more"
        )
    return state


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(model, max_new_tokens, greedy, top_k, top_p, variables, prompt, lengths, state, stop, temperature, keys):
    # All but the last token of each prompt: nobody needs their logits, so that XLA never computes them.
    state = model.apply(variables, prompt, state, lengths=lengths - 1).state
    last = jnp.take_along_axis(prompt, (lengths - 1)[:, None], axis=1)[:, 0]
    batch = prompt.shape[0]

    def choose(logits, number):
        if greedy:
            return jnp.argmax(logits, axis=-1)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        return jax.vmap(jax.random.categorical)(step_keys, _filter(logits / temperature, top_k, top_p))

    def running(carry):
        *_, unread, _ = carry
        return jnp.any(unread)

    def step(carry):
        number, ids, count, state, token, unread, done = carry
        out = model.apply(variables, token[:, None], state, lengths=unread.astype(jnp.int32))
        token = choose(out.logits[:, 0], number).astype(jnp.int32)
        new = ~done & (number < max_new_tokens)
        ids = jnp.where((jnp.arange(max_new_tokens) >= number) & new[:, None], token[:, None], ids)
        done |= jnp.any(token[:, None] == stop, axis=1)
        return number + 1, ids, count + new, out.state, token, new, done

    carry = (
        0,
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        state,
        last,
        jnp.ones((batch,), bool),
        jnp.zeros((batch,), bool),
    )
    _, ids, count, state, *_ = jax.lax.while_loop(running, step, carry)
    return GenerateOutput(ids=ids, lengths=count, state=state)


def _filter(logits: Array, top_k: int | None, top_p: float | None) -> Array:
    """Sets the logits [b, v] that may not be sampled to -inf; ties at an edge stay in."""
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits

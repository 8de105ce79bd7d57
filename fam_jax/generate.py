"""Generation: greedy or sampled, batched, with the streaming state passed in and out."""

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
from fam_jax.checks import check_int
from fam_jax.decoder import Decoder
from fam_jax.sampling import Choice, check_choice, choose
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
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
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
        min_p: Sample among the tokens only that have at least this share of the most likely one's probability.
        repetition_penalty: Above 1, tokens of the prompt and of what is generated become less likely, greedy or not:
            their logits are divided by it, negative ones multiplied. What the state has read does not count.
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
    choice, heat = check_choice(vocab, temperature, top_k, top_p, min_p, repetition_penalty)
    if heat > 0 and key is None:
        raise ValueError(f"temperature={temperature!r} samples, which needs key=jax.random.key(seed)")
    stop = check_ids(stop_tokens, vocab, "stop_tokens")
    if stop.ndim != 1:
        raise ValueError(f"stop_tokens={stop_tokens!r} is not allowed; give a sequence of ids")
    state = _check_room(model, state, lengths, max_new_tokens, time)

    return _generate(
        model,
        max_new_tokens,
        choice,
        variables,
        jnp.asarray(prompt),
        jnp.asarray(lengths, jnp.int32),
        state,
        jnp.asarray(stop),
        jnp.float32(heat),
        row_keys(key, batch),
    )


def row_keys(key: Array | None, batch: int) -> Array:
    """The random key of each row, which does not depend on how many there are: [b]."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(0) if key is None else key))(jnp.arange(batch))


@struct.dataclass
class Writing:
    """Rows of text on their way, as a value: `write` adds a token to each.

    Attributes:
        state: Has read all tokens, but for the last of the rows that are unread.
        token: The last token of each row: int32 [b].
        unread: The state has not read it: bool [b].
        done: A stop token was the last: bool [b].
        number: Calls of `write` so far: int32 [].
        seen: Tokens that a repetition penalty counts: bool [b, v]; None without one.
    """

    state: StreamState
    token: Array
    unread: Array
    done: Array
    number: Array
    seen: Array | None

    @classmethod
    def begin(cls, state: StreamState, token: Array, seen: Array | None) -> "Writing":
        """Prompts of which the state has read all but the last token, int32 [b]."""
        ones = jnp.ones(token.shape, bool)
        return cls(state=state, token=token, unread=ones, done=~ones, number=jnp.int32(0), seen=seen)


def write(
    model: Decoder, choice: Choice, variables: Any, writing: Writing, limit: Any, stop: Array, heat: Array, keys: Array
) -> Writing:
    """Reads the last token of each row and chooses the next.

    Args:
        model: The decoder.
        choice: How the next token is chosen.
        variables: The model's parameters.
        writing: The rows so far.
        limit: Tokens that a row may get; at this number the last are read, and none is chosen any more: int32 [].
        stop: Ids that end a row: int32 [n].
        heat: Temperature: float32 [].
        keys: Random key of each row: [b].

    Returns:
        The rows with their new tokens: those that are unread have got one.
    """
    out: Any = model.apply(variables, writing.token[:, None], writing.state, lengths=writing.unread.astype(jnp.int32))
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, writing.number)
    token = choose(choice, out.logits[:, 0], writing.seen, heat, step_keys)
    new, seen = ~writing.done & (writing.number < limit), writing.seen
    if seen is not None:
        seen |= new[:, None] & jax.nn.one_hot(token, out.logits.shape[-1], dtype=bool)
    done = writing.done | jnp.any(token[:, None] == stop, axis=1)
    return Writing(state=out.state, token=token, unread=new, done=done, number=writing.number + 1, seen=seen)


def _on_host(x: Any) -> np.ndarray:
    """The whole array, also if parts of it are with other processes."""
    here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if here else multihost_utils.process_allgather(x, tiled=True))


def _check_room(model: Decoder, state: StreamState | None, lengths: np.ndarray, new: int, time: int) -> StreamState:
    """The state to start from, which fits the model; with full attention one for all `time` columns, padding too."""
    batch = len(lengths)
    if state is not None:
        check_state(model.config, state, batch)
    if model.config.memory is not None:
        return model.init_state(batch) if state is None else state
    if state is None:
        return model.init_state(batch, max(int(lengths.max()) + new, time))
    needed, capacity = int((_on_host(state.offset) + lengths).max()) + new, state.open_k.shape[2]
    if needed > capacity:
        raise ValueError(
            f"the cache of full attention holds {capacity} tokens, but prompt and answer need {needed}; "
            f"begin with init_state(batch, max_length={needed}) or more"
        )
    return state


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, max_new_tokens, choice, variables, prompt, lengths, state, stop, heat, keys):
    # All but the last token of each prompt: nobody needs their logits, so that XLA never computes them.
    state = model.apply(variables, prompt, state, lengths=lengths - 1).state
    last = jnp.take_along_axis(prompt, (lengths - 1)[:, None], axis=1)[:, 0]
    batch, time = prompt.shape
    seen = None
    if choice.penalty != 1:
        real = jnp.arange(time) < lengths[:, None]
        seen = jnp.zeros((batch, model.config.vocab_size), bool).at[jnp.arange(batch)[:, None], prompt].max(real)

    def running(carry):
        return jnp.any(carry[0].unread)

    def step(carry):
        writing, ids, count = carry
        number, writing = writing.number, write(model, choice, variables, writing, max_new_tokens, stop, heat, keys)
        new = writing.unread[:, None]
        # A row that has stopped repeats its last token.
        ids = jnp.where((jnp.arange(max_new_tokens) >= number) & new, writing.token[:, None], ids)
        return writing, ids, count + writing.unread

    carry = (
        Writing.begin(state, last, seen),
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )
    writing, ids, count = jax.lax.while_loop(running, step, carry)
    return GenerateOutput(ids=ids, lengths=count, state=writing.state)

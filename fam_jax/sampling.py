"""How the next token is chosen from the logits: greedy or sampled, with the usual filters."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fam_jax.checks import check_int


class Choice(NamedTuple):
    """A way to choose, as `fam_jax.generate` describes it; hashable, as programs are compiled for one.

    Attributes:
        greedy: Take the most likely token.
        top_k: See `fam_jax.generate`, so for the others.
        top_p: None is no limit, here and above and below.
        min_p: Of the most likely token's probability.
        penalty: `repetition_penalty`; 1 is none.
    """

    greedy: bool = True
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    penalty: float = 1.0


def check_choice(
    vocab: int, temperature: Any, top_k: Any, top_p: Any, min_p: Any, repetition_penalty: Any
) -> tuple[Choice, float]:
    """The choice that the arguments of `fam_jax.generate` describe, and the temperature.

    Raises:
        ValueError: One is impossible. The message names it and what is allowed.
    """
    heat = _number(temperature)
    if not 0 <= heat < math.inf:
        raise ValueError(f"temperature={temperature!r} is not allowed; it must be 0 (greedy) or a positive number")
    if top_k is not None:
        check_int("generate", "top_k", top_k, 1)
        if top_k > vocab:
            raise ValueError(f"top_k={top_k} is not allowed; it must be at most the vocabulary, {vocab}")
        top_k = int(top_k)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0 < _number(share) <= 1:
            raise ValueError(f"{name}={share!r} is not allowed; it must be above 0 and at most 1")
    penalty = _number(repetition_penalty)
    if not 0 < penalty < math.inf:
        raise ValueError(
            f"repetition_penalty={repetition_penalty!r} is not allowed; it must be above 0 (1 is none, 1.1 a little)"
        )
    nucleus, least = (None if share is None else _number(share) for share in (top_p, min_p))
    return Choice(heat == 0, top_k, nucleus, least, penalty), heat


def choose(choice: Choice, logits: Array, seen: Array | None, temperature: Array, keys: Array) -> Array:
    """The next token of each row: int32 [b].

    Args:
        choice: How.
        logits: Of the next token: [b, v].
        seen: Tokens that the penalty counts: bool [b, v]; None without one.
        temperature: Logits are divided by it before sampling: [].
        keys: Random key of each row: [b].
    """
    if seen is not None:
        logits = penalise(logits, seen, choice.penalty)
    if choice.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_likely(logits / temperature, choice)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def penalise(logits: Array, seen: Array, penalty: float) -> Array:
    """Logits [b, v] with those of seen tokens, bool [b, v], made less likely, as CTRL (arXiv:1909.05858, 4.1) does.

    A positive logit is divided by the penalty, a negative one multiplied with it, as everybody does since: the paper
    divides both, which makes a token of negative logit more likely.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_likely(logits: Array, choice: Choice) -> Array:
    """Sets the logits [b, v] that may not be sampled to -inf; ties at an edge stay in."""
    if choice.top_k is not None:
        smallest = jax.lax.top_k(logits, choice.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if choice.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < choice.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if choice.min_p is not None:
        smallest = jnp.max(logits, axis=-1, keepdims=True) + math.log(choice.min_p)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def _number(value: Any) -> float:
    """A number of any type as float; NaN for anything else, which no comparison admits."""
    try:
        return math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError):
        return math.nan

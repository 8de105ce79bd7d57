"""Reading and writing turn by turn: a text of any length goes into a state, and answers are written from one.

States are values, so that any number of questions can be answered from the same one, each as if it were alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.data.tokenizers import encode_pieces
from experiments.measures import check_positive
from experiments.spread import as_before, initial_state, read_on, to_host
from fam_jax import Decoder, StreamState
from fam_jax.call import check_ids
from fam_jax.checks import check_int
from fam_jax.generate import Writing, row_keys, write
from fam_jax.sampling import Choice, check_choice


class Codec(Protocol):
    """What is needed of a tokenizer here; those of text may have a `separator`, which ends an answer."""

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...


@dataclasses.dataclass(frozen=True)
class Style:
    """How answers are written.

    Attributes:
        max_new_tokens: An answer ends here at the latest.
        chunk: Tokens that the model reads at a time, rounded up to whole blocks.
        temperature: See `fam_jax.generate`, so for the others.
        top_k: Sample among the k most likely only.
        top_p: Sample among the most likely of this joint probability only.
        min_p: Sample among those of at least this share of the most likely one's probability only.
        repetition_penalty: For tokens of the prompts and answers, not of what was only read before.
        ends: Tokens that end an answer, and are not part of its text.
        stop: Texts that end an answer, and are not part of it.
    """

    max_new_tokens: int
    chunk: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    ends: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `Reader.answer` and `continue_text` return.

    Attributes:
        text: The new text.
        ids: Its tokens, and the one that has ended it: int32 [t].
        prompt_tokens: Tokens of the prompt.
        state: Has read the prompt and the new tokens.
        seen: Tokens that the penalty of the next turn counts: bool [v]; None without one.
    """

    text: str
    ids: np.ndarray
    prompt_tokens: int
    state: StreamState
    seen: np.ndarray | None = None


class Reader:
    """A model that reads tokens in chunks and writes answers.

    Attributes:
        model: The decoder.
        variables: Its parameters.
        style: How answers are written.
        size: Tokens of a chunk: those of the style, in whole blocks.
    """

    def __init__(self, model: Decoder, variables: Any, style: Style):
        """Checks the style.

        Raises:
            ValueError: A setting is impossible; the message names it.
        """
        check_positive(chunk=style.chunk)
        check_int("generate", "max_new_tokens", style.max_new_tokens, 1)
        config, memory = model.config, model.config.memory
        self.model, self.variables, self.style = model, variables, style
        self._choice, self._heat = check_choice(
            config.vocab_size, style.temperature, style.top_k, style.top_p, style.min_p, style.repetition_penalty
        )
        self.size = style.chunk if memory is None else -(-style.chunk // memory.block_size) * memory.block_size
        self._ends = np.array([end for end in style.ends if end < config.vocab_size], np.int32)

    def read(self, pieces: Iterable[np.ndarray], state: StreamState | None = None) -> tuple[StreamState, int]:
        """Reads a text.

        Args:
            pieces: Its ids, int [t] each.
            state: Of one row, which has read what is before; None begins a document.

        Returns:
            The state after all of it, and its number of tokens.

        Raises:
            ValueError: There is no token, or one that the model does not know.
        """
        state, _, count = self._read(pieces, state)
        return state, count

    def answer(
        self,
        pieces: Iterable[np.ndarray],
        decode: Callable[[np.ndarray], str],
        state: StreamState | None = None,
        *,
        seen: np.ndarray | None = None,
        key: Array | None = None,
        show: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Reads a prompt and continues it.

        Args:
            pieces: The prompt's ids, int [t] each.
            decode: Text of ids, as a tokenizer has it.
            state: As in `read`; it stays as it is, for other questions.
            seen: That of the turn before.
            key: Random key; needed if the temperature is above 0.
            show: Gets the text as it is written, part by part.

        Raises:
            ValueError: The prompt has no token, or one that the model does not know.
        """
        if not self._choice.greedy and key is None:
            raise ValueError(f"temperature={self.style.temperature!r} samples, which needs key=jax.random.key(seed)")
        if self._choice.penalty != 1:
            seen = np.zeros(self.model.config.vocab_size, bool) if seen is None else seen.copy()
            pieces = _noted(pieces, seen)
        state, last, count = self._read(pieces, state, 1, self.style.max_new_tokens)
        writing = Writing.begin(state, jnp.asarray(last), None if seen is None else jnp.asarray(seen)[None])
        spelling, keys = Spelling(decode, self.style.stop, show), row_keys(key, 1)
        ids: list[int] = []
        while len(ids) < self.style.max_new_tokens:
            writing = self._write(writing, self.style.max_new_tokens, keys)
            ids.append(int(to_host(writing.token)[0]))
            if ids[-1] in self._ends or spelling.add(ids[-1]):
                break
        text = spelling.close()
        writing = self._write(writing, 0, keys)  # reads the last token
        seen = None if writing.seen is None else np.array(to_host(writing.seen)[0])
        return Answer(text, np.array(ids, np.int32), count, writing.state, seen)

    def _read(
        self, pieces: Iterable[np.ndarray], state: StreamState | None, keep: int = 0, new: int = 0
    ) -> tuple[StreamState, np.ndarray, int]:
        """The state after all tokens but the last to `keep`; those, int32 [keep]; and how many there are in all.

        A cache has room for `new` more.
        """
        config, size = self.model.config, self.size
        pieces = (check_ids(ids, config.vocab_size, "prompt") for ids in pieces)
        none = np.zeros(0, np.int32)
        if config.memory is None:  # the cache is made for the whole text, so its length must be known
            pieces = iter([np.concatenate([none, *pieces])])
        # Whole chunks leave it as it is.
        aligned = config.memory is not None and (state is None or not to_host(state.offset).any())
        count, held = 0, none
        for piece in pieces:
            held, count = np.concatenate([held, piece]), count + len(piece)
            if config.memory is None:
                state = self._with_room(state, -(-count // size) * size + new)
            elif state is None:
                state = initial_state(self.model, 1)
            full = max(len(held) - keep, 0) // size * size
            for start in range(0, full, size):
                state = self._advance(state, held[start : start + size], aligned)
            held = held[full:]
        if state is None or not count:
            raise ValueError("the prompt has no token; give some text")
        rest, last = held[: len(held) - keep], held[len(held) - keep :]
        return (self._advance(state, rest, aligned) if len(rest) else state), last, count

    def _with_room(self, state: StreamState | None, more: int) -> StreamState:
        """The state whose cache of full attention can take so many tokens more."""
        if state is None:
            return initial_state(self.model, 1, more)
        missing = int(to_host(state.offset)[0]) + more - state.open_k.shape[2]
        steps = -(-missing // (4 * self.size))  # several chunks at a time: every size has programs of its own
        return state if missing <= 0 else _widen(self.model, steps * 4 * self.size, state)

    def _advance(self, state: StreamState, ids: np.ndarray, aligned: bool) -> StreamState:
        """The state after up to a chunk of tokens, padded so that one program serves all lengths."""
        tokens = np.pad(ids, (0, self.size - len(ids)))[None]
        return read_on(self.model, aligned, self.variables, state, tokens, np.array([len(ids)], np.int32))

    def _write(self, writing: Writing, limit: int, keys: Array) -> Writing:
        heat = np.float32(self._heat)
        return _write(self.model, self._choice, self.variables, writing, np.int32(limit), self._ends, heat, keys)


class Spelling:
    """The text of tokens that come one by one, up to the first of some texts.

    A part is shown as soon as its last character is complete and no text to stop at can begin in it.
    """

    def __init__(self, decode: Callable[[np.ndarray], str], stop: Sequence[str], show: Callable[[str], None]):
        self._decode, self._stop, self._show = decode, stop, show
        self._ids: list[int] = []
        self._told, self._read = 0, 0  # `_ids[_told:_read]` are the last tokens whose text is known
        self._held, self._text, self._ended = "", "", False

    def add(self, token: int) -> bool:
        """Takes the next token; returns whether the text ends here."""
        self._ids.append(token)
        return self._take(self._new(), last=False)

    def close(self) -> str:
        """Shows what was held back, and returns the whole text."""
        self._take(self._new(last=True), last=True)
        return self._text

    def _new(self, last: bool = False) -> str:
        """The text that the latest tokens add: decoders may need to know the word before, to put a blank or none."""
        known = self._decode(np.array(self._ids[self._told : self._read], np.int32)) if self._read else ""
        text = self._decode(np.array(self._ids[self._told :], np.int32))
        if not last and text.endswith("\ufffd"):  # a character of several bytes, some of which are to come
            return ""
        self._told, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _take(self, text: str, last: bool) -> bool:
        if self._ended:
            return True
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._put(min(found))
            self._held, self._ended = "", True
            return True
        # The longest end that may be the beginning of a text to stop at waits.
        waits = 0 if last else max((n for stop in self._stop for n in _overlaps(self._held, stop)), default=0)
        self._put(len(self._held) - waits)
        return False

    def _put(self, length: int) -> None:
        part, self._held = self._held[:length], self._held[length:]
        self._text += part
        if part:
            self._show(part)


def _overlaps(text: str, stop: str) -> Iterator[int]:
    """Lengths of what is both an end of the text and a beginning of `stop`."""
    return (n for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))


def continue_text(
    model: Decoder,
    variables: Any,
    tokenizer: Codec,
    texts: Iterable[str],
    max_new_tokens: int,
    *,
    key: Array | None = None,
    **style: Any,
) -> Answer:
    """Reads a prompt and continues it up to the tokenizer's end of text.

    Args:
        model: The decoder.
        variables: Its parameters.
        tokenizer: That of its training.
        texts: The prompt in pieces, tokenized as if it came at once.
        max_new_tokens: The answer ends here at the latest.
        key: Random key; needed if the temperature is above 0.
        style: More fields of `Style`.

    Raises:
        ValueError: See `Reader`.
    """
    end = getattr(tokenizer, "separator", None)
    reader = Reader(model, variables, Style(max_new_tokens, ends=() if end is None else (end,), **style))
    return reader.answer(encode_pieces(tokenizer, texts), tokenizer.decode, key=key)


def _noted(pieces: Iterable[np.ndarray], seen: np.ndarray) -> Iterator[np.ndarray]:
    """Notes which ids have come, once they are known to be in the vocabulary."""
    for ids in pieces:
        seen[check_ids(ids, len(seen), "prompt")] = True
        yield ids


@partial(jax.jit, static_argnums=(0, 1))
def _widen(model: Decoder, more: int, state: StreamState) -> StreamState:
    """The state with a cache of full attention that is larger by so many tokens."""
    layers = {}
    for name, axis in (("segment_k", 3), ("segment_v", 3), ("open_k", 2), ("open_v", 2)):
        leaf = getattr(state, name)
        layers[name] = jnp.pad(leaf, [(0, more if at == axis else 0) for at in range(leaf.ndim)])
    grown = dataclasses.replace(state, **layers)
    return as_before(model, grown)


@partial(jax.jit, static_argnums=(0, 1))
def _write(
    model: Decoder,
    choice: Choice,
    variables: Any,
    writing: Writing,
    limit: Array,
    stop: Array,
    heat: Array,
    keys: Array,
) -> Writing:
    """See `fam_jax.generate.write`."""
    new = write(model, choice, variables, writing, limit, stop, heat, keys)
    return dataclasses.replace(new, state=as_before(model, new.state))

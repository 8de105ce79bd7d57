"""How likely a model finds given continuations of given texts, and what it writes itself: many texts in few shapes.

A text that several continuations share is read once, and its state is handed to all of them; so is what all texts of a
batch begin with, such as the same examples. Texts of like length are read side by side, padded on the right, in chunks
whose widths and numbers of rows are powers of two up to a limit, so that few programs are compiled whatever the
lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments.distributed import is_main
from experiments.measures import check_positive
from experiments.spread import as_before, initial_state, read_on, to_host
from fam_jax import Decoder, StreamState, generate

NARROWEST = 16  # columns of the smallest chunk
STEPS = 32  # tokens that are written before it is asked whether a text has ended


class Score(NamedTuple):
    """Of a continuation.

    Attributes:
        log_likelihood: Its log-probability after its context, in nats.
        greedy: Each of its tokens is the most likely one.
    """

    log_likelihood: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that reads, scores and continues texts of any lengths.

    Attributes:
        model: The decoder.
        variables: Its parameters.
        batch_size: Rows side by side.
        chunk: Most tokens of a row at once; rounded up to whole blocks.
    """

    model: Decoder
    variables: Any
    batch_size: int = 16
    chunk: int = 512

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, chunk=self.chunk)

    def scores(
        self, requests: Sequence[tuple[np.ndarray, np.ndarray]], label: str = "", progress: bool = True
    ) -> list[Score]:
        """Scores continuations. With a block memory, what is kept of a text does not grow with its length.

        Args:
            requests: Context and continuation of each: ids, int32 [t]; a context has at least one token.
            label: Of the progress bar.
            progress: Show it.

        Returns:
            Their scores, in the same order. An empty continuation is certain.
        """
        found = [Score(0.0, True)] * len(requests)
        together: dict[bytes, list[int]] = {}
        for number, (context, _) in enumerate(requests):
            together.setdefault(context.tobytes(), []).append(number)
        # The longest first: if one does not fit into memory, that shows at once.
        groups = sorted(together.values(), key=lambda group: -len(requests[group[0]][0]))
        with _bar(len(requests), label, progress) as bar:
            for batch in _batches(groups, self.batch_size):
                contexts = [requests[group[0]][0] for group in batch]
                asked = [(row, number) for row, group in enumerate(batch) for number in group]
                asked.sort(key=lambda pair: -len(requests[pair[1]][1]))
                ends = max(len(contexts[row]) + len(requests[number][1]) for row, number in asked)
                state = self.read([context[:-1] for context in contexts], ends)
                for some in _batches(asked, self.batch_size):
                    texts = [(contexts[row][-1:], requests[number][1]) for row, number in some]
                    answers = self._score(self._rows_of(state, [row for row, _ in some]), texts)
                    for (_, number), answer in zip(some, answers, strict=True):
                        found[number] = answer
                    bar.update(len(some))
        return found

    def write(
        self,
        contexts: Sequence[np.ndarray],
        max_new_tokens: int,
        *,
        ended: Callable[[np.ndarray], bool] = lambda ids: False,
        stop_tokens: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key: Array | None = None,
        label: str = "",
        progress: bool = True,
    ) -> list[np.ndarray]:
        """Continues texts. Greedy continuations do not depend on the batch; sampled ones do.

        Args:
            contexts: Ids, int32 [t] with t at least 1.
            max_new_tokens: Each continuation ends here at the latest.
            ended: Whether a continuation, int32 [t], needs no more tokens. Asked after every `STEPS` tokens.
            stop_tokens: Ids that end a text; see `fam_jax.generate`, so for the others.
            temperature: 0 takes the most likely token.
            top_k: Sample among the k most likely only.
            top_p: Sample among the most likely of this joint probability only.
            key: Random key; needed if the temperature is above 0.
            label: Of the progress bar.
            progress: Show it.

        Returns:
            Their ids, int32 [up to max_new_tokens], in the same order; each ends with its stop token if it met one.
        """
        check_positive(max_new_tokens=max_new_tokens)
        steps = min(STEPS, max_new_tokens)
        rounds = -(-max_new_tokens // steps)
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(contexts)
        order = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), contexts[i].tobytes()))
        with _bar(len(contexts), label, progress) as bar:
            for place, batch in enumerate(_batches(order, self.batch_size)):
                distinct = {contexts[i].tobytes(): contexts[i] for i in batch}
                rows = {content: row for row, content in enumerate(distinct)}
                state = self.read([ids[:-1] for ids in distinct.values()], len(contexts[batch[0]]) + rounds * steps)
                state = self._rows_of(state, [rows[contexts[i].tobytes()] for i in batch])
                last = np.zeros((len(state.offset), 1), np.int32)
                last[: len(batch), 0] = [contexts[i][-1] for i in batch]
                running = set(batch)
                for number in range(rounds):
                    out = generate(
                        self.model,
                        self.variables,
                        last,
                        steps,
                        state=state,
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        stop_tokens=stop_tokens,
                        key=None if key is None else jax.random.fold_in(key, place * rounds + number),
                    )
                    ids, lengths = to_host((out.ids, out.lengths))
                    for row, i in enumerate(batch):
                        if i in running:
                            found[i] = np.concatenate([found[i], ids[row, : lengths[row]]])[:max_new_tokens]
                            if np.isin(found[i][-1], stop_tokens) or ended(found[i]):
                                running.remove(i)
                    if not running or number + 1 == rounds:
                        break
                    # The state of `out` has read its last token too, which has to be the next prompt.
                    before = np.concatenate([last, ids[:, :-1]], axis=1)
                    state = read_on(self.model, False, self.variables, state, before, np.full(len(before), steps))
                    last = ids[:, -1:]
                bar.update(len(batch))
        return found

    def read(self, rows: Sequence[np.ndarray], room: int) -> StreamState:
        """The state after each text.

        Args:
            rows: Ids, int32 [t], also none.
            room: Tokens that a row will have at most; full attention makes its cache for them.

        Returns:
            State of at least so many rows. The chunks that all begin with are read once.
        """
        lengths = np.zeros(_round_up(len(rows), 1, self.batch_size), np.int64)
        lengths[: len(rows)] = [len(ids) for ids in rows]
        full = self.model.config.memory is None
        shared = _common(rows) // self._size * self._size if len(rows) > 1 else 0
        count = 1 if shared else len(lengths)
        state = initial_state(self.model, count, _round_up(room, NARROWEST) if full else None)
        for start in range(0, shared, self._size):
            tokens, real = _columns(rows[:1], np.array([shared]), start, self._size)
            state = read_on(self.model, not full, self.variables, state, tokens, real)
        if shared:
            state = _pick(self.model, state, np.zeros(len(lengths), np.int32))
        block = self._block
        for start, width in self._pieces(int(lengths.max()), shared):
            tokens, real = _columns(rows, lengths, start, width)
            # What starts inside a block costs a block more.
            aligned = not full and not (np.minimum(lengths, start) % block).any()
            state = read_on(self.model, aligned, self.variables, state, tokens, real)
        return state

    def _score(self, state: StreamState, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Score]:
        """Scores of continuations, from a state that has read all but the last token of their contexts.

        Args:
            state: Of at least so many rows.
            texts: The last token of the context, int32 [1], and the continuation.
        """
        inputs = [np.concatenate([last, ids])[:-1] for last, ids in texts]
        lengths = np.zeros(len(state.offset), np.int64)
        lengths[: len(texts)] = [len(ids) for ids in inputs]
        total, greedy = np.zeros(len(lengths)), np.ones(len(lengths), bool)
        for start, width in self._pieces(int(lengths.max())):
            tokens, real = _columns(inputs, lengths, start, width)
            targets, _ = _columns([ids for _, ids in texts], lengths, start, width)
            nll, hit, state = _losses(self.model, self.variables, state, tokens, targets, real)
            nll, hit = to_host((nll, hit))
            asked = np.arange(width) < real[:, None]
            total -= np.where(asked, nll, 0.0).sum(1, dtype=np.float64)
            greedy &= (hit | ~asked).all(1)
        return [Score(float(total[row]), bool(greedy[row])) for row in range(len(texts))]

    def _rows_of(self, state: StreamState, rows: Sequence[int]) -> StreamState:
        """The state of the given rows, and of others to fill up."""
        count = _round_up(len(rows), 1, self.batch_size)
        return _pick(self.model, state, np.array([*rows, *[0] * (count - len(rows))], np.int32))

    def _pieces(self, length: int, first: int = 0) -> Iterator[tuple[int, int]]:
        """First column and width of each chunk of a text, from a column on."""
        for start in range(first, length, self._size):
            yield start, _round_up(length - start, NARROWEST, self._size)

    @property
    def _size(self) -> int:
        """Tokens of a chunk."""
        return -(-self.chunk // self._block) * self._block

    @property
    def _block(self) -> int:
        memory = self.model.config.memory
        return 1 if memory is None else memory.block_size


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _round_up(number: int, least: int, most: int | None = None) -> int:
    """The next power of two, or the limit."""
    rounded = max(least, 1 << max(number - 1, 0).bit_length())
    return rounded if most is None else min(rounded, most)


def _common(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all rows begin with."""
    length = min(map(len, rows))
    differs = np.zeros(length, bool)
    for ids in rows[1:]:
        differs |= ids[:length] != rows[0][:length]
    return int(differs.argmax()) if differs.any() else length


def _columns(rows: Sequence[np.ndarray], lengths: np.ndarray, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of rows, int32 [b, width] padded on the right, and how many of them are real, int32 [b]."""
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, ids in enumerate(rows):
        piece = ids[start : start + width]
        tokens[row, : len(piece)] = piece
    return tokens, np.clip(lengths - start, 0, width).astype(np.int32)


def _bar(total: int, label: str, progress: bool) -> tqdm:
    """A progress bar, shown on terminals only, by the main process."""
    shown = progress and is_main()
    return tqdm(total=total, desc=label or None, unit="request", disable=None if shown else True, leave=False)


@partial(jax.jit, static_argnums=0)
def _pick(model: Decoder, state: StreamState, rows: Array) -> StreamState:
    return as_before(model, state.rows(rows))


@partial(jax.jit, static_argnums=0)
def _losses(
    model: Decoder, variables: Any, state: StreamState, tokens: Array, targets: Array, lengths: Array
) -> tuple[Array, Array, StreamState]:
    """Loss and hit of each target [b, t], and the state."""
    out: Any = model.apply(variables, tokens, state, lengths=lengths, targets=targets)
    return out.losses.nll, out.losses.hit, as_before(model, out.state)

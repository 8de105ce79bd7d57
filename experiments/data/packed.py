"""Packed batches: rows of fixed length cut from the concatenation of all documents, as the paper trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from experiments.data.config import TextData
from experiments.data.identity import Identity
from experiments.data.protocol import Batch, DataError
from experiments.data.stream import shuffled
from experiments.data.tokenizers import Tokenizer
from experiments.data.tokens import TokenStore

REPEAT_PROMPT = "[repeat random segment]:"


class Windows:
    """The documents in one random order, with a separator after each, cut every `stride` tokens.

    Documents with weights of their own have the separators that they need, and get none here.

    A window has one token more than the stride, which is the first of the next one: as a target every token
    but the very first comes exactly once. What is left at the end, less than a window, is not used.
    """

    def __init__(self, store: TokenStore, separator: int | None, stride: int, seed: int):
        self._store = store
        self._separator = separator = None if store.weighted else separator
        self._stride = stride
        self._order = shuffled(len(store), seed, 0)
        extra = 0 if separator is None else 1
        self._ends = np.cumsum(store.lengths[self._order] + extra)
        self._count = max(int(self._ends[-1]) - 1, 0) // stride

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Window `index`: tokens, int32 [stride + 1], and their weights as targets, float32 [stride + 1]."""
        at, stop = index * self._stride, (index + 1) * self._stride + 1
        out, weights = np.empty(self._stride + 1, np.int32), np.ones(self._stride + 1, np.float32)
        filled = 0
        place = int(np.searchsorted(self._ends, at, side="right"))
        while at < stop:
            document = int(self._order[place])
            begin = int(self._ends[place - 1]) if place else 0
            ids = self._store.read(document, at - begin, stop - begin)
            out[filled : filled + ids.size] = ids
            weights[filled : filled + ids.size] = self._store.read_weights(document, at - begin, stop - begin)
            filled, at = filled + ids.size, at + ids.size
            if at < stop and self._separator is not None:
                out[filled] = self._separator
                filled, at = filled + 1, at + 1
            place += 1
        return out, weights


class _Row:
    """A window to a row: tokens, next-token targets and weights, with the repeated segment if there is one.

    The row is `window, prompt, segment`, where the segment is `count` consecutive tokens of the window, each
    place equally likely. Weights of the targets: their own in the window, 0 in the prompt (the paper gives
    instructions no weight, and what follows the window is no continuation of it), `weight` in the segment.
    """

    def __init__(self, prompt: np.ndarray, count: int, weight: float):
        self._prompt = prompt
        self._count = count
        self._weight = weight

    def __call__(self, read: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> Batch:
        ids, weights = read
        if self._count:
            start = int(rng.integers(ids.size - self._count + 1))
            more = [(self._prompt, 0.0), (ids[start : start + self._count], self._weight)]
            weights = np.concatenate([weights, *(np.full(ids.size, weight, np.float32) for ids, weight in more)])
            ids = np.concatenate([ids, *(ids for ids, _ in more)])
        return {"tokens": ids[:-1], "targets": ids[1:], "weights": weights[1:]}


class PackedBatches:
    """Endless packed batches of a split: all rows in random order, a new one in every epoch.

    Raises:
      DataError: the text is too short for one row, or the row too short for the repeated segment.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, config: TextData, identity: Identity):
        prompt = tokenizer.encode(REPEAT_PROMPT) if config.repeat_tokens else np.zeros(0, np.int32)
        stride = config.length - prompt.size - config.repeat_tokens
        if stride + 1 < max(config.repeat_tokens, 2):
            raise DataError(
                f"repeat_tokens={config.repeat_tokens}: with the prompt of {prompt.size} tokens this leaves "
                f"{stride + 1} of length={config.length} to repeat from; lower repeat_tokens or raise length"
            )
        windows = Windows(store, tokenizer.separator, stride, identity.seed)
        if not len(windows):
            raise DataError(
                f"length={config.length}: the {identity.split} split has only {int(store.lengths.sum())} "
                "tokens, less than one row; lower length or give it more text"
            )
        rows = grain.MapDataset.source(windows).seed(identity.seed).shuffle().repeat()
        self._batches = rows.random_map(_Row(prompt, config.repeat_tokens, config.repeat_weight)).batch(
            config.batch_size
        )
        self._identity = identity
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._batches[self._step]
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of batches drawn, which decides the next one."""
        return {"data": self._identity.fields(), "step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state` was taken.

        Raises:
          DataError: `state` belongs to other data or to another config, or is none.
        """
        self._identity.check(state)
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise DataError(f"the data position is damaged (step {step!r}); restore another checkpoint")
        self._step = step

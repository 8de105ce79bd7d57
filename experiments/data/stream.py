"""Stream batches: every row reads one document after another, across steps, for a memory to be carried."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.data.config import TextData
from experiments.data.identity import Identity
from experiments.data.protocol import Batch, DataError
from experiments.data.tokens import TokenStore


class StreamBatches:
    """Endless stream batches of a split.

    The documents are shuffled in every epoch and dealt in that order: whenever a row has none, at a block
    edge, it takes the next one; of several such rows the one whose edge comes first, then the one with the
    lowest number. A document starts at a block edge with `reset` set there. Its tail is filled up to a whole
    block with weight 0, and `padded` marks that block. Targets are the next tokens, with their weights; the last
    token of a document has none: weight 0. A document that goes on in the next step has its next token there as
    the target of its last token here.
    """

    def __init__(self, store: TokenStore, config: TextData, identity: Identity):
        self._store = store
        self._shape = (config.batch_size, config.length)
        self._block = config.block_size
        self._identity = identity
        self._epoch = 0
        self._dealt = 0  # documents of this epoch
        self._rows: list[tuple[int, int]] = [(-1, 0)] * config.batch_size  # (document or -1, tokens read of it)
        self._order, self._order_of = np.zeros(0, np.int64), -1  # the shuffled documents, and of which epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        b, t = self._shape
        blocks = t // self._block
        tokens, targets = np.zeros((2, b, t), np.int32)
        weights = np.zeros((b, t), np.float32)
        reset, padded = np.zeros((2, b, blocks), bool)
        free = [(0, row) for row in range(b)]  # a heap of (block, row): where rows want to read on
        while free:
            block, row = heapq.heappop(free)
            document, start = self._rows[row]
            if document < 0:
                document, start = self._deal(), 0
                reset[row, block] = True
            length = int(self._store.lengths[document])
            count = min(length - start, t - block * self._block)
            # One token more, the target of the last one, unless the document ends here.
            ids = self._store.read(document, start, start + count + 1)
            at = block * self._block
            tokens[row, at : at + count] = ids[:count]
            targets[row, at : at + ids.size - 1] = ids[1:]
            weights[row, at : at + ids.size - 1] = self._store.read_weights(document, start + 1, start + count + 1)
            block += -(-count // self._block)
            if count % self._block:
                padded[row, block - 1] = True
            self._rows[row] = (document, start + count) if start + count < length else (-1, 0)
            if block < blocks:
                heapq.heappush(free, (block, row))
        return {"tokens": tokens, "targets": targets, "weights": weights, "reset": reset, "padded": padded}

    def get_state(self) -> dict[str, Any]:
        """The position: which document every row reads and how far, and how many of which epoch are dealt."""
        rows = [list(row) for row in self._rows]
        return {"data": self._identity.fields(), "epoch": self._epoch, "dealt": self._dealt, "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state` was taken.

        Raises:
          DataError: `state` belongs to other data or to another config, or is none.
        """
        self._identity.check(state)
        try:
            epoch, dealt = int(state["epoch"]), int(state["dealt"])
            rows = [(int(document), int(start)) for document, start in state["rows"]]
            count, lengths = len(self._store), self._store.lengths
            inside = all(d == -1 or (0 <= d < count and 0 <= s < lengths[d]) for d, s in rows)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the data position is damaged ({error!r}); restore another checkpoint") from error
        if len(rows) != self._shape[0] or not inside or epoch < 0 or not 0 <= dealt <= count:
            raise DataError("the data position is damaged (out of range); restore another checkpoint")
        self._epoch, self._dealt, self._rows = epoch, dealt, rows

    def _deal(self) -> int:
        if self._dealt == len(self._store):
            self._epoch, self._dealt = self._epoch + 1, 0
        if self._order_of != self._epoch:
            self._order = shuffled(len(self._store), self._identity.seed, self._epoch)
            self._order_of = self._epoch
        self._dealt += 1
        return int(self._order[self._dealt - 1])


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of `range(count)`, int64 [count]; the same in every version of NumPy."""
    # NumPy keeps the raw bits of its bit generators stable, not what its distributions make of them.
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(bits, kind="stable")

"""PassKey: a number hidden in filler, asked for at the end (TransformerFAM, section 3.2 and appendix D.1).

The texts are those of the paper. A small model reads them as words, with numbers digit by digit, and a pretrained one
with its own tokenizer. `filler="loop"` repeats the same five sentences, as the paper does. `filler="decoys"` is harder:
the sentences come in random order, and between them stand numbers that are not the pass key. `filler="mixed"` trains on
both, row by row, and measures both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from experiments.data.levels import LevelData, LevelTask
from experiments.data.protocol import Batch, DataError
from experiments.data.tokenizers import encode_after, load_tokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
DECOY = "The number of the day is {key}."
QUESTION = "What is the pass key? The pass key is"

_DECOY_SHARE = 0.25  # of the sentences of the harder filler


def _words(text: str) -> list[str]:
    return re.findall(r"\d|[A-Za-z]+|[^\w\s]", text)


class PasskeyTokenizer:
    """Words, punctuation and single digits of the templates; digit d is id d."""

    def __init__(self) -> None:
        text = " ".join([TASK, KEY, *FILLER, DECOY, QUESTION]).replace("{key}", "")
        self._tokens = [*"0123456789", *sorted(set(_words(text)))]
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        self.vocab_size = len(self._tokens)
        self.name = "passkey"

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [t]. Raises DataError on a word that the templates do not have."""
        words = _words(text)
        unknown = sorted({word for word in words if word not in self._ids})
        if unknown:
            raise DataError(
                f"the PassKey vocabulary has no {', '.join(map(repr, unknown))}; it knows its templates only"
            )
        return np.array([self._ids[word] for word in words], np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids, words separated by blanks."""
        return " ".join(self._tokens[int(number)] for number in np.asarray(ids))


@dataclasses.dataclass(frozen=True)
class PasskeyData(LevelData):
    """PassKey samples with a curriculum over lengths.

    Attributes:
      block_size: tokens of a block, that of the model if it has a memory; lengths are counted in blocks, the question
        and its answer included.
      blocks: lengths of the curriculum, shortest first. Each batch draws one of those reached so far.
      threshold: exact match at the longest length reached, mean over ten batches, that adds the next length.
      digits: of the pass key.
      depth: where the key stands: `uniform` anywhere in the filler, `first` before it, as in the paper, or `mixed`,
        every other row first. What is first is learnt much sooner, and teaches what to do with the rest.
      filler: `loop` (the paper's five sentences, repeated), `decoys`, or `mixed`: of four rows two have the one and two
        the other, at either depth.
      tokenizer: `words`, those of the task alone, or the file of another as in `TextData`, whose ids the lengths count.
      batch_size: rows of a batch.
      seed: of the samples.
    """

    blocks: tuple[int, ...] = (5, 6, 8, 12, 16)
    digits: int = 5
    depth: str = "uniform"
    filler: str = "loop"
    tokenizer: str = "words"

    kind = "passkey"
    title = "PassKey"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits < 1:
            raise ValueError(f"digits={self.digits}: must be at least 1")
        if self.depth not in ("uniform", "first", "mixed"):
            raise ValueError(f"depth={self.depth!r}: must be uniform, first or mixed")
        if self.filler not in ("loop", "decoys", "mixed"):
            raise ValueError(f"filler={self.filler!r}: must be loop, decoys or mixed")
        if self.tokenizer == "words":  # that of a file is read when it is needed
            self.check_levels()

    def load_tokenizer(self) -> Any:
        """The tokenizer. Raises DataError if it cannot be read."""
        return PasskeyTokenizer() if self.tokenizer == "words" else load_tokenizer(self.tokenizer)

    @property
    def shortest(self) -> int:
        """Blocks that hold a sample without filler; reads the tokenizer."""
        return Passkey(self).shortest

    def check_levels(self, levels: Sequence[int] | None = None) -> None:
        """Raises a ValueError if a length does not hold a sample; reads the tokenizer."""
        chosen, shortest = tuple(self.levels if levels is None else levels), self.shortest
        if any(blocks < shortest for blocks in chosen):
            raise ValueError(
                f"blocks={chosen}: must be at least {shortest} with block_size={self.block_size} and "
                f"digits={self.digits}, so that task, key, question and answer fit"
            )

    def parts(self) -> dict[str, LevelData]:
        """Either filler apart, if both are mixed."""
        if self.filler != "mixed":
            return {"": self}
        return {f", {filler}": dataclasses.replace(self, filler=filler) for filler in ("loop", "decoys")}

    def task(self, split: str = "train") -> Passkey:
        return Passkey(self)


def _another(key: str) -> str:
    """A number with one digit other than the key's: reversing it would not do for a palindrome."""
    return key[:-1] + str((int(key[-1]) + 1) % 10)


class Passkey(LevelTask):
    """Makes samples; a level is a length in blocks."""

    def __init__(self, config: PasskeyData) -> None:
        self.config: PasskeyData = config
        self.tokenizer = config.load_tokenizer()
        self._sentences = {text: self._encode(f" {text}") for text in FILLER}
        self._loop = self._encode(" " + " ".join(FILLER))
        self._task, self._question = self.tokenizer.encode(TASK), self._encode(f" {QUESTION}")

    @property
    def shortest(self) -> int:
        """Blocks that hold a sample without filler."""
        parts = self._around("0" * self.config.digits)
        return -(-(sum(map(len, parts)) - 1) // self.config.block_size)

    def sample(self, rng: np.random.Generator, rows: int, level: int) -> Batch:
        """Random samples of a length in blocks; the last targets are the pass key. See `LevelTask.sample`."""
        length = level * self.config.block_size
        ids = np.empty((rows, length + 1), np.int32)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            key = "".join(map(str, rng.integers(0, 10, self.config.digits)))
            task, hidden, question, answer = self._around(key)
            room = length + 1 - sum(map(len, (task, hidden, question, answer)))
            if room < 0:
                raise ValueError(f"blocks={level}: must be at least {self.shortest}")
            first = self.config.depth == "first" or (self.config.depth == "mixed" and row % 2 == 0)
            depth = 0 if first else int(rng.integers(0, room + 1))
            loop = self.config.filler == "loop" or (self.config.filler == "mixed" and row % 4 < 2)
            filler = np.resize(self._loop, room) if loop else self._decoys(rng, room, key)
            ids[row] = np.concatenate((task, filler[:depth], hidden, filler[depth:], question, answer))
            weights[row, length - len(answer) :] = 1
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}

    def _around(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What stands around the filler: the task, the key, the question and its answer."""
        return self._task, self._encode(f" {KEY.format(key=key)}"), self._question, self._encode(f" {key}")

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a text that goes on after another, int32 [t]."""
        return encode_after(self.tokenizer, "is", text)

    def _decoys(self, rng: np.random.Generator, length: int, key: str) -> np.ndarray:
        parts: list[np.ndarray] = [np.zeros(0, np.int32)]
        have = 0
        while have < length:
            ids = self._sentences[FILLER[rng.integers(len(FILLER))]]
            if rng.random() < _DECOY_SHARE:
                decoy = "".join(map(str, rng.integers(0, 10, self.config.digits)))
                ids = self._encode(f" {DECOY.format(key=decoy if decoy != key else _another(key))}")
            parts.append(ids)
            have += len(ids)
        return np.concatenate(parts)[:length]

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        if found.pop("tokenizer") != "words":  # its file may lie elsewhere another time
            found["tokenizer"] = self.tokenizer.hash
        return found

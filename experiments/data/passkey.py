"""PassKey: a number hidden in filler, asked for at the end (TransformerFAM, section 3.2 and appendix D.1).

The texts are those of the paper. A small model reads them as words, with numbers digit by digit, and a pretrained one
with its own tokenizer. `filler="loop"` repeats the same five sentences, as the paper does. `filler="decoys"` is harder:
the sentences come in random order, and between them stand numbers that are not the pass key.

Samples are made as they are needed and are a function of the seed and the step, so nothing is prepared or stored.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from experiments.data.protocol import Batch, DataError
from experiments.data.tokenizers import encode_after, load_tokenizer
from experiments.typed import check_types

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
DECOY = "The number of the day is {key}."
QUESTION = "What is the pass key? The pass key is"

_DECOY_SHARE = 0.25  # of the sentences of the harder filler
_WINDOW = 10  # batches at the hardest level over which the curriculum takes its mean


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
class PasskeyData:
    """PassKey samples with a curriculum over lengths.

    Attributes:
      block_size: tokens of a block, that of the model if it has a memory; lengths are counted in blocks, the question
        and its answer included.
      blocks: lengths of the curriculum, shortest first. Each batch draws one of those reached so far.
      threshold: exact match at the longest length reached, mean over ten batches, that adds the next length.
      digits: of the pass key.
      depth: where the key stands: `uniform` anywhere in the filler, `first` before it, as in the paper, or `mixed`,
        every other row first. What is first is learnt much sooner, and teaches what to do with the rest.
      filler: `loop` (the paper's five sentences, repeated) or `decoys`.
      tokenizer: `words`, those of the task alone, or the file of another as in `TextData`, whose ids the lengths count.
      batch_size: rows of a batch.
      seed: of the samples.
    """

    block_size: int = 16
    blocks: tuple[int, ...] = (5, 6, 8, 12, 16)
    threshold: float = 0.9
    digits: int = 5
    depth: str = "uniform"
    filler: str = "loop"
    tokenizer: str = "words"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("block_size", "digits", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.blocks or any(a >= b for a, b in zip(self.blocks, self.blocks[1:], strict=False)):
            raise ValueError(f"blocks={self.blocks}: must be lengths in rising order, at least one")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: must be between 0 and 1")
        if self.depth not in ("uniform", "first", "mixed"):
            raise ValueError(f"depth={self.depth!r}: must be uniform, first or mixed")
        if self.filler not in ("loop", "decoys"):
            raise ValueError(f"filler={self.filler!r}: must be loop or decoys")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if self.tokenizer == "words":  # that of a file is read when it is needed
            self.check_lengths()

    def load_tokenizer(self) -> Any:
        """The tokenizer. Raises DataError if it cannot be read."""
        return PasskeyTokenizer() if self.tokenizer == "words" else load_tokenizer(self.tokenizer)

    @property
    def shortest(self) -> int:
        """Blocks that hold a sample without filler; reads the tokenizer."""
        return Passkey(self).shortest

    def check_lengths(self) -> None:
        """Raises a ValueError if a length does not hold a sample."""
        if self.blocks[0] < self.shortest:
            raise ValueError(
                f"blocks={self.blocks}: must be at least {self.shortest} with block_size={self.block_size} and "
                f"digits={self.digits}, so that task, key, question and answer fit"
            )


def _another(key: str) -> str:
    """A number with one digit other than the key's: reversing it would not do for a palindrome."""
    return key[:-1] + str((int(key[-1]) + 1) % 10)


class Passkey:
    """Makes samples."""

    def __init__(self, config: PasskeyData) -> None:
        self.config = config
        self.tokenizer = config.load_tokenizer()
        self._sentences = {text: self._encode(f" {text}") for text in FILLER}
        self._loop = self._encode(" " + " ".join(FILLER))
        self._task, self._question = self.tokenizer.encode(TASK), self._encode(f" {QUESTION}")

    @property
    def shortest(self) -> int:
        """Blocks that hold a sample without filler."""
        parts = self._around("0" * self.config.digits)
        return -(-(sum(map(len, parts)) - 1) // self.config.block_size)

    def sample(self, rng: np.random.Generator, rows: int, blocks: int) -> Batch:
        """Random samples of a length.

        Args:
          rng: source of keys, depths and filler.
          rows: samples.
          blocks: length of each in blocks.

        Returns:
          `tokens`, `targets` int32 and `weights` float32 [rows, blocks * block_size]; the last targets are the pass
          key and have weight 1, all others 0.
        """
        length = blocks * self.config.block_size
        ids = np.empty((rows, length + 1), np.int32)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            key = "".join(map(str, rng.integers(0, 10, self.config.digits)))
            task, hidden, question, answer = self._around(key)
            room = length + 1 - sum(map(len, (task, hidden, question, answer)))
            if room < 0:
                raise ValueError(f"blocks={blocks}: must be at least {self.shortest}")
            first = self.config.depth == "first" or (self.config.depth == "mixed" and row % 2 == 0)
            depth = 0 if first else int(rng.integers(0, room + 1))
            filler = self._filler(rng, room, key)
            ids[row] = np.concatenate((task, filler[:depth], hidden, filler[depth:], question, answer))
            weights[row, length - len(answer) :] = 1
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}

    def _around(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What stands around the filler: the task, the key, the question and its answer."""
        return self._task, self._encode(f" {KEY.format(key=key)}"), self._question, self._encode(f" {key}")

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a text that goes on after another, int32 [t]."""
        return encode_after(self.tokenizer, "is", text)

    def _filler(self, rng: np.random.Generator, length: int, key: str) -> np.ndarray:
        if self.config.filler == "loop":
            return np.resize(self._loop, length)
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


class PasskeyBatches:
    """Endless training batches with the curriculum; see `experiments.data.protocol.Batches`."""

    def __init__(self, config: PasskeyData) -> None:
        self.task = Passkey(config)
        self._config = config
        self._step = 0
        self._level = 1  # lengths reached
        self._drawn = 0  # index of the length of the latest batch
        self._recent: list[float] = []  # exact match of the latest batches at the hardest level

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rng = np.random.default_rng([self._config.seed, self._step])
        self._drawn = int(rng.integers(self._level))
        self._step += 1
        return self.task.sample(rng, self._config.batch_size, self._config.blocks[self._drawn])

    def observe(self, metrics: dict[str, float]) -> None:
        """Takes note of the latest batch's `exact_match` and adds the next length once it is good enough."""
        if self._drawn != self._level - 1:
            return
        self._recent = [*self._recent, float(metrics["exact_match"])][-_WINDOW:]
        good = len(self._recent) == _WINDOW and sum(self._recent) >= self._config.threshold * _WINDOW
        if good and self._level < len(self._config.blocks):
            self._level += 1
            self._recent = []

    def get_state(self) -> dict:
        config = dataclasses.asdict(self._config) | {"blocks": list(self._config.blocks)}
        if config.pop("tokenizer") != "words":  # its file may lie elsewhere another time
            config["tokenizer"] = self.task.tokenizer.hash
        return {
            "config": config,
            "step": self._step,
            "level": self._level,
            "drawn": self._drawn,
            "recent": self._recent,
        }

    def set_state(self, state: dict) -> None:
        mine, saved = self.get_state()["config"], state["config"]
        for name in mine | saved:
            value = mine.get(name)
            if saved.get(name) != value:
                raise DataError(
                    f"this position belongs to PassKey data with {name}={saved.get(name)!r}, not {value!r}; "
                    "use the same data settings, or start a new run"
                )
        self._step, self._level = state["step"], state["level"]
        self._drawn, self._recent = state["drawn"], list(state["recent"])

"""Finite sets of questions with worked answers: what the synthetic reasoning tasks share.

A question belongs to the test split if and only if a hash of it says so. Whatever the seeds and sizes, no question is
in both splits. A set is a function of its config: nothing is prepared or stored but the ids in memory.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.data.protocol import Batch, DataError
from experiments.data.stream import shuffled
from fam_jax.call import check_ids

BLANK = -1  # no token; `pack` closes such gaps
_TEST_SHARE = 10  # one question in so many belongs to the test split
_TEST_SEED = 0  # so that runs with different seeds are measured on the same questions
# There are hardly more questions if of at least _WINDOW fewer than one in _FEWEST is new. A chunk counts as at least
# _LEAST, so that the search for questions that hardly exist ends.
_WINDOW, _FEWEST, _LEAST = 1000, 200, 50


@dataclasses.dataclass(frozen=True)
class QuestionData(abc.ABC):
    """Settings that the tasks share. A task's difficulty has levels, which are pooled in one run.

    Attributes:
      samples: training questions per level, all different.
      test_samples: test questions per level, all different. They do not depend on the seed.
      batch_size: rows of a batch.
      seed: of the training questions and of their order.
    """

    samples: int = 50_000
    test_samples: int = 1000
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "test_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")

    @property
    def vocab_size(self) -> int:
        """Ids of the task's words."""
        return self.task().tokenizer.vocab_size

    @property
    @abc.abstractmethod
    def levels(self) -> tuple[int, ...]:
        """Degrees of difficulty."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens of a row: as many as the longest possible sample has targets."""

    @abc.abstractmethod
    def task(self) -> QuestionTask:
        """What makes and marks the questions."""


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Questions, each followed by its worked answer and the end token, which also fills the row.

    Attributes:
      ids: int16 [n, t + 1].
      prompt: tokens of each question: int64 [n].
      ends: tokens up to and including the first end token: int64 [n].
      level: of each question: int64 [n].
    """

    ids: np.ndarray
    prompt: np.ndarray
    ends: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Questions:
        return Questions(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Questions]) -> Questions:
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(cls)))

    @property
    def longest_answer(self) -> int:
        """Tokens that are left in a row after the shortest question."""
        return int(self.ids.shape[1] - self.prompt.min())

    def batch(self) -> Batch:
        """The rows as a batch: weight 1 on the worked answer and its end token, 0 on the question and the filling."""
        ids = self.ids.astype(np.int32)
        place = np.arange(1, ids.shape[1])
        answer = (place >= self.prompt[:, None]) & (place < self.ends[:, None])
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": answer.astype(np.float32)}


class WordTokenizer:
    """A fixed list of words; text has blanks between them, or where the pattern needs none.

    Attributes:
      name: of the task; what results and errors call it.
      vocab_size: number of words.
      separator: the end token.
    """

    END = "<eos>"

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self.name = name
        self.words = (*words, self.END)
        self.ids = {word: number for number, word in enumerate(self.words)}
        self.vocab_size = len(self.words)
        self.separator = self.ids[self.END]

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [t]. Raises DataError on a word that the task does not have."""
        words = self._split(text)
        unknown = sorted({word for word in words if word not in self.ids})
        if unknown:
            raise DataError(
                f"the vocabulary of the {self.name} task has no {', '.join(map(repr, unknown))}; it knows "
                f"{self.words[0]} ... {self.words[-1]}, {self.vocab_size} words, and no others"
            )
        return np.array([self.ids[word] for word in words], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids, words separated by blanks."""
        return " ".join(self.words[number] for number in check_ids(ids, self.vocab_size, self.name).tolist())

    def _split(self, text: str) -> list[str]:
        return text.split()


class QuestionTask(abc.ABC):
    """Makes questions and reads answers."""

    config: QuestionData
    tokenizer: WordTokenizer

    @abc.abstractmethod
    def draw(self, level: int, seed: int, chunk: int) -> Questions:
        """A chunk of random questions, a function of the arguments; repetitions are allowed."""

    @abc.abstractmethod
    def answer(self, ids: np.ndarray) -> int | None:
        """The answer that a text after a question comes to, as a token, or None if it is malformed.

        Args:
          ids: the text, up to its end token if it has one: int [t].
        """

    def questions(self, split: str) -> Questions:
        """The different questions of a split, level after level.

        Args:
          split: `train` or `test`.

        Raises:
          DataError: there are not so many different ones.
        """
        return _questions(self.config, split)


@functools.lru_cache(maxsize=8)
def _questions(config: QuestionData, split: str) -> Questions:
    count, seed = (config.samples, config.seed) if split == "train" else (config.test_samples, _TEST_SEED)
    return Questions.join([_collect(config.task(), level, seed, split, count) for level in config.levels])


def _collect(task: QuestionTask, level: int, seed: int, split: str, count: int) -> Questions:
    """The first `count` different questions of a level in a split."""
    seen: set[bytes] = set()
    parts: list[Questions] = []
    tried = new = 0
    for chunk in itertools.count():
        drawn = task.draw(level, seed, chunk)
        kept = []
        for row, (ids, length) in enumerate(zip(drawn.ids.astype("<i2"), drawn.prompt, strict=True)):
            question = ids[:length].tobytes()
            if split_of(question) == split and question not in seen:
                seen.add(question)
                kept.append(row)
        parts.append(drawn[kept])
        if len(seen) >= count:
            return Questions.join(parts)[:count]
        tried, new = tried + max(len(drawn), _LEAST), new + len(kept)
        if tried >= _WINDOW:
            if new * _FEWEST < tried:
                field = "samples" if split == "train" else "test_samples"
                raise DataError(
                    f"{field}={count}: the {task.tokenizer.name} task has hardly more than {len(seen)} different "
                    f"questions of level {level} for its {split} split; ask for fewer, or change the level"
                )
            tried = new = 0
    raise AssertionError("unreachable: the loop has no end")


def split_of(question: bytes) -> str:
    """The split of a question given as little-endian int16 ids: `train` or `test`."""
    return "train" if zlib.crc32(question) % _TEST_SHARE else "test"


class QuestionBatches:
    """Endless batches of a split; see `experiments.data.protocol.Batches`.

    Training rows come in random order, a new one in every epoch, and a batch may hold the end of one epoch and the
    beginning of the next. Test rows come level by level in turn, always in the same order.

    Args:
      config: of the task.
      split: `train`, or `test`, which serves as `validation` too.

    Raises:
      ValueError: there is no such split.
      DataError: there are not so many different questions.
    """

    def __init__(self, config: QuestionData, split: str = "train") -> None:
        if split not in ("train", "validation", "test"):
            raise ValueError(
                f"split={split!r}: a task of questions has train and test (for which validation is a name)"
            )
        self._train = split == "train"
        self._questions = config.task().questions("train" if self._train else "test")
        self._batch_size, self._seed, self._levels = config.batch_size, config.seed, len(config.levels)
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
        content = hashlib.sha256(self._questions.ids.astype("<i2").tobytes()).hexdigest()
        self._identity = {"task": type(config).__name__, "train": self._train, **plain, "content": content}
        self._step = 0
        self._order, self._order_of = np.zeros(0, np.int64), -1  # the shuffled rows, and of which epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        places = self._step * self._batch_size + np.arange(self._batch_size)
        epochs, places = np.divmod(places, len(self._questions))
        rows = np.concatenate([self._rows(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        self._step += 1
        return self._questions[rows].batch()

    def get_state(self) -> dict[str, Any]:
        """The number of batches drawn, which decides the next one."""
        return {"data": self._identity, "step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state` was taken.

        Raises:
          DataError: `state` belongs to other data or to another config, or is none.
        """
        saved, step = (state.get("data"), state.get("step")) if isinstance(state, dict) else (None, None)
        if not isinstance(saved, dict):
            raise DataError("this is no position in questions; restore a checkpoint that was saved with the same data")
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise DataError(
                    f"this position belongs to questions with {name}={saved.get(name)!r}, not {value!r}; "
                    "use the same data settings and code, or start a new run"
                )
        if not isinstance(step, int) or step < 0:
            raise DataError(f"the data position is damaged (step {step!r}); restore another checkpoint")
        self._step = step

    def _rows(self, epoch: int) -> np.ndarray:
        """The order of the rows in an epoch, int64 [n]."""
        count = len(self._questions)
        if not self._train:
            # So that a few batches hold all levels alike.
            return np.arange(count).reshape(self._levels, -1).T.reshape(-1)
        if self._order_of != epoch:
            self._order, self._order_of = shuffled(count, self._seed, epoch), epoch
        return self._order


class Uniforms:
    """A source of random numbers from 0 to below 1 that are the same in every version of NumPy."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def __call__(self, rows: int, columns: int) -> np.ndarray:
        """The next ones, float64 [rows, columns]."""
        # NumPy keeps the raw bits of its bit generators stable, not what its distributions make of them.
        raw = self._bits.random_raw(rows * columns)
        return ((raw >> np.uint64(11)) * 2.0**-53).reshape(rows, columns)


def pack(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Joins parts of rows [n, any] and closes the gaps.

    Returns:
      The tokens, BLANK only at the end of rows: int64 [n, sum of widths]; and the number of tokens: int64 [n].
    """
    rows = np.concatenate(parts, axis=1)
    order = np.argsort(rows == BLANK, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), (rows != BLANK).sum(1)


def as_questions(
    prompt: Sequence[np.ndarray], answer: Sequence[np.ndarray], end: int, width: int, level: int
) -> Questions:
    """Questions from the parts of their text, int64 [n, any] with gaps; see `Questions`.

    Args:
      prompt: parts of the question.
      answer: parts of the worked answer, without the end token.
      end: the end token.
      width: tokens of a row.
      level: of all of them.
    """
    rows = len(prompt[0])
    ids, counts = pack([*prompt, *answer, np.full((rows, width), end)])
    asked = sum((part != BLANK).sum(1) for part in prompt)
    assert isinstance(asked, np.ndarray)
    return Questions(
        ids=ids[:, :width].astype(np.int16), prompt=asked, ends=counts - width + 1, level=np.full(rows, level)
    )

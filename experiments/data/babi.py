"""Questions about facts hidden in book text, like BABILong (arXiv 2406.10149).

The facts of a story (`experiments.data.stories`) stand in order between the lines of a piece of a real text, each on a
line of its own, and the question is the last line:

    ...
    And make me die the thrall of Margaret's curse,
    Mary went to the office.
    Nor mother, wife, nor England's counted queen.
    ...
    Where is Mary? office

What differs from BABILong: the stories are made here and have no fixed number, the facts stand between lines and not
between sentences, and the text is any source of `TextData`. Training reads its training documents, evaluation its
validation documents; the stories are new each time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data.config import TextData
from experiments.data.levels import LevelData, LevelTask
from experiments.data.loading import documents, manifest
from experiments.data.protocol import Batch, DataError
from experiments.data.stories import FACTS, Story, longest_sentences, story
from experiments.data.tokenizers import encode_after, load_tokenizer


@dataclasses.dataclass(frozen=True)
class BabiData(LevelData):
    """Questions about facts in book text, with a curriculum over lengths.

    Attributes:
      block_size: tokens of a block, that of the model if it has a memory; lengths are counted in blocks, the question
        and its answer included.
      blocks: lengths of the curriculum, shortest first. Each batch draws one of those reached so far.
      questions: kinds of questions, 1 to 5, of which each row draws one; evaluation measures each by itself.
      source: the text, as in `TextData`; it needs lines.
      tokenizer: as in `TextData`.
      data_dir: as in `TextData`.
      threshold: exact match at the longest length reached, mean over ten batches, that adds the next length.
      batch_size: rows of a batch.
      seed: of the samples.
    """

    block_size: int = 64
    blocks: tuple[int, ...] = (8, 12, 16, 32)
    questions: tuple[int, ...] = (1,)
    source: str = "shakespeare"
    tokenizer: str = "bytes"
    data_dir: str | None = None

    kind = "babi"
    title = "bAbI-like"

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in itertools.pairwise(self.questions))
        if not self.questions or not rising or not set(self.questions) <= set(FACTS):
            raise ValueError(f"questions={self.questions}: must be kinds from 1 to 5 in rising order, at least one")
        if self.text.weighted:
            raise ValueError(f"source={self.source!r}: must be whole texts, such as shakespeare or text:GLOB")

    @property
    def text(self) -> TextData:
        """The text around the facts."""
        return TextData(source=self.source, tokenizer=self.tokenizer, data_dir=self.data_dir)

    @property
    def shortest(self) -> int:
        """Blocks that hold the longest story without other text; reads the tokenizer."""
        encode, longest = _Encoder(self.load_tokenizer()), 0
        for kind in self.questions:
            fact, question, answer = longest_sentences(kind)
            story = Story((fact,) * FACTS[kind][1], question, answer)
            longest = max(longest, sum(map(len, (*encode.facts(story), *encode.asked(story)))))
        return -(-(longest - 1) // self.block_size)

    def check_levels(self, levels: Sequence[int] | None = None) -> None:
        chosen, shortest = tuple(self.levels if levels is None else levels), self.shortest
        if any(blocks < shortest for blocks in chosen):
            raise ValueError(
                f"blocks={chosen}: must be at least {shortest} with block_size={self.block_size} and "
                f"questions={self.questions}, so that facts, question and answer fit"
            )

    def parts(self) -> dict[str, LevelData]:
        return {f", question {kind}": dataclasses.replace(self, questions=(kind,)) for kind in self.questions}

    def load_tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer)

    def task(self, split: str = "train") -> Babi:
        """What makes the samples.

        Args:
          split: of the text, `train` or `validation`.

        Raises:
          DataError: the text cannot be had, is none, or has no lines.
        """
        return Babi(self, split)


class _Encoder:
    """The ids of the parts of a story."""

    def __init__(self, tokenizer: Any) -> None:
        self.line = functools.cache(lambda text: encode_after(tokenizer, "\n", text))
        self.answer = functools.cache(lambda text: encode_after(tokenizer, "?", text))

    def facts(self, story: Story) -> list[np.ndarray]:
        return [self.line(f"{fact}\n") for fact in story.facts]

    def asked(self, story: Story) -> tuple[np.ndarray, np.ndarray]:
        """The question, which begins a line, and its answer."""
        return self.line(f"\n{story.question}"), self.answer(f" {story.answer}")


class Babi(LevelTask):
    """Makes samples; a level is a length in blocks. Opens the text; see `BabiData.task`."""

    def __init__(self, config: BabiData, split: str) -> None:
        self.config: BabiData = config
        self.tokenizer = config.load_tokenizer()
        self._encode = _Encoder(self.tokenizer)
        self._documents = documents(config.text, split)
        ids = range(self.tokenizer.vocab_size)
        self._ends = np.array(["\n" in self.tokenizer.decode([number]) for number in ids])  # tokens that end a line
        self._content = manifest(config.text)["splits"][split]

    def sample(self, rng: np.random.Generator, rows: int, level: int) -> Batch:
        """Random samples of a length in blocks; the last targets are the answer. See `LevelTask.sample`."""
        length = level * self.config.block_size
        ids = np.empty((rows, length + 1), np.int32)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            kind = self.config.questions[int(rng.integers(len(self.config.questions)))]
            told = story(kind, rng)
            facts, (question, answer) = self._encode.facts(told), self._encode.asked(told)
            room = length + 1 - sum(map(len, (*facts, question, answer)))
            if room < 0:
                raise ValueError(f"blocks={level}: must be at least {self.config.shortest}")
            ids[row] = np.concatenate([*self._between(rng, facts, self._piece(rng, room)), question, answer])
            weights[row, length - len(answer) :] = 1
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        del found["data_dir"]  # which may be elsewhere another time, as may be the tokenizer's file
        return found | {"tokenizer": self.tokenizer.hash, "content": self._content}

    def _piece(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Text that begins at the beginning of a random line; after the end of a document comes the next one."""
        number = int(rng.integers(len(self._documents)))
        tokens = self._documents[number].tokens
        starts = np.flatnonzero(self._ends[tokens[:-1]]) + 1
        if not len(starts):
            name = self._documents[number].name
            raise DataError(f"source={self.config.source!r}: the document {name!r} has one line only; facts need more")
        parts = [tokens[starts[int(rng.integers(len(starts)))] :]]
        while sum(map(len, parts)) < length:
            number = (number + 1) % len(self._documents)
            parts.append(self._documents[number].tokens)
        return np.concatenate(parts)[:length]

    def _between(self, rng: np.random.Generator, facts: list[np.ndarray], text: np.ndarray) -> list[np.ndarray]:
        """The facts in order, each at the beginning of a random line, and the text between them."""
        starts = np.concatenate([[0], np.flatnonzero(self._ends[text]) + 1])
        places = np.sort(starts[rng.integers(len(starts), size=len(facts))])
        pieces = np.split(text, places)
        return [pieces[0], *(part for pair in zip(facts, pieces[1:], strict=True) for part in pair)]

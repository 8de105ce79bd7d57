"""Questions about a graph of classes, like ProsQA: which of two things is somebody? (LIMe, arXiv 2502.09245).

    Every rilpus is a gompus . Ada is a rilpus . Ben is a tulpus . Every tulpus is a zampus . ...
    Is Ada a zampus or gompus ? Ada is a rilpus . Every rilpus is a gompus . Ada is a gompus . <eos>

Two people stand at the top of a random graph without circles. Class after class is hung below it: into one person's
branch, into the other's, or anywhere, so that some classes lie below both. One option is a class below the first person
only, the other a class below the second only, both equally many steps down. Then it is drawn which of the two is asked
about, which option is named first, what everybody and everything is called, and the order of the facts.

So nothing but the way from the asked person can tell the options apart: to swap the people is to swap the right answer
with the wrong one, and both are equally likely, whatever the facts. The wrong option has a branch of its own, as deep
as that of the right one.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from experiments.data.questions import (
    BLANK,
    QuestionData,
    Questions,
    QuestionTask,
    Uniforms,
    WordTokenizer,
    as_questions,
)

NAMES = (
    *("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ivy", "Jon"),
    *("Kim", "Leo", "Mia", "Ned", "Ora", "Pip", "Rex", "Sue", "Tom", "Uma"),
)
CLASSES = tuple(f"{start}{middle}pus" for start in "bdfgklmrtz" for middle in ("am", "il", "om", "ul"))
WORDS = ("Every", "is", "a", ".", "Is", "or", "?")

_CHUNK = 2048  # part of what decides the questions
_PARENTS = (1, 2)  # of every other class, in random order
_BRANCH = 0.35  # chance that a class is hung below one person, and as much that it is below the other
_FAR = 1 << 10  # steps to where no way leads
_DEEPER = 3.0  # how much more likely each step down makes a class to be a parent, so that ways get long


@dataclasses.dataclass(frozen=True)
class ProsqaData(QuestionData):
    """Questions about a graph of classes with the reasoning that answers them.

    Attributes:
      steps: sentences of the reasoning, from the person to the right option; several are pooled in one run.
      classes: of a graph.
      samples: training questions per number of steps, all different.
      test_samples: test questions per number of steps, all different. They do not depend on the seed.
      batch_size: rows of a batch.
      seed: of the training questions and of their order.
    """

    samples: int = 6000
    test_samples: int = 200
    steps: tuple[int, ...] = (2, 3, 4)
    classes: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not rising or self.steps[0] < 2:
            raise ValueError(f"steps={self.steps}: must be numbers from 2 on in rising order, at least one")
        if not 2 * self.steps[-1] <= self.classes <= len(CLASSES):
            raise ValueError(
                f"classes={self.classes}: must be from twice the longest of steps={self.steps}, so that both options "
                f"can be so deep, to {len(CLASSES)}, for which there are names"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        return self.steps

    @property
    def length(self) -> int:
        # Facts and steps have six words, those about people five; the question has seven.
        return 6 * self.facts + 7 + 6 * self.steps[-1] - 1 + 5

    @property
    def facts(self) -> int:
        """The most facts that a graph has."""
        return sum(_PARENTS[i % len(_PARENTS)] for i in range(self.classes))

    def task(self) -> Prosqa:
        return Prosqa(self)


class ProsqaTokenizer(WordTokenizer):
    """Names, classes and the words and marks between them."""

    def __init__(self) -> None:
        super().__init__("prosqa", [*NAMES, *CLASSES, *WORDS])

    def _split(self, text: str) -> list[str]:
        return re.findall(rf"{self.END}|\w+|\S", text)


class Prosqa(QuestionTask):
    """Makes questions and reads answers."""

    def __init__(self, config: ProsqaData) -> None:
        self.config: ProsqaData = config
        self.tokenizer = ProsqaTokenizer()

    def draw(self, level: int, seed: int, chunk: int) -> Questions:
        random = Uniforms(seed, level, chunk)
        parents, steps = _graphs(random, _CHUNK, self.config.classes)
        fit = [(steps[:, p] == level) & (steps[:, 1 - p] == _FAR) for p in (0, 1)]  # the classes for options
        both = fit[0].any(1) & fit[1].any(1)
        parents, steps = parents[both], steps[both]
        options = np.concatenate([_pick(random, classes[both]) for classes in fit], axis=1)
        asked, first = _coins(random, len(options)), _coins(random, len(options))
        path = _way(random, parents, steps[np.arange(len(options)), asked[:, 0]], _at(options, asked), level)

        names = _deal(random, len(options), len(NAMES), 2)
        classes = _deal(random, len(options), len(CLASSES), self.config.classes)
        words = np.concatenate([names, len(NAMES) + classes], axis=1)
        either = (_at(words, _at(options, index)) for index in (first, 1 - first))
        question = self._text("Is", _at(words, asked), "a", next(either), "or", next(either), "?")
        reasoning = self._sentences(words, path[:, :-1], path[:, 1:])
        answer = self._sentences(words, path[:, :1], path[:, -1:])
        end, width = self.tokenizer.separator, self.config.length + 1
        return as_questions([self._facts(random, words, parents), question], [reasoning, answer], end, width, level)

    def answer(self, ids: np.ndarray) -> int | None:
        """The class in the last sentence; None if this is not `NAME is a CLASS .`, followed by the end."""
        dot, *rest = (self.tokenizer.ids[word] for word in (".", "is", "a", ".", self.tokenizer.END))
        last = [dot, *map(int, ids)][-7:]  # there may be nothing before the answer
        if len(last) < 7 or [last[i] for i in (0, 2, 3, 5, 6)] != [dot, *rest]:
            return None
        good = last[1] < len(NAMES) <= last[4] < len(NAMES) + len(CLASSES)
        return last[4] if good else None

    def _facts(self, random: Uniforms, words: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """The sentences of all edges in random order, int64 [n, 6 facts] with gaps."""
        rows, nodes, _ = parents.shape
        edges = parents.reshape(rows, nodes**2)
        order = np.argsort(np.where(edges, random(*edges.shape), 1.0), axis=1)[:, : self.config.facts]
        things, subjects = np.divmod(order, nodes)
        there = np.repeat(_at(edges, order), 6, axis=1)
        return np.where(there, self._sentences(words, subjects, things), BLANK)

    def _sentences(self, words: np.ndarray, subjects: np.ndarray, things: np.ndarray) -> np.ndarray:
        """`Every SUBJECT is a THING .`, without Every for people.

        Args:
          words: what each node is called: int64 [n, nodes].
          subjects: nodes, int64 [n, k].
          things: nodes, int64 [n, k].

        Returns:
          Words, int64 [n, 6 k], with gaps.
        """
        every = np.where(subjects < 2, BLANK, self.tokenizer.ids["Every"])
        return self._text(every, _at(words, subjects), "is", "a", _at(words, things), ".")

    def _text(self, *parts: str | np.ndarray) -> np.ndarray:
        """Sentences put together from words and arrays of words [n, k]: int64 [n, parts k]."""
        shape = next(part.shape for part in parts if isinstance(part, np.ndarray))
        columns = [np.full(shape, self.tokenizer.ids[p]) if isinstance(p, str) else p for p in parts]
        return np.stack(columns, axis=-1).reshape(shape[0], shape[1] * len(parts))


def _graphs(random: Uniforms, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Random graphs whose nodes are two people, 0 and 1, and then classes, each below some of those before it.

    Returns:
      parents: whether the second node is a parent of the first, so that "every second is a first" is a fact: bool
        [n, nodes, nodes].
      steps: from a person down to a node, _FAR where no way leads: int64 [n, 2, nodes].
    """
    nodes = classes + 2
    count = np.resize(_PARENTS, classes)[_deal(random, rows, classes, classes)]
    parents = np.zeros((rows, nodes, nodes), bool)
    steps = np.full((rows, 2, nodes), _FAR)
    steps[:, 0, 0] = steps[:, 1, 1] = 0
    depth = np.zeros((rows, nodes))
    for node in range(2, nodes):
        below = steps[:, :, :node] < _FAR
        kind = random(rows, 1)
        allowed = np.where(kind < _BRANCH, ~below[:, 1], np.where(kind < 2 * _BRANCH, ~below[:, 0], True))
        # The largest of log(uniform) / weight are a sample without repetition, with odds by weight.
        race = np.log1p(-random(rows, node)) / (1 + _DEEPER * depth[:, :node])
        place = np.argsort(np.argsort(np.where(allowed, -race, np.inf), axis=1), axis=1)
        chosen = allowed & (place < count[:, node - 2, None])
        parents[:, node, :node] = chosen
        shortest = np.where(chosen[:, None], steps[:, :, :node], _FAR).min(2)
        steps[:, :, node] = np.minimum(shortest + 1, _FAR)
        depth[:, node] = np.where(chosen, depth[:, :node] + 1, 0).max(1)
    return parents, steps


def _way(random: Uniforms, parents: np.ndarray, steps: np.ndarray, to: np.ndarray, length: int) -> np.ndarray:
    """A random one of the shortest ways.

    Args:
      random: source of the choices.
      parents: see `_graphs`.
      steps: from the person who is asked about: int64 [n, nodes].
      to: where the ways end: int64 [n, 1].
      length: of the ways.

    Returns:
      Their nodes, int64 [n, length + 1].
    """
    way = [to]
    for step in reversed(range(length)):
        above = parents[np.arange(len(to)), way[0][:, 0]]
        way.insert(0, _pick(random, above & (steps == step)))
    return np.concatenate(way, axis=1)


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The values [n, any] of each row at its indices [n, k]."""
    return np.take_along_axis(values, index, axis=1)


def _pick(random: Uniforms, these: np.ndarray) -> np.ndarray:
    """A random true place of each row: bool [n, k] to int64 [n, 1]."""
    return np.argmax(np.where(these, random(*these.shape), -1.0), axis=1)[:, None]


def _coins(random: Uniforms, rows: int) -> np.ndarray:
    """0 or 1, int64 [n, 1]."""
    return (random(rows, 1) < 0.5).astype(int)


def _deal(random: Uniforms, rows: int, of: int, count: int) -> np.ndarray:
    """`count` different ones of `range(of)` in random order, int64 [n, count]."""
    return np.argsort(random(rows, of), axis=1)[:, :count]

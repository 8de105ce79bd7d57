"""The Arithmetic Expression Task: expressions rewritten step by step to a number (LIMe, arXiv 2502.09245).

    ( 7 + 5 ) / ( 6 - 4 ) = 12 / ( 6 - 4 ) = 12 / 2 = 6 <eos>

Expressions are built backwards, as by Feng et al. (2023): a random number, then again and again a random number of
the line is replaced by `a op b` of the same value, in brackets where precedence demands them. The lines in reverse
order are the rewriting, which is therefore one of several right ones: what comes next is drawn. There are two readings
of what a number is, since the LIMe paper does not say:

* `modular`: residues modulo 11, as in Feng et al., where every operation is possible. `x + a - b` may stand for
  `x + ( a - b )`, and `x * a / b` for `x * ( a / b )`: they are equal.
* `integers`: 0 to 200, as LIMe's printed example and its number tokens suggest. No number of any line, and of no other
  order of evaluation, is outside this range, and division is exact. For that, brackets stay around a sum to the right
  of a plus and around a product to the right of a times. Factors and divisors of 1 are left out.

In both readings each operator that can give the number is equally likely, then each pair of its operands.
"""

from __future__ import annotations

import dataclasses
import functools
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
    pack,
)

MODULUS = 11
LARGEST = 200
SIGNS = ("+", "-", "*", "/", "(", ")", "=")

_CHUNK = 4096  # part of what decides the questions
_RANKS = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclasses.dataclass(frozen=True)
class ArithmeticData(QuestionData):
    """Arithmetic expressions with their step-by-step rewriting.

    Attributes:
      operands: numbers of an expression; several are pooled in one run.
      reading: what a number is: `integers` (0 to 200, exact division) or `modular` (residues modulo 11).
      samples: training expressions per number of operands, all different.
      test_samples: test expressions per number of operands, all different. They do not depend on the seed.
      batch_size: rows of a batch.
      seed: of the training expressions and of their order.
    """

    operands: tuple[int, ...] = (6,)
    reading: str = "integers"

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.operands, self.operands[1:], strict=False))
        if not self.operands or not rising or self.operands[0] < 2:
            raise ValueError(f"operands={self.operands}: must be numbers from 2 on in rising order, at least one")
        if self.reading not in ("integers", "modular"):
            raise ValueError(f"reading={self.reading!r}: must be integers or modular")

    @property
    def levels(self) -> tuple[int, ...]:
        return self.operands

    @property
    def length(self) -> int:
        return _longest(self.operands[-1]) - 1

    def task(self) -> Arithmetic:
        return Arithmetic(self)


def _longest(operands: int) -> int:
    """Tokens of the longest rewriting with all of its lines, signs of equality and end."""
    # k numbers have k - 1 operators and brackets around all but the outermost; each line has one more token after it.
    return sum(max(1, 4 * k - 5) + 1 for k in range(1, operands + 1))


class ArithmeticTokenizer(WordTokenizer):
    """One token per number, operator and bracket; number n is id n."""

    def __init__(self, reading: str) -> None:
        self.numbers = MODULUS if reading == "modular" else LARGEST + 1
        super().__init__("arithmetic", [*map(str, range(self.numbers)), *SIGNS])

    def _split(self, text: str) -> list[str]:
        return re.findall(rf"\d+|{self.END}|\w+|\S", text)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """All operations by operator and value; the operators are in the order of `_RANKS`.

    Attributes:
      a: first operands, sorted by operator, then by value: int64 [operations].
      b: second operands: int64 [operations].
      start: where the operations of an operator and value are: int64 [operators, numbers].
      count: how many there are: int64 [operators, numbers].
      operators: for each value first those that have an operation for it: int64 [numbers, operators].
    """

    a: np.ndarray
    b: np.ndarray
    start: np.ndarray
    count: np.ndarray
    operators: np.ndarray


@functools.cache
def _pairs(reading: str) -> _Pairs:
    numbers = ArithmeticTokenizer(reading).numbers
    a, b = np.divmod(np.arange(numbers**2), numbers)
    if reading == "modular":
        inverse = np.array([0, *(pow(number, -1, MODULUS) for number in range(1, MODULUS))])
        value = np.stack([a + b, a - b, a * b, a * inverse[b]]) % MODULUS
        good = np.stack([a >= 0, a >= 0, a >= 0, b > 0])
    else:
        divisor = np.maximum(b, 1)
        value = np.stack([a + b, a - b, a * b, a // divisor])
        good = np.stack([a >= 0, a >= 0, (a != 1) & (b != 1), (b > 1) & (a % divisor == 0)])
        good &= (value >= 0) & (value <= LARGEST)
    operator, operands = np.nonzero(good)
    key = operator * numbers + value[good]
    operands = operands[np.argsort(key, kind="stable")]
    count = np.bincount(key, minlength=len(_RANKS) * numbers).reshape(-1, numbers)
    start = np.cumsum(count).reshape(count.shape) - count
    return _Pairs(a[operands], b[operands], start, count, np.argsort(count == 0, axis=0, kind="stable").T)


class Arithmetic(QuestionTask):
    """Makes expressions and reads answers."""

    def __init__(self, config: ArithmeticData) -> None:
        self.config: ArithmeticData = config
        self.tokenizer: ArithmeticTokenizer = ArithmeticTokenizer(config.reading)
        self._pairs = _pairs(config.reading)
        self._signs = np.array([self.tokenizer.ids[sign] for sign in _RANKS])
        self._rank = np.zeros(self.tokenizer.vocab_size + 1, int)  # the last one is that of BLANK
        for sign, rank in _RANKS.items():
            self._rank[self.tokenizer.ids[sign]] = rank

    def draw(self, level: int, seed: int, chunk: int) -> Questions:
        random = Uniforms(seed, level, chunk)
        lines = [(random(_CHUNK, 1) * self.tokenizer.numbers).astype(int)]
        for numbers in range(1, level):
            lines.append(self._expand(lines[-1], numbers, random(_CHUNK, 3)))
        equals = np.full((_CHUNK, 1), self.tokenizer.ids["="])
        first, *rest = lines[::-1]
        parts = [part for line in rest for part in (line, equals)]
        width = self.config.length + 1
        return as_questions([first, equals], parts[:-1], self.tokenizer.separator, width, level)

    def answer(self, ids: np.ndarray) -> int | None:
        """The number between the last sign of equality and the end; None if there is not exactly a number."""
        equals = self.tokenizer.ids["="]
        before, *last = [equals, *map(int, ids)][-3:]  # the question ends in a sign of equality
        good = before == equals and len(last) == 2 and last[1] == self.tokenizer.separator
        return last[0] if good and last[0] < self.tokenizer.numbers else None

    def _expand(self, line: np.ndarray, numbers: int, random: np.ndarray) -> np.ndarray:
        """Replaces a number of each line by an operation of the same value.

        Args:
          line: int64 [n, t], BLANK at the ends of lines.
          numbers: in each line.
          random: numbers from 0 to below 1, [n, 3].

        Returns:
          The new lines, int64 [n, t + 4].
        """
        rows, pairs = np.arange(len(line)), self._pairs
        is_number = (line != BLANK) & (line < self.tokenizer.numbers)
        place = np.argmax(np.cumsum(is_number, axis=1) > (random[:, :1] * numbers).astype(int), axis=1)
        value = line[rows, place]
        choices = pairs.operators[value]
        possible = (pairs.count[:, value] > 0).sum(0)
        operator = choices[rows, (random[:, 1] * possible).astype(int)]
        pair = pairs.start[operator, value] + (random[:, 2] * pairs.count[operator, value]).astype(int)
        sign = self._signs[operator]
        around = np.pad(line, ((0, 0), (1, 1)), constant_values=BLANK)
        brackets = self._need_brackets(around[rows, place], sign, around[rows, place + 2])
        opening, closing = (np.where(brackets, self.tokenizer.ids[bracket], BLANK) for bracket in "()")
        inserted = np.stack([opening, pairs.a[pair], sign, pairs.b[pair], closing], axis=1)
        columns = np.arange(line.shape[1])
        out = np.full((len(line), line.shape[1] + 4), BLANK)
        out[rows[:, None], columns + 4 * (columns > place[:, None])] = line
        out[rows[:, None], place[:, None] + np.arange(5)] = inserted
        return pack([out])[0]

    def _need_brackets(self, left: np.ndarray, sign: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Whether an operation needs brackets between these tokens, BLANK being none: bool [n]."""
        before, here, after = self._rank[left], self._rank[sign], self._rank[right]
        tie = before == here
        if self.config.reading == "modular":  # x + (a - b) = x + a - b and x * (a / b) = x * a / b
            tie &= np.isin(left, [self.tokenizer.ids["-"], self.tokenizer.ids["/"]])
        return (before > here) | tie | (after > here)

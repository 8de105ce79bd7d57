"""Key-value pairs, and after them the question for the value of one key (GradMem, arXiv 2603.13875; ARMT, 2407.04841).

    !aX:7q!!0k:Bz!..!c9:1m!...............  ................?0k:Bz
    aX7q0kBzc91m....  ...........?0kBz                                          (without marks)

Whole pairs stand at the beginning of blocks, the rest of which is filled up; blocks of filler follow, and one block
with the question at its end. There must be so much filler that nothing of the pairs comes to the question through the
memory segments, layer by layer: the answer comes from the FAM or not at all.

* Retrieval with the context removed, as in GradMem: as many pairs to a block as fit, all keys different.
* Remember, as in ARMT (`per_block=1`): one pair to a block.
* Rewrite, as in ARMT (`per_block=1` and `live`): keys repeat, and the last value of a key counts.

GradMem removes the pairs from the model's input; here they lie out of reach. The order of pairs, keys and values is
random, and so is the pair whose key is asked for.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence

import numpy as np

from experiments.data.levels import LevelData, LevelTask
from experiments.data.protocol import Batch
from experiments.data.questions import WordTokenizer
from fam_jax import DecoderConfig

SYMBOLS = string.ascii_letters + string.digits
EDGE, ARROW, ASK, FILLER = MARKS = "!:?."


@dataclasses.dataclass(frozen=True)
class PairsData(LevelData):
    """Key-value pairs and a question, with a curriculum over the number of pairs.

    Attributes:
      block_size: tokens of a block, that of the model if it has a memory.
      pairs: numbers of pairs of the curriculum, fewest first. Each batch draws one of those reached so far.
      per_block: pairs in a block; 0 is as many as fit.
      live: so many different keys in a row, of which each pair writes any one; 0: all pairs have different keys.
      filler: blocks between the last pair and the block with the question.
      asked: questions of a training row, one after another in its last block. More teach sooner, since all else has no
        loss. They are of different pairs if there are so many: a question that comes again is answered by the one
        before, which needs no memory. What is measured is always one question.
      key_length: symbols of a key.
      value_length: symbols of a value.
      symbols: different ones, of the letters and digits.
      marks: pairs have marks around them and between key and value, as in GradMem. Without, a value stands right after
        its key, as in Zoology's recall (arXiv 2312.04927): a layer that looks at the token before is then enough to
        tell whose value it is, which small models learn much sooner.
      threshold: exact match at the most pairs reached, mean over ten batches, that adds the next number.
      batch_size: rows of a batch.
      seed: of the samples.
    """

    pairs: tuple[int, ...] = (4, 8, 16, 32, 64, 96)
    per_block: int = 0
    live: int = 0
    filler: int = 2
    asked: int = 1
    key_length: int = 2
    value_length: int = 2
    symbols: int = len(SYMBOLS)
    marks: bool = True

    kind = "pairs"
    title = "key-value"
    counted = "pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("asked", "key_length", "value_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("per_block", "live", "filler"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.key_length > 8:
            raise ValueError(f"key_length={self.key_length}: must be at most 8; there are keys enough")
        if not 2 <= self.symbols <= len(SYMBOLS):
            raise ValueError(f"symbols={self.symbols}: must be from 2 to {len(SYMBOLS)}")
        if max(self.per_block, 1) * self.pair_tokens > self.block_size:
            raise ValueError(
                f"block_size={self.block_size}: must be at least {max(self.per_block, 1) * self.pair_tokens}, so that "
                f"{max(self.per_block, 1)} pairs of {self.pair_tokens} tokens fit into a block"
            )
        most = (self.block_size + 1) // self.question_tokens  # the last token is a target only
        if self.asked > most:
            raise ValueError(
                f"asked={self.asked}: must be at most {most}, so that questions of {self.question_tokens} tokens fit "
                f"into a block of block_size={self.block_size}"
            )
        if self.live > self.keys:
            raise ValueError(f"live={self.live}: must be at most {self.keys}, the number of different keys")
        self.check_levels()

    @property
    def pair_tokens(self) -> int:
        """Tokens of a pair with its marks."""
        return self.key_length + self.value_length + 3 * self.marks

    @property
    def question_tokens(self) -> int:
        """Tokens of a question with its marks and its answer."""
        return self.key_length + self.value_length + 1 + self.marks

    @property
    def held(self) -> int:
        """Pairs in a full block."""
        return self.per_block or self.block_size // self.pair_tokens

    @property
    def keys(self) -> int:
        """Different keys that there are."""
        return self.symbols**self.key_length

    def row_blocks(self, level: int) -> int:
        return -(-level // self.held) + self.filler + 1

    def check_levels(self, levels: Sequence[int] | None = None) -> None:
        super().check_levels(levels)
        chosen = tuple(self.levels if levels is None else levels)
        if not self.live and any(pairs > self.keys for pairs in chosen):
            raise ValueError(
                f"pairs={chosen}: must be at most {self.keys}, the number of different keys of key_length="
                f"{self.key_length} with symbols={self.symbols}; make key_length larger, or let keys repeat with live"
            )

    def check_model(self, model: DecoderConfig) -> None:
        super().check_model(model)
        if model.memory is None:
            return
        # Each layer looks `segments` blocks further back; the pairs are filler + 1 blocks before the question.
        reach = model.num_layers * model.memory.segments
        if self.filler < reach:
            raise ValueError(
                f"data.filler={self.filler} leaves pairs within reach of the memory segments, layer by layer "
                f"model.num_layers={model.num_layers} x model.memory.segments={model.memory.segments} blocks back; set "
                f"data.filler to at least {reach}"
            )

    def load_tokenizer(self) -> PairsTokenizer:
        return PairsTokenizer(self.symbols)

    def task(self, split: str = "train") -> Pairs:
        return Pairs(self if split == "train" else dataclasses.replace(self, asked=1))


class PairsTokenizer(WordTokenizer):
    """Single characters: letters and digits, then the marks of pairs and questions; symbol i is id i."""

    def __init__(self, symbols: int) -> None:
        super().__init__("key-value", [*SYMBOLS[:symbols], *MARKS])

    def _split(self, text: str) -> list[str]:
        return re.findall(rf"{self.END}|\S", text)


class Pairs(LevelTask):
    """Makes samples; a level is a number of pairs."""

    def __init__(self, config: PairsData) -> None:
        self.config: PairsData = config
        self.tokenizer = config.load_tokenizer()

    def sample(self, rng: np.random.Generator, rows: int, level: int) -> Batch:
        """Random samples of so many pairs; the last targets are a value. See `LevelTask.sample`."""
        config = self.config
        config.check_levels([level])
        pool = np.stack([rng.choice(config.keys, config.live or level, replace=False) for _ in range(rows)])
        if config.live:
            which = rng.integers(config.live, size=(rows, level))
        else:
            which = np.tile(np.arange(level), (rows, 1))
        places = config.symbols ** np.arange(config.key_length)
        keys = np.take_along_axis(pool, which, axis=1)[..., None] // places % config.symbols
        values = rng.integers(config.symbols, size=(rows, level, config.value_length))

        order = np.tile(np.arange(-(-config.asked // level) * level) % level, (rows, 1))
        asked = np.take_along_axis(which, rng.permuted(order, axis=1)[:, : config.asked], axis=1)
        same = which[:, None] == asked[..., None]
        last = level - 1 - np.argmax(same[..., ::-1], axis=2)  # of the pairs with the key, the last one counts
        row = np.arange(rows)[:, None]
        edge, arrow = ([EDGE], [ARROW]) if config.marks else ([], [])
        questions = self._joined(ASK, keys[row, last], *arrow, values[row, last])

        pairs = self._joined(*edge, keys, *arrow, values, *edge)
        filler = self.tokenizer.ids[FILLER]
        blocks = -(-level // config.held)
        cells = np.full((rows, blocks * config.held, config.pair_tokens), filler)
        cells[:, :level] = pairs
        text = np.full((rows, config.row_blocks(level), config.block_size), filler)
        width = config.held * config.pair_tokens
        text[:, :blocks, :width] = cells.reshape(rows, blocks, width)
        ids = np.concatenate([text.reshape(rows, -1), np.full((rows, 1), filler)], axis=1).astype(np.int32)
        width = config.asked * config.question_tokens
        ids[:, -width:] = questions.reshape(rows, width)
        weights = np.zeros(ids.shape, np.float32)
        answer = np.arange(config.question_tokens) >= config.question_tokens - config.value_length
        weights[:, -width:] = np.tile(answer, config.asked)
        weights = weights[:, 1:]
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}

    def _joined(self, *parts: str | np.ndarray) -> np.ndarray:
        """Marks and ids [..., any] one after another: int64 [..., sum of widths]."""
        shape = next(part.shape[:-1] for part in parts if isinstance(part, np.ndarray))
        ids = [np.full((*shape, 1), self.tokenizer.ids[p]) if isinstance(p, str) else p for p in parts]
        return np.concatenate(ids, axis=-1)

"""State tracking: the running product of a sequence of generators of a group (arXiv 2404.08819, 2411.12537).

    a b a  ->  021 102 012 ...

Tokens are generators, and the target of each is the product of all up to it, an element of the group, which is never
part of the input. `parity` is the group of two elements, where a token of two changes the state; `s3` and `a5` are the
permutations of three things and the even ones of five. Nothing but the product of the tokens before a block has to be
kept, so a memory that composes it block by block could do this for texts of any length.

Literature mostly draws tokens from all elements of a group. Here there are two generators, and for parity a token that
changes nothing as well.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from experiments.data.levels import LevelData, LevelTask
from experiments.data.protocol import Batch
from experiments.data.questions import WordTokenizer

# A permutation as where it takes 0, 1, 2, ...; the tokens a and b are the generators in this order.
GENERATORS = {
    "parity": ((0, 1), (1, 0)),
    "s3": ((1, 0, 2), (1, 2, 0)),
    "a5": ((1, 2, 0, 3, 4), (1, 2, 3, 4, 0)),
}


@dataclasses.dataclass(frozen=True)
class TrackingData(LevelData):
    """The running product of generators of a group, with a curriculum over lengths.

    Attributes:
      block_size: tokens of a block, that of the model if it has a memory; lengths are counted in blocks. The product of
        the tokens of a block is found by few layers only if it is small.
      blocks: lengths of the curriculum, shortest first. Each batch draws one of those reached so far.
      group: `parity`, `s3` or `a5`.
      targets: in training the product is asked for at every token (`dense`) or at the last one of each block (`ends`).
        What is measured is always the product of the whole text.
      threshold: share of rows of the longest length reached whose products are all right, mean over ten batches, that
        adds the next length.
      batch_size: rows of a batch.
      seed: of the samples.
    """

    block_size: int = 8
    blocks: tuple[int, ...] = (1, 2, 4, 8)
    group: str = "parity"
    targets: str = "dense"

    kind = "tracking"
    title = "state tracking"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in GENERATORS:
            raise ValueError(f"group={self.group!r}: must be one of {', '.join(GENERATORS)}")
        if self.targets not in ("dense", "ends"):
            raise ValueError(f"targets={self.targets!r}: must be dense or ends")

    def load_tokenizer(self) -> WordTokenizer:
        elements, _ = _group(self.group)
        return WordTokenizer("state tracking", [*("".join(map(str, e)) for e in elements), "a", "b"])

    def task(self, split: str = "train") -> Tracking:
        return Tracking(self, split)


@functools.cache
def _group(name: str) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The elements, the identity first, and the number of each element after each generator: int64 [elements, 2]."""
    generators = GENERATORS[name]
    elements = [tuple(range(len(generators[0])))]
    after = []
    for element in elements:  # grows on the way
        products = [tuple(generator[place] for place in element) for generator in generators]
        elements += [product for product in dict.fromkeys(products) if product not in elements]
        after.append([elements.index(product) for product in products])
    return elements, np.array(after)


class Tracking(LevelTask):
    """Makes samples; a level is a length in blocks.

    Args:
      config: the settings.
      split: `train`, or else the product of the whole text alone has weight 1.
    """

    def __init__(self, config: TrackingData, split: str = "train") -> None:
        self.config: TrackingData = config
        self.tokenizer = config.load_tokenizer()
        self._train = split == "train"

    def sample(self, rng: np.random.Generator, rows: int, level: int) -> Batch:
        """Random samples of a length in blocks; targets are products, not next tokens. See `LevelTask.sample`."""
        self.config.check_levels([level])
        elements, after = _group(self.config.group)
        block = self.config.block_size
        drawn = rng.integers(after.shape[1], size=(rows, level * block))
        products = np.empty(drawn.shape, np.int32)
        state = np.zeros(rows, int)
        for place in range(drawn.shape[1]):
            state = after[state, drawn[:, place]]
            products[:, place] = state
        weights = np.zeros(drawn.shape, np.float32)
        if not self._train:
            weights[:, -1] = 1
        elif self.config.targets == "dense":
            weights[:] = 1
        else:
            weights[:, block - 1 :: block] = 1
        return {"tokens": (len(elements) + drawn).astype(np.int32), "targets": products, "weights": weights}

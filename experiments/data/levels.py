"""Tasks that are made as they are needed: what they share, and the curriculum over their levels.

A task has levels of difficulty, which are lengths in blocks or numbers of pairs. Samples are a function of the seed and
the step, so nothing is prepared or stored, and training goes on exactly where it stopped.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.data.protocol import Batch, DataError
from experiments.typed import check_types
from fam_jax import DecoderConfig

_WINDOW = 10  # batches at the hardest level over which the curriculum takes its mean


@dataclasses.dataclass(frozen=True)
class LevelData(abc.ABC):
    """Settings that the tasks share.

    Attributes:
      block_size: tokens of a block, that of the model if it has a memory.
      threshold: exact match at the hardest level reached, mean over ten batches, that adds the next level.
      batch_size: rows of a batch.
      seed: of the samples.
    """

    block_size: int = 16
    threshold: float = 0.9
    batch_size: int = 32
    seed: int = 0

    kind = ""
    """What `experiments.evaluate` and results call the measure."""
    title = ""
    """What messages call the task."""
    counted = "blocks"
    """The field of the levels."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("block_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        levels = self.levels
        if not levels or levels[0] < 1 or any(a >= b for a, b in itertools.pairwise(levels)):
            what = "lengths" if self.counted == "blocks" else "numbers"
            raise ValueError(f"{self.counted}={levels}: must be {what} in rising order, at least one, from 1 on")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: must be between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of the curriculum, easiest first."""
        return getattr(self, self.counted)

    def row_blocks(self, level: int) -> int:
        """Blocks of a row of a level."""
        return level

    def check_levels(self, levels: Sequence[int] | None = None) -> None:
        """Raises a ValueError if there are no samples of a level; of the curriculum's unless told which."""
        chosen = tuple(self.levels if levels is None else levels)
        if any(level < 1 for level in chosen):
            raise ValueError(f"{self.counted}={chosen}: must be at least 1")

    def check_model(self, model: DecoderConfig) -> None:
        """Raises a ValueError if the settings do not suit a model."""
        if model.memory is not None and model.memory.block_size != self.block_size:
            raise ValueError(
                f"data.block_size={self.block_size} and model.memory.block_size={model.memory.block_size} differ, but "
                f"the {self.title} task counts its lengths in the blocks of the model; set both to the same value"
            )

    def parts(self) -> dict[str, LevelData]:
        """What evaluation measures apart, by what it adds to a label."""
        return {"": self}

    @abc.abstractmethod
    def load_tokenizer(self) -> Any:
        """The tokenizer. Raises DataError if it cannot be read."""

    @abc.abstractmethod
    def task(self, split: str = "train") -> LevelTask:
        """What makes the samples.

        Args:
          split: `train`, or `validation` for samples on which a model is measured.
        """


class LevelTask(abc.ABC):
    """Makes samples."""

    config: LevelData
    tokenizer: Any

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator, rows: int, level: int) -> Batch:
        """Random samples of a level.

        Args:
          rng: source of all that is random.
          rows: samples.
          level: of all of them.

        Returns:
          `tokens`, `targets` int32 and `weights` float32, each [rows, config.row_blocks(level) * block_size]. Weight 1
          is on what is to be answered, 0 on all else.

        Raises:
          ValueError: there are no samples of the level.
        """

    def identity(self) -> dict[str, Any]:
        """All that decides the samples, JSON-able."""
        values = dataclasses.asdict(self.config).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


class LevelBatches:
    """Endless training batches with the curriculum; see `experiments.data.protocol.Batches`.

    Each batch draws one of the levels reached so far.
    """

    def __init__(self, config: LevelData) -> None:
        self.task = config.task()
        self._config = config
        self._step = 0
        self._level = 1  # levels reached
        self._drawn = 0  # index of the level of the latest batch
        self._recent: list[float] = []  # exact match of the latest batches at the hardest level

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rng = np.random.default_rng([self._config.seed, self._step])
        self._drawn = int(rng.integers(self._level))
        self._step += 1
        return self.task.sample(rng, self._config.batch_size, self._config.levels[self._drawn])

    def observe(self, metrics: dict[str, float]) -> None:
        """Takes note of the latest batch's `exact_match` and adds the next level once it is good enough."""
        if self._drawn != self._level - 1:
            return
        self._recent = [*self._recent, float(metrics["exact_match"])][-_WINDOW:]
        good = len(self._recent) == _WINDOW and sum(self._recent) >= self._config.threshold * _WINDOW
        if good and self._level < len(self._config.levels):
            self._level += 1
            self._recent = []

    def get_state(self) -> dict[str, Any]:
        """The position: the step, and where the curriculum is."""
        return {
            "config": self.task.identity(),
            "step": self._step,
            "level": self._level,
            "drawn": self._drawn,
            "recent": self._recent,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state` was taken.

        Raises:
          DataError: `state` belongs to other settings.
        """
        mine, saved = self.get_state()["config"], state["config"]
        for name in mine | saved:
            value = mine.get(name)
            if saved.get(name) != value:
                raise DataError(
                    f"this position belongs to {self._config.title} data with {name}={saved.get(name)!r}, not "
                    f"{value!r}; use the same data settings, or start a new run"
                )
        self._step, self._level = state["step"], state["level"]
        self._drawn, self._recent = state["drawn"], list(state["recent"])

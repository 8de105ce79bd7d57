"""What a run's data config stands for: its batches, and how several processes come to the same."""

from __future__ import annotations

from typing import Any

import jax

from experiments.data import Batches, DataError, TextData, load, prepare
from experiments.data.babi import BabiData
from experiments.data.cache import LOCK_SECONDS
from experiments.data.levels import LevelBatches, LevelData
from experiments.data.questions import QuestionBatches, QuestionData
from experiments.distributed import check_same, on_main
from experiments.files import is_remote


def load_data(data: Any, split: str) -> Batches:
    """Endless batches of a split of any data config; tasks with levels have no other split than "train"."""
    if isinstance(data, QuestionData):
        return QuestionBatches(data, split)
    return LevelBatches(data) if isinstance(data, LevelData) else load(data, split)


def prepare_together(data: Any) -> None:
    """Prepares text on all processes of a job, which must all call this and wait for each other up to LOCK_SECONDS.

    Other data needs no preparation; that of a process which is a job of its own is prepared as it is read.

    Raises:
        DataError: See `prepare`.
        DistributedError: The processes found other text.
    """
    if isinstance(data, BabiData):
        data = data.text
    if jax.process_count() == 1 or not isinstance(data, TextData):
        return
    if is_remote(data.directory):  # once, by the main process; the others copy it
        on_main(lambda: prepare(data), (DataError, ValueError, OSError), LOCK_SECONDS)
    check_same("data", prepare(data), LOCK_SECONDS)

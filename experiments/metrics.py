"""Metrics of a run: JSON lines and TensorBoard, without a step twice when a run is continued."""

from __future__ import annotations

import collections
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from experiments.typed import to_json


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order: "step", "split" ("train" or "validation") and the metrics.

    A last line that was cut off, because the process was killed while it wrote, is left out.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder."""

    def __init__(self, directory: Path, step: int):
        """Opens the files of a run that is at `step`, dropping what an earlier process wrote beyond it.

        Args:
            directory: The run's folder.
            step: Steps that the run has made; 0 starts new files.
        """
        self.path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() else []
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(replacement, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Adds one line, numbers that are not finite as null; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(to_json({"step": step, "split": split, **metrics})) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Finishes both."""
        self._file.close()
        self._board.close()


class Throughput:
    """Tokens per second over the last steps, leaving out compilation, evaluation and checkpoints."""

    def __init__(self, steps: int = 20):
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=steps + 1)

    def step(self, tokens: int) -> None:
        """Notes that a step with this many tokens has just ended."""
        self._marks.append((time.perf_counter(), tokens))

    def interrupt(self) -> None:
        """Forgets what came before; something other than a step is about to take time."""
        self._marks.clear()

    @property
    def rate(self) -> float | None:
        """Tokens per second; None until two steps have ended without an interruption between them."""
        if len(self._marks) < 2:
            return None
        elapsed = self._marks[-1][0] - self._marks[0][0]
        return sum(tokens for _, tokens in list(self._marks)[1:]) / max(elapsed, 1e-9)

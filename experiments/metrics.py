"""Metrics of a run: JSON lines and TensorBoard, without a step twice when a run is continued."""

from __future__ import annotations

import collections
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.files import as_os_errors, copy_files, files_below, is_remote, location, write_text
from experiments.flops import mfu
from experiments.integrity import first_line, warn
from experiments.process import BusyError
from experiments.typed import to_json


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order: "step", "split" ("train" or "validation") and the metrics.

    A last line that was cut off, because the process was killed while it wrote, is left out.
    """
    rows = []
    file = location(path)
    with as_os_errors(file):
        text = file.read_text(encoding="utf-8")
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


UPLOAD_SECONDS = 30.0  # between two uploads of metrics to object storage


class MetricsLog:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder.

    In object storage nothing can be appended to: there, both are uploaded whole, now and then, with every checkpoint
    and at the end. An upload that fails is made again with the next one, and training goes on.
    """

    def __init__(self, directory: Path, step: int, held: Callable[[], None] = lambda: None):
        """Opens the files of a run that is at `step`, dropping what an earlier process wrote beyond it.

        Args:
            directory: The run's folder.
            step: Steps that the run has made; 0 starts new files.
            held: Raises BusyError if another process has taken the folder over, whose files are then left alone.
        """
        from tensorboardX import SummaryWriter  # imports torch where there is one, for which only writers should wait

        self._held = held
        self.path = directory / "metrics.jsonl"
        with as_os_errors(directory):
            kept = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() else []
        before = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.path, before)
        self._upload: Path | None = None
        self._uploaded = time.monotonic()
        local = directory
        if is_remote(directory):
            self._upload, local = directory, Path(tempfile.mkdtemp(prefix="fam-jax-metrics-"))
            write_text(local / self.path.name, before)
        self._local = local
        self._file = (local / self.path.name).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(local / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Adds one line, numbers that are not finite as null; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(to_json({"step": step, "split": split, **metrics})) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
        if self._upload is not None and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Uploads both if they are in object storage; on a disk, lines are there when they are written."""
        if self._upload is None:
            return
        self._board.flush()
        self._copy(self._upload, "it is tried again with the next lines")
        self._uploaded = time.monotonic()

    def close(self) -> None:
        """Finishes both. What cannot be uploaded stays on this machine; a warning says where."""
        self._file.close()
        self._board.close()
        if self._upload is not None and self._copy(self._upload, "copy it to where it belongs, or delete it"):
            shutil.rmtree(self._local, ignore_errors=True)

    def _copy(self, target: Path, remedy: str) -> bool:
        """Uploads both; whether that has succeeded."""
        try:
            self._held()
            names = [path.relative_to(self._local).as_posix() for path in files_below(self._local)]
            copy_files(self._local, target, names)
        except (OSError, BusyError) as error:  # which the next checkpoint meets, too, in all processes
            warn(f"metrics could not be uploaded to {target}: {first_line(error)}. They are in {self._local}: {remedy}")
            return False
        return True


class Throughput:
    """Speed of training over the last steps, leaving out compilation, evaluation and checkpoints."""

    def __init__(
        self,
        operations: Callable[[int, int], float | None] = lambda rows, length: None,
        device_kind: str = "",
        devices: int = 1,
        *,
        steps: int = 20,
    ):
        """Begins without a step.

        Args:
            operations: Floating point operations that a step on so many rows of so many tokens needs; None if unknown.
            device_kind: `device_kind` of the JAX devices.
            devices: How many there are.
            steps: Over how many the speed is a mean.
        """
        self._operations, self._device_kind, self._devices = operations, device_kind, devices
        self._marks: collections.deque[tuple[float, int, float | None]] = collections.deque(maxlen=steps + 1)

    def step(self, rows: int, length: int) -> None:
        """Notes that a step on so many rows of so many tokens has just ended."""
        self._marks.append((time.perf_counter(), rows * length, self._operations(rows, length)))

    def interrupt(self) -> None:
        """Forgets what came before; something other than a step is about to take time."""
        self._marks.clear()

    @property
    def rates(self) -> dict[str, float]:
        """Empty until two steps have ended without an interruption between them.

        Then `tokens_per_second`; if the operations are known, `flops_per_second` of all devices together; and if the
        devices' bfloat16 peak is known, `mfu`, the share of it.
        """
        if len(self._marks) < 2:
            return {}
        seconds = max(self._marks[-1][0] - self._marks[0][0], 1e-9)
        _, *made = self._marks
        found = {"tokens_per_second": sum(tokens for _, tokens, _ in made) / seconds}
        work = [operations for *_, operations in made if operations is not None]
        if len(work) == len(made):
            found["flops_per_second"] = sum(work) / seconds
            share = mfu(sum(work), seconds, self._device_kind, self._devices)
            if share is not None:
                found["mfu"] = share
        return found

    def __str__(self) -> str:
        """For the progress bar: tokens per second, and the utilisation or, if unknown, operations per second."""
        rates = self.rates
        shown = [f"{rates['tokens_per_second']:,.0f} tokens/s"] if rates else []
        if "mfu" in rates:
            shown.append(f"{rates['mfu']:.1%} MFU")
        elif "flops_per_second" in rates:
            shown.append(f"{rates['flops_per_second'] / 1e12:.3g} TFLOP/s")
        return ", ".join(shown)

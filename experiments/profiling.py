"""A trace of some training steps: what host and devices do when. `python -m experiments.train --profile 10 12`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments.distributed import is_main
from experiments.files import copy_files, files_below, is_remote
from experiments.integrity import first_line, warn

T = TypeVar("T")


class Profiler:
    """Records a range of steps on the main process; the steps themselves are not changed."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, say: Callable[[str], None]):
        """Records nothing yet.

        Args:
            steps: The first and the last; None is none. Those that an earlier process has made are not made again.
            folder: For the trace.
            say: Says where it is.
        """
        self._steps, self._folder, self._say = steps if is_main() else None, folder, say
        self._recording, self._local = False, folder

    def run(self, number: int, step: Callable[..., T], *arguments: Any) -> T:
        """`step(*arguments)`, the training step of this number."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            return step(*arguments)
        if not self._recording:
            if is_remote(self._folder):  # uploaded like all else; JAX's own client has other errors
                self._local = Path(tempfile.mkdtemp(prefix="fam-jax-profile-"))
            jax.profiler.start_trace(str(self._local))
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            out = step(*arguments)
        if number == self._steps[1]:
            jax.block_until_ready(out)
            self.close()
        return out

    def close(self) -> None:
        """Writes what is recorded, if the run ends before the last step of the range.

        One that cannot be written is a warning; training goes on.
        """
        if not self._recording:
            return
        self._recording = False
        try:
            jax.profiler.stop_trace()
            if self._local != self._folder:
                names = [path.relative_to(self._local).as_posix() for path in files_below(self._local)]
                copy_files(self._local, self._folder, names)
                shutil.rmtree(self._local, ignore_errors=True)
        except (OSError, ValueError, RuntimeError) as error:
            warn(f"no profile could be written to {self._folder}: {first_line(error)}. What there is: {self._local}")
            return
        self._say(
            f"a profile is in {self._folder}; open its .trace.json.gz at https://ui.perfetto.dev, or for more: "
            f"pip install xprof && xprof --logdir {self._folder}"
        )

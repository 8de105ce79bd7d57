"""A checkpoint on its way to the disk, while training goes on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.distributed import is_main


class Write:
    """A checkpoint that is being written: the arrays by Orbax, what follows by a thread of its own.

    Attributes:
        step: Its number.
        partial: The folder that is written.
        error: What went wrong in this process, once `join` has returned.
        complete: Whether the checkpoint itself is there, so that what went wrong is something later.
    """

    def __init__(
        self,
        step: int,
        partial: Path,
        starts: Sequence[Callable[[], Any]],
        finish: Callable[[], None],
        delete_old: Callable[[], None],
    ):
        self.step, self.partial, self.complete = step, partial, False
        self.error: BaseException | None = None
        self._finish, self._delete_old = finish, delete_old
        self._parts: list[Any] = []
        for start in starts:
            try:
                self._parts.append(start())
            except Exception as error:  # kept, so that all processes begin all parts and come to the same `wait`
                self.error = self.error or error
        self._thread = threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for part in self._parts:  # all of them, so that none still writes when the folder is removed
                try:
                    part.result()  # with several processes, when all have written theirs
                except Exception as error:
                    if self.error is None or is_of_storage(error):  # which says most
                        self.error = error
            if self.error is None and is_main():
                self._finish()
                self.complete = True
                self._delete_old()
        except BaseException as error:  # handed to the thread that waits
            self.error = error
        if self.error is not None and not is_main():
            text = f"process {jax.process_index()} could not write its part of checkpoint {self.step}: {self.error}"
            print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def join(self) -> None:
        """Returns when nothing is being written any more."""
        self._thread.join()


def is_of_storage(error: BaseException) -> bool:
    """Whether it is what the system says of a disk, a full one too, but tensorstore reports as a ValueError.

    With several processes, also that another one has not written its part.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ValueError):
        return "os_error_code" in str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1

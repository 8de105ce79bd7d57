"""A run and its processes: only one at a time writes a folder, and one that is asked to stop saves first."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class BusyError(RuntimeError):
    """Another process is training in the same folder."""


class Stopped(Exception):
    """A signal asked training to stop; its name is the argument."""

    @property
    def status(self) -> int:
        """Exit status of a process that ends for this."""
        return 128 + getattr(signal, self.args[0])


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the system lets go of it even if the process is killed.

    Raises:
        BusyError: Another process holds it.
    """
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process is training in {directory}; wait for it, stop it, or give this run its own --work-dir"
            ) from None
        yield


def set_aside(directory: Path) -> Path:
    """Renames a run's folder to the first free `NAME.old-N`, which is returned. Nothing is deleted.

    Raises:
        BusyError: A process is training in it.
    """
    directory = directory.resolve()
    with only_process(directory):
        names = (directory.with_name(f"{directory.name}.old-{number}") for number in itertools.count(1))
        return directory.rename(next(name for name in names if not name.exists()))


class StopRequest:
    """What the signals have asked for.

    Attributes:
        name: "SIGINT" or "SIGTERM" once one has come, else None.
    """

    name: str | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Notes the first SIGINT or SIGTERM, so that a loop can save and leave; the next one acts as usual."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        stop.name = signal.Signals(number).name
        restore()
        message = f"\n{stop.name}: saving a checkpoint after this step; once more to quit without"
        print(message, file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()

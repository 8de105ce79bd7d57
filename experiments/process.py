"""A run and its processes: only one at a time writes a folder, and one that is asked to stop saves first."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.files import as_os_errors, is_remote, write_text


class BusyError(RuntimeError):
    """Another process is training in the same folder."""


class Stopped(Exception):
    """A signal asked training to stop; its name is the argument."""

    @property
    def status(self) -> int:
        """Exit status of a process that ends for this."""
        return 128 + getattr(signal, self.args[0])


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[Callable[[], None]]:
    """Holds a run's folder for this process; the system lets go of it even if the process is killed.

    Object storage has no locks: there, the process that comes last takes the folder over, so that one which was killed
    holds up nobody, and the one before notices.

    Yields:
        A function that raises BusyError if another process has taken the folder over.

    Raises:
        BusyError: Another process holds it.
        ValueError: The folder is in object storage and cannot be used.
    """
    if is_remote(directory):
        with _owner(directory) as held:
            yield held
        return
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process is training in {directory}; wait for it, stop it, or give this run its own --work-dir"
            ) from None
        yield lambda: None


@contextlib.contextmanager
def _owner(directory: Path) -> Iterator[Callable[[], None]]:
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex})
    path = directory / "lock"
    try:
        write_text(path, mine)
        path.read_text()
    except Exception as error:  # each client has its own
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"work_dir={str(directory)!r} cannot be used: {said}; check the bucket, the role") from error

    def held() -> None:
        with as_os_errors(directory):
            now = path.read_text() if path.exists() else "nobody"
        if now != mine:
            raise BusyError(f"another process has taken over {directory}: {now}; this one has ended for it")

    yield held
    with contextlib.suppress(Exception):  # whoever comes next takes it over anyway
        held()
        path.unlink()


def set_aside(directory: Path) -> Path:
    """Renames a run's folder to the first free `NAME.old-N`, which is returned. Nothing is deleted.

    Raises:
        BusyError: A process is training in it.
        ValueError: It is in object storage, which renames no folders.
    """
    if is_remote(directory):
        raise ValueError(
            f"--fresh cannot move {directory} aside, as object storage renames no folders; give another --work-dir, or "
            f"move it: gcloud storage mv {directory} {directory}.old"
        )
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

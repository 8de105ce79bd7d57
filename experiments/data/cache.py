"""Directories that are either complete or not there: built aside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from experiments.data.config import local_cache
from experiments.data.protocol import DataError
from experiments.files import as_os_errors, copy_files, is_remote
from experiments.integrity import checksums, read_meta, write_meta

LOCK_SECONDS = 6 * 3600.0  # that another process may take to prepare the same data

# Errors of the disk, which no second attempt heals.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)


def digest(*parts: Any) -> str:
    """SHA-256 of JSON-able values, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes a directory once, however often it is asked for, by however many processes.

    `build` fills an empty directory beside `target`, which becomes `target` by one rename when it is done. A
    build that was interrupted in any way leaves no `target`; what it left is removed by the next one.

    In object storage, `target` is complete when it has its `meta.json`, with the checksums of its files.

    Args:
      target: the directory; if it exists, it is complete and `build` is not called.
      build: fills the directory that it is given.

    Returns:
      The directory, or if it is in object storage, a copy of it on this machine.

    Raises:
      DataError: the disk is full or not writable. Nothing half-made is kept.
    """
    if is_remote(target):
        return _build_remote(target, build)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{target.name}.lock") as alone:
            if target.is_dir():
                return target
            prefix = f".{target.name}.partial-"
            if alone:
                for left in target.parent.glob(f"{prefix}*"):
                    shutil.rmtree(left, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            try:
                build(partial)
                _flush(partial)
                _rename(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise DataError(
            f"{target} could not be prepared: {error.strerror}. Free space or choose another place with "
            "data_dir or the environment variable FAM_JAX_DATA, and run the same command again; nothing "
            "half-made was kept"
        ) from error
    return target


def _build_remote(target: Path, build: Callable[[Path], None]) -> Path:
    """Copies what is there; else builds it here and then copies it there."""
    marker = target / "meta.json"

    def fill(partial: Path) -> None:
        if not marker.exists():
            build(partial)
            return
        try:
            files = read_meta(marker)["files"]
            copy_files(target, partial, list(files))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise damaged(marker, error) from error
        for name, found in checksums(partial).items():
            if found != files[name]:
                raise damaged(target / name, "it is not what was written")

    local = local_cache() / "remote" / digest(str(target.parent))[:16] / target.name
    try:
        with as_os_errors(target):
            build_once(local, fill)
            if not marker.exists():
                files = checksums(local)
                copy_files(local, target, list(files))
                write_meta(marker, {"files": files})  # last, so that it is there when all is
    except OSError as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"{target} could not be read or written: {said}. Check data_dir or FAM_JAX_DATA, the bucket and the role, "
            "and run the same command again"
        ) from error
    return local


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a prepared directory.

    Raises:
      DataError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, "no JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object for people and programs."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def damaged(path: Path, error: Exception | str) -> DataError:
    """The error for a prepared file that is not as it was written; `error` says what was noticed."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return DataError(
        f"{path} is missing or damaged ({reason}): delete the directory {path.parent} and run the same command again"
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Waits for the lock; yields whether nobody else can be building.

    Raises:
      DataError: another process, which is there, has not let go of it for LOCK_SECONDS. The system lets go of what a
        process held that has ended.
    """
    with open(path, "a+") as file:
        try:
            alone = _take(file, path)
        except OSError:  # a file system without locks: both may build, and the first to finish wins
            alone = False
        if alone:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield alone


def _take(file: IO[str], path: Path) -> bool:
    """Takes the lock, saying who has it if that is not soon."""
    start, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited = time.monotonic() - start
        if (waited > 5 and not told) or waited > LOCK_SECONDS:
            file.seek(0)
            who, told = file.read() or "another process", True
            if waited > LOCK_SECONDS:
                raise DataError(
                    f"{who} has held {path} for more than {LOCK_SECONDS / 3600:.3g} h, to prepare the same data: look "
                    "whether it is still at work; if not, end it and run the same command again"
                )
            print(f"waiting for {who}, which prepares the same data (it holds {path})", file=sys.stderr, flush=True)
        time.sleep(0.1)


def _flush(directory: Path) -> None:
    """Puts the files on the disk, so that a power cut after the rename cannot leave empty ones."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _rename(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)
    except OSError:
        if not target.is_dir():  # else another process finished the same work first
            raise

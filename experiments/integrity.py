"""Folders whose files are as they were written: checksums, and the description that has them."""

from __future__ import annotations

import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.files import as_os_errors, files_below, is_remote, remove

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used. The message says which and what to do."""


class DamagedCheckpoint(CheckpointError):
    """The files of a checkpoint are not those that were written.

    Attributes:
        folder: The checkpoint's.
    """

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"checkpoint {folder} is damaged: {reason}")
        self.folder = folder


def checksums(folder: Path, item: str = "") -> dict[str, list[int]]:
    """Size and CRC-32 of every file, or of those of an item."""
    files = sorted(path for path in files_below(folder / item) if path.name != "meta.json")
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_checksum, files), strict=True))


def _checksum(path: Path) -> list[int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [size, crc]


def write_meta(path: Path, content: dict[str, Any]) -> None:
    """Writes a folder's description, with a checksum of its own; it is on the disk when this returns."""
    text = json.dumps(content, allow_nan=False)
    text = json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}, indent=1)
    if is_remote(path):
        path.write_text(text)
        return
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_meta(path: Path) -> dict[str, Any]:
    """What `write_meta` has written; raises ValueError, KeyError or TypeError if it is damaged, OSError without it."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    content: dict[str, Any] = meta["content"]
    if meta["crc32"] != zlib.crc32(json.dumps(content).encode()):
        raise ValueError("meta.json was changed")
    return content


def sync(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path, item: str = "") -> dict[str, Any]:
    """The content of meta.json, once it and the files of an item (or all) are found to be as written."""
    try:
        with as_os_errors(folder):
            content = read_meta(folder / "meta.json")
            found = checksums(folder, item)
        for name, written in content["files"].items():
            if name.startswith(item) and found.get(name) != written:
                now = f"has {found[name][0]} bytes with other content" if name in found else "is missing"
                raise ValueError(f"{name} of {written[0]} bytes {now}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        if is_remote(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{folder} could not be read: {first_line(error)}; start again later") from error
        raise DamagedCheckpoint(folder, first_line(error)) from error
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has format {content['format']}, this code reads {FORMAT}; use the code that wrote it"
        )
    return content


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def complete_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in order."""
    with as_os_errors(directory):
        numbers = [path for path in directory.glob("*") if path.name.isdecimal()]
        if is_remote(directory):
            return sorted(int(path.name) for path in numbers if (path / "meta.json").exists())
    return sorted(int(path.name) for path in numbers if path.is_dir())


def delete(folder: Path) -> None:
    """Deletes a checkpoint, or what an earlier try has left of it; one that is half deleted is not taken for complete.

    Raises:
        OSError: It cannot be deleted.
    """
    if is_remote(folder):
        remove(folder, first="meta.json")
        return
    doomed = folder.with_name(f"deleting-{folder.name}")
    if folder.exists():
        os.rename(folder, doomed)
    if doomed.exists():
        remove(doomed)


def warn(message: str) -> None:
    """Says that something is not as it should be, though the run goes on."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)

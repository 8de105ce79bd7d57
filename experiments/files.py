"""Paths on a disk or in object storage (`gs://BUCKET/...`), and what the two have in common.

Paths on a disk are `pathlib.Path`; those in object storage are `etils.epath.Path`, which has the same methods. There,
an object appears whole when its upload ends; nothing can be appended to or locked, and folders are only the beginnings
of names, which cannot be renamed at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEME = re.compile(r"gs:/+")  # pathlib makes one slash of two


def is_remote(path: Path | str) -> bool:
    """Whether a path is in object storage."""
    return SCHEME.match(os.fspath(path)) is not None


def location(path: Path | str) -> Path:
    """The path that a setting or an option means: `~` is expanded, and `gs://...` becomes an `epath.Path`.

    Raises:
        ValueError: It is in object storage, for which a package is missing.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text).expanduser()
    if not any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
        raise ValueError(f'{text!r} needs the package gcsfs: pip install -e ".[gcs]"')
    import fsspec.config
    from etils import epath

    # Other programs and processes write there, too: what was listed once may have changed.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    found: Any = epath.Path(SCHEME.sub("gs://", text))
    return found


def absolute(path: Path) -> Path:
    """The same path from the root; those in object storage are."""
    return path if is_remote(path) else path.resolve()


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; an existing one is replaced."""
    if is_remote(path):
        with as_os_errors(path):
            path.write_text(text)
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it; of one that is not there, none.

    Raises:
        OSError: A folder cannot be listed.
    """
    if not is_remote(folder):
        yield from (path for path in folder.rglob("*") if path.is_file())
        return
    pending: list[Any] = [folder]
    while pending:
        current = pending.pop()
        # One level at a time: fsspec calls `on_error` for the first alone; what it cannot list below is empty to it.
        with as_os_errors(folder):
            found = list(itertools.islice(current.walk(on_error=_unless_missing), 1))
        for _, folders, names in found:
            yield from (current / name for name in names if name)
            pending += [current / name for name in folders]


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def remove(folder: Path, first: str | None = None) -> None:
    """Deletes a folder; in object storage a certain file of it first, without which the rest counts for nothing."""
    if not is_remote(folder):
        shutil.rmtree(folder)
        return
    remote: Any = folder
    with as_os_errors(folder):
        if first is not None:
            (remote / first).unlink(missing_ok=True)
        remote.rmtree(missing_ok=True)


def copy_files(source: Path, target: Path, names: list[str]) -> None:
    """Copies files from one folder to another, between a disk and object storage."""
    remote = target if is_remote(target) else source
    for name in names:
        if not is_remote(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        with as_os_errors(remote), (source / name).open("rb") as old, (target / name).open("wb") as new:
            shutil.copyfileobj(old, new, 1 << 22)


@contextlib.contextmanager
def as_os_errors(path: Path) -> Iterator[None]:
    """Raises what the clients of object storage raise as OSError, which they do for part of it only."""
    try:
        yield
    except Exception as error:
        if not is_remote(path) or isinstance(error, OSError) or not _is_of_client(error):
            raise
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _is_of_client(error: Exception) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"gcsfs", "google", "aiohttp", "requests", "tensorflow"})


def run_folder(path: Path | str) -> Path:
    """The folder of the run that `load_model` reads from `path`; of a checkpoint that stands alone, its own."""
    root = absolute(location(path))
    with as_os_errors(root):
        if (root / "meta.json").exists() and root.parent.name == "checkpoints":
            root = root.parent
        inside = root.name == "checkpoints" and not (root / "checkpoints").is_dir()
    return root.parent if inside else root


def free_name(path: Path) -> Path:
    """`path`, or with the first number that makes it new."""
    names = (path if i == 0 else path.with_name(f"{path.name}-{i}") for i in range(10_000))
    return next(name for name in names if not name.exists())

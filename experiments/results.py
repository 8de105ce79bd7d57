"""Result files: one JSON file per measurement, with all that is needed to judge and to repeat it.

A table or a plot is made from these files by `experiments.report` and from nothing else.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.command import make_folder
from experiments.files import as_os_errors, is_remote, location, write_text
from experiments.metrics import read_metrics
from experiments.typed import to_json

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "array_record",
    "numpy",
)


class ResultError(ValueError):
    """A result file that cannot be used. The message names the file, the field and what to do."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement and its circumstances; the fields of the JSON file.

    Attributes:
        kind: What was measured; decides how `experiments.report` shows it.
        name: Which one: the name of the file and the title of its table.
        config: Every setting that shaped the numbers.
        seeds: All seeds used.
        values: The raw numbers; the kinds of `experiments.report` say what they hold. Not-a-number and
            infinity are stored as null.
        wall_seconds: How long the measurement took.
        data: What the data is made of: packages or files with versions and hashes. None for synthetic tasks.
        command: The command line that made it.
        commit: `hash` of the checkout's commit and whether it was `dirty`; both None outside a git checkout.
        hardware: `cpu` model, `cores` usable, `devices` by kind and number, `platform` of JAX.
        versions: Python and the packages that matter.
        time: When it was written: ISO 8601, UTC.
        schema: Version of this format.
    """

    kind: str
    name: str
    config: dict[str, Any]
    seeds: list[int]
    values: dict[str, Any]
    wall_seconds: float
    data: dict[str, Any] | None
    command: str
    commit: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    time: str
    schema: int = SCHEMA


# What a field of the file may be; bool is an int to Python, but never a right value here.
_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "config": (dict,),
    "seeds": (list,),
    "values": (dict,),
    "wall_seconds": (int, float),
    "data": (dict, type(None)),
    "command": (str,),
    "commit": (dict,),
    "hardware": (dict,),
    "versions": (dict,),
    "time": (str,),
    "schema": (int,),
}


def make(
    kind: str,
    name: str,
    *,
    config: Any,
    seeds: Sequence[int],
    values: Mapping[str, Any],
    wall_seconds: float,
    data: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Result:
    """Makes a result of this run: adds the commit, the hardware, the versions and the time.

    Args:
        kind: See `Result`; so for all others.
        name: Also the file's name, so it may hold letters, digits, `.`, `_` and `-` only.
        config: A dataclass or a mapping.
        seeds: All seeds used.
        values: May hold dataclasses, arrays and NumPy scalars.
        wall_seconds: Seconds.
        data: The manifest of the data.
        command: None: that of this process.

    Raises:
        ResultError: `name` is no file name.
        ValueError: something in config, values or data has no JSON form; see `experiments.typed.to_json`.
    """
    check_name(name)
    return Result(
        kind=kind,
        name=name,
        config=to_json(config, "config"),
        seeds=[int(seed) for seed in seeds],
        values=to_json(values, "values"),
        wall_seconds=round(float(wall_seconds), 3),
        data=None if data is None else to_json(data, "data"),
        command=command if command is not None else command_line(),
        commit=commit(),
        hardware=hardware(),
        versions=versions(),
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def check_name(name: str) -> None:
    """Raises ResultError unless a result of this name can have a file."""
    if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
        raise ResultError(
            f"name={name!r} cannot name a result file; use letters, digits, '.', '_' and '-', no '.' first"
        )


def make_directory(output: Path) -> Path:
    """Makes the folder where a command shall write its results.

    Raises:
        ValueError: it cannot be made, or is named like a result file.
    """
    output = location(output)
    if output.suffix == ".json":
        raise ResultError(f"output={str(output)!r} names a file; give a folder, and the file's name with --name")
    return make_folder(output, "output")


def write(result: Result, path: str | Path | None = None) -> Path:
    """Writes a result whole or not at all.

    Args:
        result: What to write.
        path: The file. A path that does not end in `.json` is a folder, where the result's name names the
            file. None: `experiments/results`.

    Returns:
        The file's path. An existing file is replaced.
    """
    target = location(path) if path is not None else DIRECTORY
    if target.suffix != ".json":
        target = target / f"{result.name}.json"
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n"
    if is_remote(target):
        write_text(target, text)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # A crash leaves the old file or the new one: the new one appears by renaming within the folder.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def read(path: str | Path) -> Result:
    """Reads a result file and checks its form.

    Raises:
        ResultError: the file is missing or no JSON, or a field is missing, unknown or of a wrong type, or the
            schema version is another. The message names the file and the field.
    """
    try:
        file = location(path)
        with as_os_errors(file):
            content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except ValueError as error:
        raise ResultError(f"{path}: not a JSON file ({error}); run the command again that made it") from None
    if not isinstance(content, dict):
        raise ResultError(f"{path}: not a result file: it holds a {type(content).__name__}, not an object")
    for field, types in _TYPES.items():
        if field not in content:
            raise ResultError(f"{path}: field {field!r} is missing; was it written by experiments.results?")
        value = content[field]
        if isinstance(value, bool) or not isinstance(value, types):
            raise ResultError(
                f"{path}: field {field!r} is a {type(value).__name__}, but must be "
                + " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            )
    if content["schema"] != SCHEMA:
        raise ResultError(
            f"{path}: field 'schema' is {content['schema']}, but this version reads {SCHEMA}; use the "
            f"code that wrote it (commit {content['commit'].get('hash')})"
        )
    unknown = sorted(set(content) - set(_TYPES))
    if unknown:
        raise ResultError(f"{path}: unknown field {unknown[0]!r}; remove it or raise the schema version")
    return Result(**content)


def find(paths: Sequence[str | Path]) -> list[Path]:
    """The result files and the folders of training runs among `paths` and, in name order, below folders.

    Of a run's folder the files in `results` are found too, where evaluations of it go.

    Raises:
        ResultError: a path does not exist, or a folder holds neither.
    """
    found: list[Path] = []
    for path in map(location, paths):
        inside = _below(path) if path.is_dir() else [path]
        if not path.exists():
            raise ResultError(f"{path}: there is no such file or folder; check the path")
        if not inside:
            raise ResultError(f"{path}: no result file in this folder; experiments.evaluate makes some")
        found += inside
    return found


def read_run(directory: str | Path) -> Result:
    """A training run as a result of kind "training": its loss by step, on both splits.

    Args:
        directory: Folder of the run, with the `run.json` and `metrics.jsonl` that `experiments.train` writes.
            The wall time is that of the last process, up to its last line of metrics.

    Raises:
        ResultError: one of them is missing or not what `experiments.train` writes.
    """
    run, log = location(directory) / "run.json", location(directory) / "metrics.jsonl"
    try:
        with as_os_errors(run):
            content = json.loads(run.read_text(encoding="utf-8"))
        rows = read_metrics(log)
        curves = []
        for split in dict.fromkeys(row["split"] for row in rows):
            mine = [row for row in rows if row["split"] == split]
            curves.append(
                {
                    "label": split,
                    "seed": content["config"]["seed"],
                    "step": [row["step"] for row in mine],
                    "loss": [row["loss"] for row in mine],
                }
            )
        started, ended = (_changed(path) for path in (run, log))
        return Result(
            kind="training",
            name=f"{content['config']['name']}-training",
            config=content["config"],
            seeds=[content["config"]["seed"]],
            values={"curves": curves},
            wall_seconds=max(0.0, ended - started),
            data=content["data"],
            command=content["command"],
            commit=content["commit"],
            hardware=content["hardware"],
            versions=content["versions"],
            time=datetime.datetime.fromtimestamp(ended, datetime.UTC).isoformat(timespec="seconds"),
        )
    except OSError as error:
        name, reason = error.filename or directory, error.strerror or error
        raise ResultError(f"{name}: cannot be read ({reason}); give the folder of a run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResultError(
            f"{directory}: run.json or metrics.jsonl is not what experiments.train writes ({error!r})"
        ) from None


def command_line() -> str:
    """The command that started this process, as `python -m MODULE ...` where that is how it was started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = getattr(spec, "name", None)
    start = ["python", "-m", name.removesuffix(".__main__")] if name else ["python", Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def commit() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"hash": None, "dirty": None}
    return {"hash": head, "dirty": bool(changed)}


def hardware() -> dict[str, Any]:
    """The machine: CPU model, usable cores, and JAX's devices."""
    devices = jax.devices()
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "platform": devices[0].platform,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that shape the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _below(folder: Path) -> list[Path]:
    if (folder / "run.json").exists():
        # A run: the JSON files of its checkpoints are no results.
        return [folder, *sorted((folder / "results").glob("*.json"))]
    found = sorted(folder.glob("*.json"))
    for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
        found += _below(inside)
    return found


def _changed(path: Path) -> float:
    stat: Any = path.stat()  # epath names it without st_
    return float(stat.mtime if is_remote(path) else stat.st_mtime)


def _git(*arguments: str) -> str:
    git = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(git, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

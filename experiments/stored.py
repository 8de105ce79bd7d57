"""The settings of a run that are kept with its arrays, how others may differ from them, and where both are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import results
from experiments.config import MAY_CHANGE, TrainConfig
from experiments.data import TextData, manifest
from experiments.distributed import on_main
from experiments.files import as_os_errors, location, write_text
from experiments.integrity import CheckpointError, DamagedCheckpoint, complete_steps, verify, warn
from experiments.typed import differences, from_json, to_json


def read_config(meta: dict[str, Any], folder: Path) -> TrainConfig:
    """The config of the run that wrote a checkpoint; raises CheckpointError if this code does not know its settings."""
    try:
        return from_json(meta["config"], TrainConfig)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} was written by another version of the code, whose settings this one does not know: {error}"
        ) from error


def compare_configs(meta: dict[str, Any], config: TrainConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """How the config differs from the checkpoint's; raises CheckpointError for what may not differ."""
    changed = list(differences(to_json(read_config(meta, folder)), to_json(config)))
    for field, before, now in changed:
        if not MAY_CHANGE.fullmatch(field):
            what = "model" if field.startswith("model.") else "run"
            raise CheckpointError(
                f"{folder} belongs to another {what}: {field} is {before!r} there and {now!r} here; put it "
                "back, give this run its own --work-dir, or start anew with --fresh, which moves the old run "
                "aside"
            )
    return changed


def write_run(config: TrainConfig) -> None:
    """Keeps beside the checkpoints what is needed to repeat the run: `run.json`."""
    content = {
        "config": to_json(config),
        "data": manifest(config.data) if isinstance(config.data, TextData) else None,
        "command": results.command_line(),
        "commit": results.commit(),
        "hardware": results.hardware(),
        "versions": results.versions(),
    }
    write_text(config.directory / "run.json", json.dumps(content, indent=1) + "\n")


def find_checkpoint(path: Path | str, step: int | None = None) -> tuple[Path, dict[str, Any], TrainConfig]:
    """A checkpoint whose parameters are as they were written: its folder, its description, and its run's config.

    The main process looks, so that all, which must all call this, have the same.

    Args:
        path: A run's folder, its `checkpoints` folder, or one checkpoint in it.
        step: Which one; None is the latest that is not damaged.

    Raises:
        CheckpointError: There is none, or it is damaged or made by another version of the code.
        OSError: It is in object storage, which refuses.
        ValueError: It is there, and a package is missing.
    """
    root = location(path)

    def find() -> tuple[str, dict[str, Any]]:
        with as_os_errors(root):
            return _find(root, step)

    name, meta = on_main(find, (CheckpointError, OSError))
    folder = location(name)
    return folder, meta, read_config(meta, folder)


def _find(root: Path, step: int | None) -> tuple[str, dict[str, Any]]:
    if (root / "meta.json").exists():
        candidates = [root]
    else:
        folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
        steps = complete_steps(folder)
        if not steps:
            raise CheckpointError(
                f"no checkpoint in {folder}; give the folder of a run, or train one: python -m "
                "experiments.train --config NAME"
            )
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, steps))}")
        candidates = [folder / str(s) for s in (reversed(steps) if step is None else [step])]
    for folder in candidates:
        try:
            meta = verify(folder, "params")
        except DamagedCheckpoint as error:
            if folder == candidates[-1]:
                raise CheckpointError(f"{error}. Bring it back from a copy, or give another checkpoint") from error
            warn(f"{error}. Reading an earlier one instead")
            continue
        return str(folder), meta
    raise AssertionError("unreachable: the last candidate returns or raises")

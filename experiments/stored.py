"""The settings of a run that are kept with its arrays, and how others may differ from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments import results
from experiments.config import MAY_CHANGE, TrainConfig
from experiments.data import TextData, manifest
from experiments.files import write_text
from experiments.integrity import CheckpointError
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

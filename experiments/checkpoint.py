"""Checkpoints: arrays through Orbax, and around them what makes a folder of them safe to rely on.

A checkpoint is a folder `STEP/` with `params/` and `rest/` (Orbax, one array per leaf, under its path in the
tree) and `meta.json` (config, data position, shapes, and size and CRC-32 of every file). It is written beside
and renamed when it is complete, so a process that is killed leaves the earlier ones as they were. Reading
compares the checksums first: Orbax alone returns an array whose bytes were damaged on disk without a word.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from experiments.config import MAY_CHANGE, TrainConfig
from experiments.distributed import is_main, on_main
from experiments.integrity import (
    FORMAT,
    CheckpointError,
    DamagedCheckpoint,
    checksums,
    first_line,
    sync,
    verify,
    write_meta,
)
from experiments.typed import differences, from_json, to_json
from fam_jax import Decoder, tree_shardings


class Restored(NamedTuple):
    """What a run continues from.

    Attributes:
        step: Steps made.
        params: The model's parameters.
        rest: Everything else that a training step hands on.
        data: Position of the data.
        changed: Settings that differ from those of the checkpoint: (field, before, now).
    """

    step: int
    params: Any
    rest: Any
    data: dict[str, Any]
    changed: list[tuple[str, Any, Any]]


class Checkpoints:
    """The checkpoints of one run, which this process or its job alone writes."""

    def __init__(self, directory: Path, keep: int):
        """Opens a folder, creating it if need be, and removes what a killed process left half done in it.

        Args:
            directory: Holds one folder per step.
            keep: The latest so many are kept.
        """
        self.directory = directory
        self._keep = keep

        def clean() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in [*directory.glob("saving-*"), *directory.glob("deleting-*")]:
                shutil.rmtree(leftover)

        on_main(clean, (OSError,))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return _steps(self.directory)

    def save(self, step: int, params: Any, rest: Any, config: TrainConfig, data: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is on disk; one of the same step is left as it is.

        Args:
            step: Its number.
            params: The model's parameters.
            rest: Everything else that a training step hands on, any pytree.
            config: The run's.
            data: Position of the data, JSON-able.

        Raises:
            CheckpointError: It could not be written. Earlier ones are as they were.
        """
        final, partial = self.directory / str(step), self.directory / f"saving-{step}"
        items = {"params": _named(params), "rest": _named(rest)}

        def prepare() -> bool:
            if final.exists():
                return False
            needed = sum(leaf.nbytes for item in items.values() for leaf in item.values())
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise OSError(f"{free / 1e6:,.0f} MB are free and {needed / 1e6:,.0f} MB are needed")
            partial.mkdir()
            return True

        def finish() -> None:
            content = {
                "format": FORMAT,
                "step": step,
                "config": to_json(config),
                "data": dict(data),
                "arrays": {item: {k: _shape(leaf) for k, leaf in leaves.items()} for item, leaves in items.items()},
                "files": checksums(partial),
            }
            write_meta(partial / "meta.json", content)
            os.rename(partial, final)
            sync(self.directory)

        try:
            if not on_main(prepare, (OSError,)):
                return
            for name, leaves in items.items():
                ocp.save(partial.resolve() / name, leaves)  # every process its part
            on_main(finish, (OSError,))
        except (OSError, ValueError) as error:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, ValueError) and "os_error_code" not in str(error):
                raise  # tensorstore reports what the system says, a full disk too, as a ValueError
            kept = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.directory}: {first_line(error)}. Earlier "
                f"checkpoints are as they were (steps: {kept}). Make room or repair the disk, then start the "
                "same command again"
            ) from error
        on_main(self._delete_old, (OSError,))

    def _delete_old(self) -> None:
        for old in self.steps()[: -self._keep]:
            # Renamed first, so that one that is half deleted is not taken for a complete one.
            doomed = self.directory / f"deleting-{old}"
            os.rename(self.directory / str(old), doomed)
            shutil.rmtree(doomed)

    def restore(self, params: Any, rest: Any, config: TrainConfig) -> Restored | None:
        """Reads the latest checkpoint, or with a warning an earlier one if the latest is damaged.

        Args:
            params: Arrays or shapes with shardings, as what is read shall be.
            rest: The same for the rest.
            config: The run's; only fields in `config.MAY_CHANGE` may differ from the checkpoint's.

        Returns:
            What to continue from; None if there is no checkpoint.

        Raises:
            CheckpointError: Every checkpoint is damaged, or it belongs to another model or run; names the
                first field or array that differs, with both values.
        """
        damaged: list[DamagedCheckpoint] = []

        def latest() -> tuple[int, dict[str, Any]] | None:
            for step in reversed(self.steps()):
                folder = self.directory / str(step)
                try:
                    meta = verify(folder)
                except DamagedCheckpoint as error:
                    damaged.append(error)
                    continue
                _compare_configs(meta, config, folder)
                return step, meta
            if damaged:
                raise CheckpointError(
                    f"{damaged[0]}, and no other in {self.directory} can be read. Bring one back from a copy, or "
                    "start anew with --fresh, which moves this run aside"
                )
            return None

        found = on_main(latest, (CheckpointError, OSError))
        if found is None:
            return None
        step, meta = found
        folder = self.directory / str(step)
        restored = Restored(
            step,
            _load(folder, "params", params, meta),
            _load(folder, "rest", rest, meta),
            meta["data"],
            _compare_configs(meta, config, folder),
        )
        for bad in damaged:  # out of the way, because this run will write that step again
            aside = _free_name(bad.folder.with_name(f"damaged-{bad.folder.name}"))
            os.rename(bad.folder, aside)
            _warn(f"{bad}; it is now {aside}, delete it when you like. Continuing from step {step} instead")
        return restored


def find_checkpoint(path: Path | str, step: int | None = None) -> tuple[Path, dict[str, Any], TrainConfig]:
    """A checkpoint whose parameters are as they were written: its folder, its description, and its run's config.

    Args:
        path: A run's folder, its `checkpoints` folder, or one checkpoint in it.
        step: Which one; None is the latest that is not damaged.

    Raises:
        CheckpointError: There is none, or it is damaged or made by another version of the code.
    """
    root = Path(path).expanduser()
    if (root / "meta.json").exists():
        candidates = [root]
    else:
        folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
        steps = _steps(folder)
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
            _warn(f"{error}. Reading an earlier one instead")
            continue
        return folder, meta, _read_config(meta, folder)
    raise AssertionError("unreachable: the last candidate returns or raises")


def load_model(
    path: Path | str, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Decoder, dict[str, Any], TrainConfig]:
    """Reads a trained model: the decoder, its variables and the config of its run.

    The other arguments and the errors are those of `find_checkpoint`.

    Args:
        path: See there.
        step: See there.
        mesh: Parameters are spread over it as they are read, by the rules of the run; needed with several processes,
            which all must call this. None: all on one device.
    """

    def find() -> list[Any]:
        folder, meta, _ = find_checkpoint(path, step)
        return [str(folder), meta]

    name, meta = on_main(find, (CheckpointError, OSError))
    folder = Path(name)
    config = _read_config(meta, folder)
    model = Decoder(config.model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    if mesh is not None:
        places = tree_shardings(config.model.sharding, mesh, shapes)
        shapes = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)
    return model, {"params": _load(folder, "params", shapes, meta)}, config


def run_folder(path: Path | str) -> Path:
    """The folder of the run that `load_model` reads from `path`; of a checkpoint that stands alone, its own."""
    root = Path(path).expanduser().resolve()
    if (root / "meta.json").exists() and root.parent.name == "checkpoints":
        root = root.parent
    inside = root.name == "checkpoints" and not (root / "checkpoints").is_dir()
    return root.parent if inside else root


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path. Those without elements are left out: Orbax refuses them, and they hold nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves if leaf.size}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _load(folder: Path, item: str, like: Any, meta: dict[str, Any]) -> Any:
    """Reads an item of a verified checkpoint into a tree like `like`."""
    wanted, stored = _named(like), meta["arrays"][item]
    for name in dict.fromkeys([*wanted, *stored]):
        here = _shape(wanted[name]) if name in wanted else "absent"
        if stored.get(name, "absent") != here:
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: {item}.{name} is {stored.get(name, 'absent')} "
                f"there and {here} here; use the code that wrote it, or start a run in another --work-dir"
            )
    arrays = read_arrays(folder, item, wanted)

    def pick(path: tuple, leaf: Any) -> Any:
        return arrays[_name(path)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, like)


def read_arrays(folder: Path, item: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of an item of a verified checkpoint by name, like the arrays or shapes that are wanted.

    Raises:
        CheckpointError: They cannot be read.
    """
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
        for name, leaf in wanted.items()
    }
    partial = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    try:
        with ocp.Context(pytree_options=partial):
            return ocp.load(folder.resolve() / item, abstract)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} could not be read: {first_line(error)}") from error


def _read_config(meta: dict[str, Any], folder: Path) -> TrainConfig:
    try:
        return from_json(meta["config"], TrainConfig)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} was written by another version of the code, whose settings this one does not know: {error}"
        ) from error


def _compare_configs(meta: dict[str, Any], config: TrainConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """How the config differs from the checkpoint's; raises CheckpointError for what may not differ."""
    changed = list(differences(to_json(_read_config(meta, folder)), to_json(config)))
    for field, before, now in changed:
        if not MAY_CHANGE.fullmatch(field):
            what = "model" if field.startswith("model.") else "run"
            raise CheckpointError(
                f"{folder} belongs to another {what}: {field} is {before!r} there and {now!r} here; put it "
                "back, give this run its own --work-dir, or start anew with --fresh, which moves the old run "
                "aside"
            )
    return changed


def _free_name(path: Path) -> Path:
    """`path`, or with the first number that makes it new."""
    names = (path if i == 0 else path.with_name(f"{path.name}-{i}") for i in range(10_000))
    return next(name for name in names if not name.exists())


def _warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)

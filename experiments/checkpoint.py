"""Checkpoints: arrays through Orbax, and around them what makes a folder of them safe to rely on.

A checkpoint is a folder `STEP/` with `params/` and `rest/` (Orbax, one array per leaf, under its path in the
tree) and `meta.json` (config, data position, shapes, and size and CRC-32 of every file). It is written beside
and renamed when it is complete, so a process that is killed leaves the earlier ones as they were. Reading
compares the checksums first: Orbax alone returns an array whose bytes were damaged on disk without a word.

In object storage, where folders cannot be renamed, it is written in place, and complete once `meta.json` is there,
which is written last.

Training waits only until the arrays are copied off the devices; a thread writes them, and then what makes the folder
complete. One checkpoint is written at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from experiments.arrays import load, named, shape_of
from experiments.config import TrainConfig
from experiments.distributed import on_main, waiting
from experiments.files import absolute, as_os_errors, free_name, is_remote, remove
from experiments.integrity import (
    FORMAT,
    CheckpointError,
    DamagedCheckpoint,
    checksums,
    complete_steps,
    delete,
    first_line,
    sync,
    verify,
    warn,
    write_meta,
)
from experiments.process import BusyError
from experiments.stored import compare_configs, find_checkpoint
from experiments.typed import to_json
from experiments.writing import Write, is_of_storage
from fam_jax import Decoder, DecoderConfig, tree_shardings
from fam_jax.lora import merge


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

    def __init__(
        self, directory: Path, keep: int, every: int = 0, best: int = 0, held: Callable[[], None] = lambda: None
    ):
        """Opens a folder, creating it if need be, and removes what a killed process left half done in it.

        Args:
            directory: Holds one folder per step.
            keep: The latest so many are kept.
            every: So are those of steps that are multiples of this; 0 is none.
            best: And so many of the lowest validation loss.
            held: Raises BusyError if another process has taken the folder over, in object storage.
        """
        self.directory = directory
        self._keep, self._every, self._best, self._held = keep, every, best, held
        self._remote = is_remote(directory)
        self._restored: int | None = None
        self._losses: dict[int, float | None] = {}
        self._writing: Write | None = None
        self._doomed: set[int] = set()  # could not be deleted

        def clean() -> None:
            if self._remote:
                self._clean_remote()
                return
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in [*directory.glob("saving-*"), *directory.glob("deleting-*")]:
                shutil.rmtree(leftover)

        on_main(clean, (OSError,))

    def _clean_remote(self) -> None:
        with as_os_errors(self.directory):
            complete = self.steps()
            for path in self.directory.glob("*"):
                if path.name.isdecimal() and int(path.name) not in complete:
                    warn(f"checkpoint {path} is not complete, as its process ended before; it is deleted")
                    remove(path)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return complete_steps(self.directory)

    def save(
        self,
        step: int,
        params: Any,
        rest: Any,
        config: TrainConfig,
        data: Mapping[str, Any],
        loss: float | None = None,
    ) -> None:
        """Writes a checkpoint and returns when it is on disk: `begin`, then `wait`."""
        self.begin(step, params, rest, config, data, loss)
        self.wait()

    def begin(
        self,
        step: int,
        params: Any,
        rest: Any,
        config: TrainConfig,
        data: Mapping[str, Any],
        loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint and returns when the arrays are copied; one of the same step is left as it is.

        The one before is waited for. What is written may be donated or changed as soon as this returns.

        Args:
            step: Its number.
            params: The model's parameters.
            rest: Everything else that a training step hands on, any pytree.
            config: The run's.
            data: Position of the data, JSON-able.
            loss: On the validation split, of these parameters, by which the best are found.

        Raises:
            CheckpointError: It, or the one before, could not be written. Earlier ones are as they were.
        """
        self.wait()
        final = self.directory / str(step)
        partial = final if self._remote else self.directory / f"saving-{step}"
        items = {"params": named(params), "rest": named(rest)}
        content = {
            "format": FORMAT,
            "step": step,
            "config": to_json(config),
            "data": json.loads(json.dumps(dict(data))),  # as it is now, whatever the batches do next
            "arrays": {item: {k: shape_of(leaf) for k, leaf in leaves.items()} for item, leaves in items.items()},
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
        }

        def prepare() -> bool:
            if self._remote:
                self._held()
                with as_os_errors(final):
                    return not (final / "meta.json").exists()
            if final.exists():
                return False
            needed = sum(leaf.nbytes for item in items.values() for leaf in item.values())
            free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise OSError(f"{free / 1e6:,.0f} MB are free and {needed / 1e6:,.0f} MB are needed")
            partial.mkdir()
            return True

        def finish() -> None:
            with as_os_errors(partial):
                content["files"] = checksums(partial)
                self._held()
                write_meta(partial / "meta.json", content)
            if not self._remote:
                os.rename(partial, final)
                sync(self.directory)
            self._losses[step] = content["validation_loss"]

        def start(name: str) -> Any:  # every process its part
            return ocp.save_async(absolute(partial) / name, items[name])

        try:
            if not on_main(prepare, (OSError, BusyError)):
                return
        except OSError as error:
            raise self._failed(step, error) from error
        self._writing = Write(
            step, partial, [functools.partial(start, name) for name in items], finish, self._delete_old
        )

    def wait(self) -> None:
        """Returns when no checkpoint is being written any more; all processes must call it.

        Raises:
            CheckpointError: The one that was could not be. Earlier ones are as they were.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()

        def outcome() -> None:
            error = writing.error
            if error is None:
                return
            ours = isinstance(error, ValueError) and self._remote  # so tensorstore says all that a bucket refuses
            if not writing.complete and (ours or is_of_storage(error)):
                self._discard(writing.partial)
                raise self._failed(writing.step, error) from error
            raise error

        on_main(outcome, (CheckpointError, BusyError, OSError))

    def close(self) -> None:
        """Lets a write end after an error; with several processes, some of which may be gone, it does not wait."""
        if jax.process_count() > 1:
            return
        try:
            self.wait()
        except (CheckpointError, BusyError, OSError, ValueError) as error:
            warn(str(error))

    def _discard(self, partial: Path) -> None:
        """Deletes what was written of a checkpoint that failed; what is left is removed at the next start."""
        with contextlib.suppress(Exception):
            if self._remote:
                self._held()
                if (partial / "meta.json").exists():  # written, though the answer said otherwise or did not come
                    return
            remove(partial)

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        try:
            with as_os_errors(self.directory):
                kept = ", ".join(map(str, self.steps())) or "none"
        except OSError:
            kept = "not known, as they cannot be listed"
        remedy = "See that the bucket can be written to" if self._remote else "Make room or repair the disk"
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: {first_line(error)}. Earlier "
            f"checkpoints are as they were (steps: {kept}). {remedy}, then start the same command again"
        )

    def _delete_old(self) -> None:
        """Deletes what is not to be kept. A checkpoint that cannot be is tried again after the next one."""
        try:
            with as_os_errors(self.directory):
                self._doomed |= self._old()
        except OSError as error:
            warn(f"{self.directory} could not be listed to delete old checkpoints: {first_line(error)}")
        for old in sorted(self._doomed):
            folder = self.directory / str(old)
            try:
                delete(folder)
                self._doomed.remove(old)
            except OSError as error:
                warn(
                    f"the old checkpoint {folder} could not be deleted: {first_line(error)}. It is tried again after "
                    "the next one; if that fails too, see that this process may delete there"
                )

    def _old(self) -> set[int]:
        steps = self.steps()
        kept = {*steps[-self._keep :], self._restored}
        kept |= {step for step in steps if self._every and step % self._every == 0}
        if self._best:
            losses = {step: loss for step in steps if (loss := self._loss(step)) is not None}
            kept |= set(sorted(losses, key=lambda step: (losses[step], step))[: self._best])
        return set(steps) - kept

    def _loss(self, step: int) -> float | None:
        if step not in self._losses:
            try:
                meta = json.loads((self.directory / str(step) / "meta.json").read_text(encoding="utf-8"))
                self._losses[step] = meta["content"].get("validation_loss")
            except (OSError, ValueError, KeyError):
                self._losses[step] = None  # damaged, which restoring it will say
        return self._losses[step]

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
                compare_configs(meta, config, folder)
                return step, meta
            if damaged:
                raise CheckpointError(
                    f"{damaged[0]}, and no other in {self.directory} can be read. Bring one back from a copy, or "
                    "start anew with --fresh, which moves this run aside"
                )
            return None

        def latest_of_storage() -> tuple[int, dict[str, Any]] | None:
            with as_os_errors(self.directory):
                return latest()

        found = on_main(latest_of_storage if self._remote else latest, (CheckpointError, OSError))
        if found is None:
            return None
        step, meta = found
        self._restored = step  # stays while this process does
        folder = self.directory / str(step)
        restored = Restored(
            step,
            load(folder, "params", params, meta),
            load(folder, "rest", rest, meta),
            meta["data"],
            compare_configs(meta, config, folder),
        )
        for bad in damaged:  # out of the way, because this run will write that step again
            with as_os_errors(bad.folder):
                aside = free_name(bad.folder.with_name(f"damaged-{bad.folder.name}"))
                bad.folder.rename(aside)
            warn(f"{bad}; it is now {aside}, delete it when you like. Continuing from step {step} instead")
        return restored


def runs_here(model: DecoderConfig) -> DecoderConfig:
    """A model whose attention this kind of device can compute: kernels of another become "auto"."""
    of = {"cudnn": "gpu", "splash": "tpu"}.get(model.attention, jax.default_backend())
    return model if of == jax.default_backend() else dataclasses.replace(model, attention="auto")


def load_model(
    path: Path | str, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Decoder, dict[str, Any], TrainConfig]:
    """Reads a trained model: the decoder, its variables and the config of its run. LoRA is merged into the weights.

    Attention by kernels that this device lacks becomes "auto", which computes the same function.

    Path, step and errors are those of `find_checkpoint`. Over the mesh, parameters are spread as they are read, by the
    rules of the run; several processes, which must all call this, need one. None: all on one device.
    """
    folder, meta, config = find_checkpoint(path, step)
    model = Decoder(runs_here(config.model))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    if mesh is not None:
        places = tree_shardings(config.model.sharding, mesh, shapes)
        shapes = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)
    with waiting("all to read the checkpoint"):
        params = load(folder, "params", shapes, meta)
    if config.model.lora is not None:
        merged, params = merge(model.config, params)
        model = Decoder(merged)
    return model, {"params": params}, config

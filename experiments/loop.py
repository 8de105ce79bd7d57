"""The training loop: `train(config)`, on one process or, once `experiments.distributed.start` has joined them, many.

A run keeps everything in one folder and goes on from its last checkpoint whenever it is started again, bit
for bit as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.batches import load_data, prepare_together
from experiments.checkpoint import Checkpoints
from experiments.command import make_folder
from experiments.config import TrainConfig, check, check_mesh
from experiments.data.levels import LevelData
from experiments.distributed import check_same, is_main, on_main, share, waiting
from experiments.files import absolute, is_remote
from experiments.flops import idle_share, step_flops
from experiments.metrics import MetricsLog, Throughput
from experiments.optim import make_optimizer
from experiments.process import BusyError, only_process, set_aside, stop_signals
from experiments.profiling import Profiler
from experiments.step import (
    CHECKED,
    TrainState,
    create_state,
    everywhere,
    make_eval_step,
    make_train_step,
    means,
    shard,
    shard_batch,
)
from experiments.stored import write_run
from experiments.transfer import take_parameters
from experiments.typed import to_json
from fam_jax import Decoder, make_mesh
from fam_jax.sharding import table

Callback = Callable[[int, dict[str, float], TrainState], bool | None]
SKIPPED_IN_A_ROW = 10  # steps whose loss or gradient is not finite, before a run is given up


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not a finite number, again and again. The message says when and what to do."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` hands back.

    Attributes:
        config: The run's.
        model: The decoder.
        state: After the last step.
        step: Steps made, earlier processes included.
        metrics: Those of the last step that this process made; empty if it made none.
        validation: Those of its last evaluation; empty if there was none.
        stopped: None if the run is complete, else "SIGTERM", "SIGINT" or "callback".
        directory: Where its files are.
    """

    config: TrainConfig
    model: Decoder
    state: TrainState
    step: int
    metrics: dict[str, float]
    validation: dict[str, float]
    stopped: str | None
    directory: Path

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` and `generate` take."""
        return {"params": self.state.params}


def train(
    config: TrainConfig, *, fresh: bool = False, progress: bool = True, callback: Callback | None = None
) -> TrainResult:
    """Trains until `config.steps`, going on from the last checkpoint in `config.directory` if there is one.

    Args:
        config: The run.
        fresh: Start anew; an earlier run in the same folder is moved aside, not deleted.
        progress: Show a progress bar and say where things go.
        callback: Called after every step with its number, its metrics and the state, which is valid until it
            returns. Returning True, in the main process if there are several, ends the run there, with a checkpoint.

    Raises:
        ValueError: The parts of the config do not fit together, see `experiments.config.check`, or the folder
            cannot be made.
        DataError: The data cannot be used, or it is not that of the run to continue.
        CheckpointError: The folder holds another run, or a checkpoint cannot be read or written.
        NonFiniteError: The loss or the gradient is not finite in SKIPPED_IN_A_ROW steps one after another; a single one
            is left out. The last good checkpoint stays.
        BusyError: Another process is training in the same folder.
        DistributedError: The processes of the job have other settings or other data.
    """
    check(config)
    with contextlib.ExitStack() as stack:
        return _Run(config, fresh, progress, callback, stack).loop()


class _Run:
    """One process's part of a run."""

    def __init__(
        self, config: TrainConfig, fresh: bool, progress: bool, callback: Callback | None, stack: contextlib.ExitStack
    ):
        self.config, self.progress, self.callback = config, progress, callback
        check_same("settings", [to_json(config), fresh])
        self.mesh = make_mesh(config.mesh)
        check_mesh(config, self.mesh)
        stack.enter_context(jax.set_mesh(self.mesh))
        self.model = Decoder(config.model)
        optimizer, schedule = make_optimizer(config.optim, config.steps)
        create = functools.partial(create_state, config, self.model, optimizer)
        shapes = shard(config, self.mesh, jax.eval_shape(create))
        self.places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        begin = jax.jit(create, out_shardings=self.places)
        stream = functools.partial(self.model.init_state, config.data.batch_size)
        self.begin_stream = jax.jit(stream, out_shardings=self.places.stream)
        self.train_step = make_train_step(config, self.model, optimizer, schedule, self.places)
        self.eval_step = make_eval_step(self.model)
        # Whatever is wrong with the data shows here, before anything is compiled and before the folder is touched.
        prepare_together(config.data)
        self.batches = load_data(config.data, "train")
        self.validation = load_data(config.data, "validation") if config.eval_every else None
        self.validation_start = self.validation.get_state() if self.validation is not None else {}
        check_same("data", [self.batches.get_state(), self.validation_start])
        self.stop = stack.enter_context(stop_signals())  # an interrupt that is raised while XLA compiles can get lost
        self._take_folder(fresh, stack)
        kept = (config.keep, config.keep_every, config.keep_best)
        self.checkpoints = Checkpoints(config.directory / "checkpoints", *kept, lambda: self.held())
        stack.callback(self.checkpoints.close)
        self.start, self.state = self._begin(begin, shapes)
        self.log = None
        if is_main():
            self.log = stack.enter_context(contextlib.closing(MetricsLog(config.directory, self.start, self.held)))
        self.bar = stack.enter_context(
            tqdm(
                total=config.steps,
                initial=self.start,
                desc=config.name,
                unit="step",
                disable=not (progress and is_main()),
                dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
            )
        )
        operations = functools.partial(step_flops, config.model, config.stream)
        self.throughput = Throughput(operations, jax.devices()[0].device_kind, self.mesh.size)
        self.profiler = stack.enter_context(
            contextlib.closing(Profiler(config.profile, config.directory / "profile", self._say))
        )
        self.metrics: dict[str, float] = {}
        self.skipped = 0  # steps in a row that were left out
        self.said = 0  # the signal that some process has said to all
        self.validation_metrics: dict[str, float] = {}
        self.validated = 0  # the step of those

    def _take_folder(self, fresh: bool, stack: contextlib.ExitStack) -> None:
        """Makes the run's folder, after moving an earlier run aside if asked to, and holds it."""
        directory = self.config.directory

        def take() -> None:
            if fresh and (is_remote(directory) or directory.is_dir()):  # gcsfs calls what it cannot look at no folder
                self._say(f"the earlier run is now in {set_aside(directory)}")
            make_folder(directory, "work_dir")
            self.held = stack.enter_context(only_process(directory))

        on_main(take, (ValueError, BusyError, OSError))

    def _say(self, text: str) -> None:
        if self.progress and is_main():
            tqdm.write(text)  # keeps clear of the progress bar

    def _begin(self, create: Callable[[], TrainState], shapes: TrainState) -> tuple[int, TrainState]:
        """The step and state to go on from; also says what this run is and writes run.json."""
        config, say = self.config, self._say
        with waiting("all to read the checkpoint"):
            restored = self.checkpoints.restore(shapes.params, _rest(shapes), config)
        self.new = restored is None
        if restored is not None:
            self.batches.set_state(restored.data)  # refuses other data, before run.json would name it
        size = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        device = jax.devices()[0]
        count = "" if self.mesh.size == 1 else f"{self.mesh.size} x "
        say(f"{config.name}: {size / 1e6:,.2f}M parameters on {count}{device.device_kind} ({device.platform})")
        if jax.process_count() > 1:
            say(f"{jax.process_count()} processes with {jax.local_device_count()} devices each")
        if self.mesh.size > 1:
            say(table(config.model.sharding, self.mesh, shapes.params))
            rows = math.prod(self.mesh.shape[axis] for axis in config.model.sharding.batch)
            if config.data.batch_size // config.accumulate % rows:
                say(
                    f"WARNING: data.batch_size={config.data.batch_size} over accumulate={config.accumulate} is not a "
                    f"multiple of the {rows} devices that rows are spread over, so that some do the same work; change "
                    "one of them, or mesh.data and mesh.fsdp"
                )
        along = self.mesh.shape["sequence"]
        memory = config.model.memory
        has_fam = memory is not None and memory.kind == "fam" and memory.fam_length > 0  # of rivals there is no formula
        if along > 1 and has_fam and not isinstance(config.data, LevelData):
            idle = idle_share(config.model, config.data.length, along)
            say(f"the FAM is with one of {along} devices at a time: they are idle for about {idle:.1%} of a step")
        say(f"files: {absolute(config.directory)} (checkpoints/, metrics.jsonl, tensorboard/, run.json)")
        if restored is None:
            say(f"a new run of {config.steps:,} steps")
            state = create()
            if config.init_from is not None:
                say(f"its parameters begin as those of {config.init_from}")
                state = dataclasses.replace(state, params=take_parameters(config.init_from, config, state.params, say))
            on_main(lambda: write_run(config), (OSError,))
            return 0, state
        for field, before, now in restored.changed:
            say(f"changed since the last start: {field} was {before!r} and is {now!r}")
            if field == "steps" and config.optim.schedule != "constant" and config.optim.decay_steps is None:
                say("  so the learning rate now decays over other steps; optim.decay_steps would fix them")
        say(f"continuing after step {restored.step:,} of {config.steps:,}")
        on_main(lambda: write_run(config), (OSError,))
        return restored.step, TrainState(params=restored.params, **restored.rest)

    def loop(self) -> TrainResult:
        """Makes the steps that are left."""
        config, pending, stopped, step, due = self.config, None, None, self.start, False
        # A curriculum's next batch depends on this step's metrics, so it cannot run ahead of them.
        lockstep = self.callback is not None or hasattr(self.batches, "observe")
        if not config.steps and self.new:
            self._save(0)
        elif step >= config.steps:
            self._say(f"nothing is left to do: {step:,} of {config.steps:,} steps are made; give more --steps")
        for step in range(self.start + 1, config.steps + 1):
            batch = next(self.batches)
            placed = shard_batch(config, self.mesh, batch) | self._ask_to_stop()
            with waiting(f"step {step}"):
                self.state, metrics = self.profiler.run(step, self.train_step, self.state, placed)
            if pending:
                self._settle(*pending)
            rows, length = batch["tokens"].shape
            pending = (step, metrics, (rows, length))
            last, stopped = step == config.steps, self._stopped_by()
            log = last or _due(step, config.log_every)
            evaluate = _due(step, config.eval_every) or (last and config.eval_every)
            save = last or _due(step, config.checkpoint_every)
            if lockstep or log or evaluate or save or stopped:
                self._settle(*pending)
                pending = None
            due = due or save
            save = last or (due and not self.skipped)  # a run that goes wrong keeps what was before
            if log and self.log:
                extra: dict[str, float] = {}
                if hasattr(self.batches, "observe"):
                    extra["length"] = length
                self.log.write(step, "train", {**self.metrics, **extra, **self.throughput.rates})
            if evaluate:
                self._evaluate(step)
            if lockstep and self._observe(step):
                stopped = stopped or "callback"
            if save or stopped:
                self._save(step)
                due = False
            if stopped:
                break
        with waiting("the last checkpoint"):
            self.checkpoints.wait()
        if step == config.steps:
            stopped = None  # whatever else asked for it, the run is complete
        if stopped:
            self._say(f"stopped by {stopped} after step {step:,}; everything is in the checkpoint")
        return TrainResult(
            config=config,
            model=self.model,
            state=self.state,
            step=step,
            metrics=self.metrics,
            validation=self.validation_metrics,
            stopped=stopped,
            directory=config.directory,
        )

    def _ask_to_stop(self) -> dict[str, jax.Array]:
        """With several processes, what each says to all in a step: 0, or the signal that has asked it to stop."""
        if jax.process_count() == 1:
            return {}
        said = signal.Signals[self.stop.name].value if self.stop.name else 0
        return {"stop": everywhere(self.mesh, said)}

    def _stopped_by(self) -> str | None:
        """The signal that asks to stop after this step, the same on all processes, as it was said in the last one."""
        if jax.process_count() == 1:
            return self.stop.name
        return signal.Signals(self.said).name if self.said else None

    def _settle(self, step: int, metrics: dict[str, jax.Array], shape: tuple[int, int]) -> None:
        """Fetches a step's metrics, waiting for the step to end, and shows them."""
        with waiting(f"step {step}"):
            self.metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.said = int(self.metrics.pop("stop", 0))
        self.throughput.step(*shape)
        shown = f"loss {self.metrics['loss']:.4f}"
        if hasattr(self.batches, "observe"):
            shown += f", exact match {self.metrics['exact_match']:.2f}"
        self.bar.set_postfix_str(", ".join(filter(None, (shown, str(self.throughput)))), refresh=False)
        self.bar.update(step - self.bar.n)
        if not self.metrics["skipped"]:
            self.skipped = 0
            return
        self.skipped += 1
        found = ", ".join(
            f"{name} is {self.metrics[name]}" for name in CHECKED if not math.isfinite(self.metrics.get(name, 0.0))
        )
        self._say(f"WARNING: step {step:,} is left out: {found}")
        if self.skipped >= SKIPPED_IN_A_ROW:
            with waiting("the last checkpoint"):
                self.checkpoints.wait()
            kept = self.checkpoints.steps()
            where = f"from the last good checkpoint, step {kept[-1]} in {self.checkpoints.directory}, " if kept else ""
            raise NonFiniteError(
                f"step {step}: {found}, as in the {SKIPPED_IN_A_ROW - 1} steps before, at learning rate "
                f"{self.metrics['learning_rate']:.3g}. Start again {where}with a lower optim.learning_rate or a "
                "smaller optim.clip_norm"
            )

    def _observe(self, step: int) -> bool:
        """Tells curriculum and callback of a step; whether the callback wants to stop."""
        if hasattr(self.batches, "observe"):
            self.batches.observe(self.metrics)
        return self.callback is not None and share(bool(self.callback(step, self.metrics, self.state)))

    def _evaluate(self, step: int) -> None:
        """Measures the validation split, always on the same batches and from fresh rows."""
        assert self.validation is not None
        self.throughput.interrupt()
        self.validation.set_state(self.validation_start)
        stream = self.begin_stream() if self.config.stream else None
        total: dict[str, float] = {}
        for _ in range(self.config.eval_steps):
            batch = shard_batch(self.config, self.mesh, next(self.validation))
            sums, stream = self.eval_step(self.state.params, batch, stream)
            with waiting(f"the evaluation after step {step}"):
                found = jax.device_get(sums)
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + float(value)  # in float64: many batches lose nothing
        values = means(total)
        self.validation_metrics = {name: values[name] for name in ("loss", "accuracy")}
        self.validated = step
        if self.log:
            self.log.write(step, "validation", self.validation_metrics)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.validation_metrics.items())
        self._say(f"step {step:,}: validation {shown}")

    def _save(self, step: int) -> None:
        self.throughput.interrupt()
        if self.log:
            self.log.flush()  # a run that goes on from here has all lines before
        position, rest = self.batches.get_state(), _rest(self.state)
        loss = self.validation_metrics["loss"] if self.validation_metrics and self.validated == step else None
        with waiting(f"the checkpoint before that of step {step}"):
            self.checkpoints.begin(step, self.state.params, rest, self.config, position, loss)


def _rest(state: TrainState) -> dict[str, Any]:
    """All fields of the state but the parameters."""
    names = [field.name for field in dataclasses.fields(state) if field.name != "params"]
    return {name: getattr(state, name) for name in names}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

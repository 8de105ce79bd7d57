"""Kills a training run again and again, and shows that it ends as if nobody had: `python -m experiments.kills`.

A streaming run with FAM, noise and Random State Passing is trained once without interruption. Then the same run is
trained in processes that are killed (SIGKILL: the process cannot do anything about it), half of them at a random
moment, half while a checkpoint is being written, which the folder `saving-STEP` shows that they leave behind. Every
number of every line of metrics must be that of the straight run bit for bit, and so must every array of the last
checkpoint. Takes about five minutes on two CPU cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments import results
from experiments.checkpoint import Checkpoints
from experiments.command import make_folder, run_command
from experiments.config import TrainConfig
from experiments.metrics import read_metrics
from experiments.optim import make_optimizer
from experiments.step import create_state
from experiments.train import parse_config
from experiments.typed import to_json
from fam_jax import Decoder

MODEL = (
    "--model.num-layers 2 --model.d-model 64 --model.num-heads 2 --model.head-dim 32 --model.d-ff 128 "
    "--model.memory.block-size 8 --model.memory.fam-length 4 --model.memory.rsp 0.8 --model.memory.noise 0.1"
)
DATA = "--data.batch-size 4 --data.length 32 --data.block-size 8"
RUN = "--optim.warmup-steps 10 --log-every 1 --eval-every 0 --keep 2"
DOCUMENTS = 12  # of made-up text, of 400 to 2,000 letters: many end on the way
ANYWHERE, SAVING = "at a random moment", "while a checkpoint is written"
STARTING = 0.3  # of the kills at a random moment, so many come before the first step of a process, as far as time tells
CLOCK = {"tokens_per_second", "flops_per_second", "mfu"}  # metrics that depend on the clock
PATIENCE = 600  # seconds to wait for a process to make its next step


class KillsError(RuntimeError):
    """The runs could not be made as asked, or they differ. The message says where."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Kills a training run again and again, and compares it with one that nobody has killed.

    Attributes:
        kills: How many; every other one while a checkpoint is being written.
        steps_per_kill: Training steps in all, over the kills and one more.
        checkpoint_every: Steps from one checkpoint to the next.
        seed: Of the text, the model and the moments.
        output: Folder or JSON file for the result.
        name: Name of the result, and of its file if `output` is a folder.
        work_dir: Folder for both runs, which must not have any yet; None is one that is removed afterwards.
    """

    kills: int = 20
    steps_per_kill: int = 40
    checkpoint_every: int = 10
    seed: int = 0
    output: Path = results.DIRECTORY
    name: str = "kills"
    work_dir: Path | None = None

    def __post_init__(self) -> None:
        for field in ("kills", "steps_per_kill", "checkpoint_every"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} is not allowed; it must be at least 1")
        if self.steps_per_kill < 2 * self.checkpoint_every:
            raise ValueError(
                f"steps_per_kill={self.steps_per_kill} is not allowed; it must be at least twice "
                f"checkpoint_every={self.checkpoint_every}, so that there is something to kill"
            )

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.steps_per_kill * (self.kills + 1)


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        when: ANYWHERE or SAVING.
        step: The last one in the metrics.
        saving: The step of the checkpoint that was being written, as its folder shows; None if there was none.
        resumed: The step after which the next process went on; None if it was killed before.
    """

    when: str
    step: int
    saving: int | None
    resumed: int | None


class Run:
    """A run in a folder of its own, whose processes this one starts."""

    def __init__(self, options: Options, work: Path, name: str):
        self.words = [
            *f"{MODEL} {DATA} {RUN} --seed {options.seed} --steps {options.steps}".split(),
            *("--checkpoint-every", str(options.checkpoint_every)),
            *("--data.source", f"text:{work / 'text'}", "--data.data-dir", str(work / "data")),
            *("--work-dir", str(work / name)),
        ]
        self.config = parse_config("lm", self.words)
        self.checkpoints = self.config.directory / "checkpoints"
        self.log = work / f"{name}.txt"
        self._compiled = work / "compiled"
        self._process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        """A process that trains; all of them share what they compile."""
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self._compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "-m", "experiments.train", "--config", "lm", *self.words]
        path = os.pathsep.join(filter(None, [str(results.ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **cache, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT
            )
        return self._process

    def kill(self) -> None:
        """Ends the last process, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_step(self) -> int:
        """The last step in the metrics; 0 if there is none."""
        try:
            with (self.config.directory / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
                found = re.findall(rb'^{"step": (\d+),.*}$', file.read(), re.MULTILINE)
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def saving(self) -> int | None:
        """The step of the checkpoint that is being written, or was when the process ended."""
        found = [path.name for path in self.checkpoints.glob("saving-*")]
        return int(found[0].removeprefix("saving-")) if found else None

    def resumed(self) -> int | None:
        """The step after which the last process has gone on; 0 if it began anew; None if it did not get that far."""
        log = self.log.read_text(errors="replace")
        found = re.search(r"continuing after step ([\d,]+) of", log)
        return int(found[1].replace(",", "")) if found else 0 if "a new run of" in log else None

    def rows(self) -> list[dict[str, Any]]:
        """The metrics, without what depends on the clock."""
        path = self.config.directory / "metrics.jsonl"
        rows = read_metrics(path) if path.exists() else []
        return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]

    def finish(self, process: subprocess.Popen) -> None:
        """Waits for a process to make all steps."""
        if status := process.wait(3600):
            raise KillsError(f"a process ended with status {status}; the end of {self.log}:\n{self.tail()}")

    def wait_until(self, process: subprocess.Popen, what: str, true: Callable[[], bool]) -> None:
        """Looks again and again, more often than a checkpoint takes."""
        end = time.monotonic() + PATIENCE
        while not true():
            if process.poll() is not None:
                raise KillsError(
                    f"waiting for {what}, the process ended with status {process.returncode}; give more "
                    f"--steps-per-kill if it was through. The end of {self.log}:\n{self.tail()}"
                )
            if time.monotonic() > end:
                raise KillsError(f"waiting for {what}, nothing happened for {PATIENCE} s; look at {self.log}")
            time.sleep(0.0005)

    def tail(self) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])


def write_text(folder: Path, seed: int) -> None:
    """Documents of random words."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), size)) for size in rng.integers(1, 8, 200)]
    for number in range(DOCUMENTS):
        text = " ".join(rng.choice(words, 500))[: int(rng.integers(400, 2000))]
        (folder / f"{number:02d}.txt").write_text(text)


def arrays(config: TrainConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The data's position and the SHA-256 of every array, by its path, in the last checkpoint of a run."""
    model, (optimizer, _) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    shapes = jax.eval_shape(functools.partial(create_state, config, model, optimizer))
    rest = {field.name: getattr(shapes, field.name) for field in dataclasses.fields(shapes) if field.name != "params"}
    found = Checkpoints(config.directory / "checkpoints", config.keep).restore(shapes.params, rest, config)
    if found is None or found.step != config.steps:
        raise KillsError(f"{config.directory} has no checkpoint of step {config.steps}")
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": found.params, "rest": found.rest}):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        sums[name] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    return found.data, sums


def compare(got: list[dict[str, Any]], wanted: list[dict[str, Any]], what: str) -> int:
    """Checks that lines of metrics are the first ones of the straight run, bit for bit; returns their number.

    Raises:
        KillsError: They are not; says which is the first and what differs.
    """
    for number, row in enumerate(got):
        other = wanted[number] if number < len(wanted) else {}
        if row != other:
            names = [name for name in row | other if row.get(name) != other.get(name)]
            found = ", ".join(f"{name} is {row.get(name)!r}, not {other.get(name)!r}" for name in names[:3])
            raise KillsError(f"{what}, line {number + 1} of the metrics differs from the straight run's: {found}")
    return len(got)


def kill(run: Run, when: str, target: int, delay: float) -> tuple[int, int | None]:
    """Starts a process and kills it; returns the last step it has logged and the checkpoint it was writing.

    Args:
        run: The run.
        when: ANYWHERE or SAVING.
        target: Steps to wait for first, more than are made, so that what the process before left is cleaned away; 0 is
            none.
        delay: Seconds to wait after that, or after the next checkpoint has been begun.
    """
    process = run.start()
    run.wait_until(process, f"step {target}", lambda: run.last_step() >= target)
    if when == SAVING:
        run.wait_until(process, "a checkpoint", lambda: run.saving() is not None)
    time.sleep(delay)
    run.kill()
    return run.last_step(), run.saving() if target else None  # before the first step it may be what the last one left


def measure(options: Options, work: Path) -> dict[str, Any]:
    """Trains both runs below `work`; returns the values of the result.

    Raises:
        KillsError: They differ, or a process failed.
    """
    write_text(work / "text", options.seed)
    straight, killed = Run(options, work, "straight"), Run(options, work, "killed")
    rng = np.random.default_rng(options.seed)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=options.kills, unit="kill", desc="straight run", disable=None))
        for one in (straight, killed):
            stack.callback(one.kill)
        begun, process = time.perf_counter(), straight.start()
        straight.wait_until(process, "the first step", lambda: straight.last_step() > 0)
        start_seconds = time.perf_counter() - begun
        straight.finish(process)
        wanted = straight.rows()
        found: list[Kill] = []
        missed, compared, step, pending = 0, 0, 0, None
        while True:
            number = len(found) + (pending is not None)
            bar.set_description(f"kill {number + 1}" if number < options.kills else "the rest")
            when = (ANYWHERE, SAVING)[number % 2]
            if number == options.kills:
                killed.finish(killed.start())
            else:
                share = (options.steps - step) // (options.kills - number + 1)  # of the steps that are left
                target = step + int(rng.integers(1, max(2, share - options.checkpoint_every)))
                delay = float(rng.uniform(0, 0.02))
                if when == ANYWHERE and rng.random() < STARTING:
                    target, delay = 0, float(rng.uniform(0, start_seconds / 2))  # the first one has compiled
                step, saving = kill(killed, when, target, delay)
            compared += compare(killed.rows(), wanted, f"after kill {number}")
            if pending is not None:
                found.append(dataclasses.replace(pending, resumed=killed.resumed()))
                pending = None
                bar.update()
            if number == options.kills:
                break
            if when == SAVING and saving is None:
                missed += 1  # it was through just before; the next process is killed in its place
                continue
            pending = Kill(when, step, saving, None)
    compare(wanted, killed.rows(), "at the end")
    (position, sums), (other_position, other_sums) = arrays(straight.config), arrays(killed.config)
    differ = [name for name in sums | other_sums if sums.get(name) != other_sums.get(name)]
    if differ or position != other_position:
        raise KillsError(f"the last checkpoints differ: {', '.join(differ) or 'the position of the data'}")
    return {
        "curves": [
            {
                "label": when,
                "seed": options.seed,
                "kill": [number + 1 for number, one in enumerate(found) if one.when == when],
                "step": [one.step for one in found if one.when == when],
                "saving": [one.saving for one in found if one.when == when],
                "resumed": [one.resumed for one in found if one.when == when],
            }
            for when in (ANYWHERE, SAVING)[: options.kills]
        ],
        "marks": [],
        "while_saving": sum(one.saving is not None for one in found),
        "missed": missed,
        "lines_compared": compared,
        "last_loss": wanted[-1]["loss"],
        "arrays": sums,
        "identical": True,
    }


def run(options: Options) -> tuple[results.Result, Path]:
    """Makes both runs and writes the result.

    Raises:
        ValueError: A folder cannot be used.
        KillsError: See `measure`.
    """
    if options.output.suffix != ".json":
        results.make_directory(options.output)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        work = Path(temporary)
        if options.work_dir is not None:
            work = make_folder(options.work_dir.expanduser().resolve(), "work_dir")
            if any(work.iterdir()):
                raise ValueError(f"work_dir={str(options.work_dir)!r} is not empty; give another folder")
        values = measure(options, work)
        config = to_json(Run(options, work, "killed").config)
    settings = dataclasses.asdict(options)
    del settings["output"], settings["work_dir"], settings["name"]
    for part, names in ((config, ("work_dir",)), (config["data"], ("source", "data_dir"))):
        for name in names:
            part[name] = Path(part[name]).name  # not where on this machine
    result = results.make(
        "kills",
        options.name,
        config=settings | {"train": config},
        seeds=[options.seed],
        values=values,
        wall_seconds=time.perf_counter() - start,
    )
    return result, results.write(result, options.output)


def main() -> int:
    """The command line; returns the exit code."""
    try:
        options = tyro.cli(Options, prog="python -m experiments.kills", description=__doc__)
        result, file = run(options)
    except (ValueError, KillsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, KillsError) else 2
    values = result.values
    print(
        f"{options.kills} kills, {values['while_saving']} of them while a checkpoint was being written: every resume "
        "went on bit for bit "
        f"({values['lines_compared']:,} lines of metrics and {len(values['arrays'])} arrays compared)"
    )
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    run_command(main)

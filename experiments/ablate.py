"""Runs a comparison: `python -m experiments.ablate ROW --size cpu`.

Trains every arm with every seed, measures it, and puts all into one table and one plot. Started again, it goes on
where it was stopped: finished runs are not trained again, and measured ones not measured again.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType

import tyro

from experiments import ablations, evaluate, report, results
from experiments.checkpoint import CheckpointError
from experiments.command import modules, run_command
from experiments.config import TrainConfig, check
from experiments.data.questions import QuestionData
from experiments.process import BusyError, Stopped
from experiments.train import NonFiniteError, train
from experiments.typed import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains and measures the arms of a comparison.

    Attributes:
        row: Which comparison; a module of experiments/ablations.
        size: One of its sizes.
        seeds: Of the parameters and of the data.
        arms: Only these. None: all.
        work_dir: Folder of the runs.
        output: Folder of the result files and the plot.
    """

    row: tyro.conf.Positional[str]
    size: str = "cpu"
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] | None = None
    work_dir: Path = Path("runs")
    output: Path = results.DIRECTORY


def load(name: str) -> ModuleType:
    """The module of a comparison.

    Raises:
        ValueError: There is none of this name.
    """
    known = modules(ablations)
    if name not in known:
        raise ValueError(f"row={name!r} is not known; there are {', '.join(known)}")
    return importlib.import_module(f"{ablations.__name__}.{name}")


def configs(options: Options) -> dict[tuple[str, int], TrainConfig]:
    """The runs by arm and seed, seed after seed, so that all arms are there early.

    Raises:
        ValueError: The row, the size or an arm is not known, or a config does not fit together.
    """
    row = load(options.row)
    if options.size not in row.SIZES:
        raise ValueError(f"size={options.size!r} is not known; {options.row} has {', '.join(row.SIZES)}")
    arms = row.arms(options.size)
    unknown = [arm for arm in options.arms or () if arm not in arms]
    if unknown:
        raise ValueError(f"arms={unknown} are not known; {options.row} has {', '.join(arms)}")
    found = {}
    for seed in options.seeds:
        for arm, config in arms.items():
            if options.arms is None or arm in options.arms:
                folder = options.work_dir / f"{options.row}-{options.size}-{arm}-{seed}"
                data = dataclasses.replace(config.data, seed=seed)
                found[arm, seed] = dataclasses.replace(config, name=arm, data=data, seed=seed, work_dir=str(folder))
                check(found[arm, seed])
    return found


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Trains and measures what is not there yet.

    Returns:
        All of it as one result, its file and its plot.

    Raises:
        ValueError: as `configs`, or the output folder cannot be made.
        Stopped: a signal came.
        CheckpointError, NonFiniteError, BusyError: as `experiments.train.train`.
    """
    wanted = configs(options)
    results.make_directory(options.output)
    name = f"{options.row}-{options.size}"
    evaluation = load(options.row).evaluation(options.size)
    measured = []
    for number, ((arm, seed), config) in enumerate(wanted.items(), 1):
        file = options.output / name / f"{arm}-{seed}.json"
        if not file.exists():
            print(f"run {number} of {len(wanted)}: {arm}, seed {seed}")
            trained = train(config)
            if trained.stopped:
                raise Stopped(trained.stopped)
            steps = None
            if isinstance(config.data, QuestionData):
                steps = (*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps)
            evaluate.run(
                evaluate.Options(config.directory, name=file.stem, output=file.parent, steps=steps, **evaluation)
            )
        measured.append(results.read(file))
        if not _is_of(config, measured[-1]):
            raise ValueError(f"{file} was measured with other settings than {arm} has now; move it away")
    result = dataclasses.replace(
        measured[0],
        name=name,
        config={f"{arm}, seed {seed}": one.config for (arm, seed), one in zip(wanted, measured, strict=True)},
        seeds=sorted({seed for one in measured for seed in one.seeds}),
        values={"curves": [curve for one in measured for curve in one.values["curves"]]},
        wall_seconds=sum(one.wall_seconds for one in measured),
        command=results.command_line(),
    )
    file = results.write(result, options.output)
    return result, file, report.plot(result, file.with_suffix(".png"))


def _is_of(config: TrainConfig, result: results.Result) -> bool:
    """Whether a result is that of a config, wherever the run's files are."""
    now = to_json(config)
    then = to_json(from_json(result.config["train"], TrainConfig))  # settings that are newer have their defaults
    return all(now[field] == then[field] for field in ("model", "data", "optim", "steps", "seed"))


def main() -> int:
    """The command line; returns the exit code."""
    rows = "\n".join(f"  {name:<16} {summary}" for name, summary in modules(ablations).items())
    options = tyro.cli(Options, prog="python -m experiments.ablate", description=f"{__doc__}\nrows:\n{rows}")
    try:
        result, file, figure = run(options)
    except Stopped as stopped:
        print("to continue, give the same command again")
        return stopped.status
    except (ValueError, CheckpointError, NonFiniteError, BusyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.table(result))
    print(f"\nwrote {file} and {figure}")
    return 0


if __name__ == "__main__":
    run_command(main)

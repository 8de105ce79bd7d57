"""Runs comparisons: `python -m experiments.ablate ROW --size cpu`; `--list` shows them all.

Trains every arm with every seed, measures it, and puts all into one table and one plot. Started again, it goes on
where it was stopped: finished runs are not trained again, and measured ones not measured again. `--rows core` runs
those that carry the papers' main claims, one row after another, `--rows all` all that have the size. An arm trains at
the learning rate that `experiments.search` found best for it, where that was searched. A run that another row has
measured, under whatever name, is taken from there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tyro

from experiments import ablations, analyze, evaluate, report, results
from experiments.checkpoint import CheckpointError
from experiments.command import modules, run_command
from experiments.config import TrainConfig, check
from experiments.data.questions import QuestionData
from experiments.process import BusyError, Stopped
from experiments.stored import find_checkpoint
from experiments.train import NonFiniteError, train
from experiments.typed import from_json, to_json

SEEDS = (0, 1, 2)
SEARCH = "search"  # folder of the results of experiments.search, in that of all results
CONTROLS = ("zero_memory", "reset_memory")  # of what measures a FAM
# The fields of a config that a run's result depends on.
DECIDES = (
    "model",
    "data",
    "optim",
    "steps",
    "seed",
    "init_from",
    "prompt_token",
    "train_mixing",
    "accumulate",
    "z_loss",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains and measures the arms of comparisons.

    Attributes:
        row: Which comparison; a module of experiments/ablations.
        rows: In its place several: "core", "all", or names.
        list: Show all, their sizes and which runs are measured, and run nothing.
        size: One of its sizes.
        seeds: Of the parameters and of the data.
        arms: Only these. None: all.
        work_dir: Folder of the runs.
        output: Folder of the result files and the plot; with --list, those that are counted. None: `results` in
            `work_dir`, with --list those that come with the code.
    """

    row: tyro.conf.Positional[str | None] = None
    rows: tuple[str, ...] = ()
    list: bool = False
    size: str = "cpu"
    seeds: tuple[int, ...] = SEEDS
    arms: tuple[str, ...] | None = None
    work_dir: Path = Path("runs")
    output: Path | None = None

    @property
    def results(self) -> Path:
        """Folder of the result files."""
        return self.output or (results.DIRECTORY if self.list else self.work_dir / "results")


def load(name: str) -> ModuleType:
    """The module of a comparison.

    Raises:
        ValueError: There is none of this name.
    """
    known = modules(ablations)
    if name not in known:
        raise ValueError(f"row={name!r} is not known; there are {', '.join(known)}")
    return importlib.import_module(f"{ablations.__name__}.{name}")


def chosen(options: Options) -> list[str]:
    """The rows that are asked for.

    Raises:
        ValueError: There is none, or one that is not known or has no such size.
    """
    if (options.row is None) == (not options.rows):
        raise ValueError("give a row, or several as --rows; --list shows all")
    known = list(modules(ablations))
    if options.row is not None:
        names = [options.row]
    elif options.rows == ("core",):
        names = [name for name in known if load(name).CORE and options.size in load(name).SIZES]
    elif options.rows == ("all",):
        names = [name for name in known if options.size in load(name).SIZES]
    else:
        names = list(options.rows)
    for name in names:
        if options.size not in load(name).SIZES:
            raise ValueError(f"size={options.size!r} is not known; {name} has {', '.join(load(name).SIZES)}")
    return names


def configs(
    name: str, options: Options, checked: bool = True, searched: bool = True
) -> dict[tuple[str, int], TrainConfig]:
    """The runs of a row by arm and seed, seed after seed, so that all arms are there early.

    Args:
        name: The row's.
        options: Size, seeds, arms and folders.
        checked: Check that each config can be trained here, see `experiments.config.check`.
        searched: At the learning rates that were searched, see `experiments.search`.

    Raises:
        ValueError: An arm is not known, or a config does not fit together.
    """
    row = load(name)
    arms, trained_as = row.arms(options.size), getattr(row, "RUNS_OF", name)
    unknown = [arm for arm in options.arms or () if arm not in arms]
    if unknown:
        raise ValueError(f"arms={unknown} are not known; {name} has {', '.join(arms)}")
    if searched:
        for arm, score in scores(trained_as, options.size).items():
            if arm in arms:
                arms[arm] = at_factor(arms[arm], best(score))
    found = {}
    for seed in options.seeds:
        for arm, config in arms.items():
            if options.arms is None or arm in options.arms:
                folder = options.work_dir / f"{trained_as}-{options.size}-{arm}-{seed}"
                data = dataclasses.replace(config.data, seed=seed)
                found[arm, seed] = dataclasses.replace(config, name=arm, data=data, seed=seed, work_dir=str(folder))
                if checked:
                    check(found[arm, seed])
    return found


def run(name: str, options: Options) -> tuple[results.Result, Path]:
    """Trains and measures what is not there yet of a row.

    Returns:
        All of it as one result, and its plot.

    Raises:
        ValueError: as `configs`, or the output folder cannot be made.
        Stopped: a signal came.
        CheckpointError, NonFiniteError, BusyError: as `experiments.train.train`.
    """
    wanted = configs(name, options)
    results.make_directory(options.results)
    for number, ((arm, seed), config) in enumerate(wanted.items(), 1):
        file = place(name, options.size, arm, seed, options.results)
        if file.exists():
            print(f"{name}, run {number} of {len(wanted)}: {arm}, seed {seed} is measured, in {file}")
            continue
        print(f"{name}, run {number} of {len(wanted)}: {arm}, seed {seed}")
        measure(name, options.size, config, file)
    result = combined(name, options.size, wanted, options.results)
    assert result is not None
    return result, report.plot(result, options.results / f"{result.name}.png")


def measure(name: str, size: str, config: TrainConfig, file: Path) -> None:
    """Trains a run and measures it, or takes its result from another row that has measured the same.

    Args:
        name: The row's.
        size: Its size.
        config: The run's.
        file: Where the result goes.

    Raises:
        Stopped: a signal came.
        ValueError: the run's folder has a run with other settings; or as `experiments.train.train`.
        CheckpointError, NonFiniteError, BusyError: as that.
    """
    settings = _evaluation(name, size, config)
    made_by = _made_by(settings)
    for other in sorted(file.parent.parent.glob(f"*-{size}/*.json")):
        result = results.read(other)
        if result.config.keys() == {"train", made_by} and _is_of(config, settings, result):
            results.write(_renamed(result, config.name, file.stem), file.parent)
            print(f"the same as {other}")
            return
    _check_run(config)
    trained = train(config)
    if trained.stopped:
        raise Stopped(trained.stopped)
    steps = None
    if isinstance(config.data, QuestionData):
        steps = (*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps)
    told: dict[str, Any] = {"name": file.stem, "output": file.parent, **settings}
    if made_by == "analyze":
        analyze.run(analyze.Options(config.directory, **told))
    else:
        evaluate.run(evaluate.Options(config.directory, steps=steps, **told))


def _check_run(config: TrainConfig) -> None:
    """Raises a ValueError for a run's folder that another run has: training would go on from it, or be done already."""
    try:
        before = find_checkpoint(config.directory)[2]
    except CheckpointError:
        return  # nothing that training would go on from
    if _decisive(before) != _decisive(config):
        raise ValueError(
            f"{config.directory} has a run with other settings than {config.name} has now; move it away, or give "
            "another work_dir"
        )


def at_factor(config: TrainConfig, factor: float) -> TrainConfig:
    """The config with its learning rate times a factor."""
    rate = factor * config.optim.learning_rate
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=rate))


def scores(name: str, size: str, folder: Path | None = None) -> dict[str, dict[float, float]]:
    """What a search of learning rates measured: by arm and factor, the mean accuracy or minus the mean loss.

    Args:
        name: The row's.
        size: Its size.
        folder: Folder of the row's search. None: that which comes with the code.

    Raises:
        ResultError: A result file is damaged.
        ValueError: One was measured with other settings than its arm has.
    """
    folder = folder or results.DIRECTORY / SEARCH / f"{name}-{size}"
    found: dict[str, dict[float, float]] = {}
    for arm, config in load(name).arms(size).items():
        for file in sorted(folder.glob(f"{arm}-x*.json")):
            factor = float(file.stem.removeprefix(f"{arm}-x"))
            result = results.read(file)
            seed = result.config["train"]["seed"]
            tried = dataclasses.replace(
                at_factor(config, factor), seed=seed, data=dataclasses.replace(config.data, seed=seed)
            )
            if not _is_of(tried, _evaluation(name, size, config), result):
                raise ValueError(f"{file} was measured with other settings than {arm} has now; move it away")
            found.setdefault(arm, {})[factor] = _score(result)
    return found


def best(by_factor: Mapping[float, float]) -> float:
    """The factor of the highest score; of equal ones the nearest to 1."""
    return max(by_factor, key=lambda factor: (by_factor[factor], -abs(math.log(factor))))


def _score(result: results.Result) -> float:
    """One number to compare runs by, higher is better: controls of the memory aside."""
    curves = [curve for curve in result.values["curves"] if ", memory " not in curve["label"]]
    if "loss" not in curves[0]:
        return float(np.mean([accuracy for curve in curves for accuracy in curve["accuracy"]]))
    loss, tokens = (np.concatenate([curve[of] for curve in curves]) for of in ("loss", "tokens"))
    return -float(np.average(loss, weights=tokens))


def _renamed(result: results.Result, arm: str, name: str) -> results.Result:
    """A run's result as that of an arm of another name."""
    train = result.config["train"]
    curves = [{**curve, "label": arm + curve["label"].removeprefix(train["name"])} for curve in result.values["curves"]]
    return dataclasses.replace(
        result,
        name=name,
        config={**result.config, "train": {**train, "name": arm}},
        values={**result.values, "curves": curves},
    )


def place(name: str, size: str, arm: str, seed: int, output: Path) -> Path:
    """The file of a run's result."""
    return output / f"{name}-{size}" / f"{arm}-{seed}.json"


def combined(
    name: str, size: str, wanted: Mapping[tuple[str, int], TrainConfig], output: Path
) -> results.Result | None:
    """The runs of a row that are measured, as one result; None if none is.

    Raises:
        ValueError: One was measured with other settings than its config has.
    """
    measured = {}
    for (arm, seed), config in wanted.items():
        file = place(name, size, arm, seed, output)
        if file.exists():
            measured[arm, seed] = results.read(file)
            if not _is_of(config, _evaluation(name, size, config), measured[arm, seed]):
                raise ValueError(f"{file} was measured with other settings than {arm} has now; move it away")
    if not measured:
        return None
    return dataclasses.replace(
        next(iter(measured.values())),
        name=f"{name}-{size}",
        config={f"{arm}, seed {seed}": one.config for (arm, seed), one in measured.items()},
        seeds=sorted({seed for one in measured.values() for seed in one.seeds}),
        values={"curves": [curve for one in measured.values() for curve in one.values["curves"]]},
        wall_seconds=sum(one.wall_seconds for one in measured.values()),
        command=f"python -m experiments.ablate {name} --size {size}",
    )


def _evaluation(name: str, size: str, config: TrainConfig) -> dict[str, Any]:
    """How an arm is measured: without the controls of a FAM if it has none."""
    memory = config.model.memory
    rows = memory is not None and memory.fam_length > 0
    given = load(name).evaluation(size)
    return {field: value for field, value in given.items() if rows or field not in CONTROLS}


def _made_by(evaluation: Mapping[str, Any]) -> str:
    """What measures a row, by the name of its settings in a result."""
    return "analyze" if "what" in evaluation else "evaluate"


def _is_of(config: TrainConfig, evaluation: Mapping[str, Any], result: results.Result) -> bool:
    """Whether a result is that of a config and its evaluation, wherever the run's files are."""
    then = from_json(result.config["train"], TrainConfig)  # settings that are newer have their defaults
    told = result.config[_made_by(evaluation)]
    if any(told.get(name, False) != evaluation.get(name, False) for name in CONTROLS):
        return False  # its curves would be more, or fewer
    return _decisive(config) == _decisive(then) and all(
        json.loads(json.dumps(value)) == told.get(field) for field, value in evaluation.items()
    )


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """What of a config its result depends on."""
    whole = to_json(config)
    return {field: whole[field] for field in DECIDES}


def overview(output: Path) -> str:
    """A Markdown table of all rows: their sizes, and of each how many of its runs with three seeds are measured."""
    cells = [["row", "core", "runs measured, by size", "what it compares"]]
    for name, summary in modules(ablations).items():
        row = load(name)
        sizes = []
        for size in row.SIZES:
            files = [place(name, size, arm, seed, output) for arm in row.arms(size) for seed in SEEDS]
            sizes.append(f"{size} {sum(file.exists() for file in files)}/{len(files)}")
        cells.append([name, "yes" if row.CORE else "", ", ".join(sizes), summary])
    return report.markdown(cells, right=False)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.ablate", description=__doc__)
    try:
        if options.list:
            print(overview(options.results))
            return 0
        for name in chosen(options):
            result, figure = run(name, options)
            print(f"{report.table(result)}\n\nwrote {figure}, and the runs' results beside it")
    except Stopped as stopped:
        print("to continue, give the same command again")
        return stopped.status
    except (ValueError, CheckpointError, NonFiniteError, BusyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)

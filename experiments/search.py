"""Searches the learning rate of every arm of comparisons: `python -m experiments.search ROW ... --size cpu`.

Each arm is trained and measured as in its comparison, at the rate its config has, at half and at twice that, with a
seed that no comparison uses. `experiments.ablate` then trains each arm at the rate that was best. Started again, it
goes on where it was stopped. The choice is read from the result files in `search/ROW-SIZE`, of which only those that
come with the code count.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from experiments import ablate, report, results
from experiments.checkpoint import CheckpointError
from experiments.command import run_command
from experiments.config import TrainConfig
from experiments.process import BusyError, Stopped
from experiments.train import NonFiniteError

SEED = 7  # of no comparison
FACTORS = (0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """Searches the learning rate of every arm of comparisons.

    Attributes:
        rows: Which comparisons; modules of experiments/ablations.
        size: One of their sizes.
        arms: Only these. None: all.
        factors: Only these of the three, times the rate of the arm's config.
        work_dir: Folder of the runs.
        output: Folder of the result files. None: `results` in `work_dir`.
    """

    rows: tyro.conf.Positional[tuple[str, ...]]
    size: str = "cpu"
    arms: tuple[str, ...] | None = None
    factors: tuple[float, ...] = FACTORS
    work_dir: Path = Path("runs")
    output: Path | None = None


def configs(name: str, options: Options) -> dict[str, TrainConfig]:
    """The runs of a row's search, by the name of their result.

    Raises:
        ValueError: An arm or a factor is not known, or a config does not fit together.
    """
    unknown = set(options.factors) - set(FACTORS)
    if unknown:
        raise ValueError(f"factors={sorted(unknown)} are not of the search, which has {FACTORS}")
    chosen = ablate.Options(size=options.size, seeds=(SEED,), arms=options.arms, work_dir=options.work_dir)
    found = {}
    for (arm, _), config in ablate.configs(name, chosen, searched=False).items():
        for factor in options.factors:
            folder = f"{config.work_dir}-x{factor:g}"
            found[f"{arm}-x{factor:g}"] = dataclasses.replace(ablate.at_factor(config, factor), work_dir=folder)
    return found


def run(name: str, options: Options) -> str:
    """Trains and measures what is not there yet of a row's search.

    Returns:
        A Markdown table of the scores.

    Raises:
        ValueError: as `configs`, or the output folder cannot be made.
        Stopped: a signal came.
        CheckpointError, BusyError: as `experiments.train.train`.
    """
    folder = (options.output or options.work_dir / "results") / ablate.SEARCH / f"{name}-{options.size}"
    results.make_directory(folder)
    wanted = configs(name, options)
    for number, (key, config) in enumerate(wanted.items(), 1):
        file = folder / f"{key}.json"
        print(f"{name}, search {number} of {len(wanted)}: {key}" + (" is measured" if file.exists() else ""))
        if file.exists():
            continue
        try:
            ablate.measure(name, options.size, config, file)
        except NonFiniteError as error:
            print(f"{key} diverged and has no score: {error}")
    return table(name, options.size, folder)


def table(name: str, size: str, folder: Path) -> str:
    """A Markdown table of the scores of a row's search, an arm to a row; the best is in bold.

    A dash is a run that diverged, or has not been made.
    """
    found = ablate.scores(name, size, folder)
    cells = [["score by learning rate", *(f"x {factor:g}" for factor in FACTORS)]]
    for arm, by_factor in found.items():
        shown = {factor: f"{score:.3f}" for factor, score in by_factor.items()}
        shown[ablate.best(by_factor)] = f"**{shown[ablate.best(by_factor)]}**"
        cells.append([arm, *(shown.get(factor, "–") for factor in FACTORS)])
    return report.markdown(cells)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.search", description=__doc__)
    try:
        for name in options.rows:
            print(run(name, options))
    except Stopped as stopped:
        print("to continue, give the same command again")
        return stopped.status
    except (ValueError, CheckpointError, BusyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)

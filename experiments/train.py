"""Training: `python -m experiments.train --config NAME`; for scripts and notebooks there is `train(config)`.

The same command on every process of a job trains on all of them. On Cloud TPU, SLURM, Open MPI and Kubernetes they
find each other; elsewhere the options `--distributed.*` say where and who.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import signal
import sys

import tyro

from experiments import configs, distributed
from experiments.batches import load_data
from experiments.checkpoint import CheckpointError
from experiments.command import run_command
from experiments.config import TrainConfig, check
from experiments.distributed import Processes
from experiments.loop import NonFiniteError, TrainResult, train
from experiments.process import BusyError

__all__ = ["NonFiniteError", "TrainResult", "load_data", "main", "parse_config", "train"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status.

    0 done, 1 failed, 2 wrong settings, 128 + signal stopped by it after saving, 134 another process was lost.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train",
        description="Trains a decoder. Started again, it continues its run from the last checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configs:\n"
        + "".join(f"  {name:<16} {summary}\n" for name, summary in configs.summaries().items())
        + "\nAny setting can be changed, e.g. --optim.learning-rate 1e-3 --model.memory.fam-length 16.\n"
        "All settings of a config: --config NAME --help",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", metavar="NAME", help="which run; a module of experiments/configs")
    fresh_help = "start anew; an earlier run is moved aside, not deleted"
    parser.add_argument("--fresh", action="store_true", help=fresh_help)
    several = parser.add_argument_group("several processes")
    texts = dict(re.findall(r"^\s+(\w+): (.*)", Processes.__doc__ or "", re.MULTILINE))
    names = [field.name for field in dataclasses.fields(Processes)]
    for field in dataclasses.fields(Processes):
        several.add_argument(
            f"--distributed.{field.name.replace('_', '-')}",
            dest=field.name,
            type=str if field.name == "coordinator" else int,
            default=field.default,
            help=f"{texts.get(field.name, '')} (default: %(default)s)",
        )
    known, overrides = parser.parse_known_args(given)
    if known.config is None:
        parser.print_help(sys.stdout if {"-h", "--help"} & set(overrides) else sys.stderr)
        return 0 if {"-h", "--help"} & set(overrides) else 2
    try:
        config = parse_config(known.config, overrides)
        check(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return distributed.run_joined(
        Processes(**{name: getattr(known, name) for name in names}),
        lambda: _train(config, known.fresh, given),
        (CheckpointError, NonFiniteError, BusyError),
    )


def _train(config: TrainConfig, fresh: bool, given: list[str]) -> int:
    """Trains; returns the exit status."""
    result = train(config, fresh=fresh)
    again = shlex.join(["python", "-m", "experiments.train", *(word for word in given if word != "--fresh")])
    if distributed.is_main():
        ended = f"done; next: python -m experiments.evaluate --checkpoint {result.directory}"
        print(f"to continue: {again}" if result.stopped else ended)
    return 128 + getattr(signal, result.stopped) if result.stopped else 0


def parse_config(name: str, overrides: list[str]) -> TrainConfig:
    """A named config with command-line overrides; a bad one ends the process with status 2, as argparse does.

    Raises:
        ValueError: There is no config of this name.
    """
    return tyro.cli(
        TrainConfig,
        default=configs.get(name),
        args=overrides,
        prog=f"python -m experiments.train --config {name}",
        description=f"{configs.summaries()[name]}\n\nWith --fresh an earlier run is moved aside first.",
        config=(tyro.conf.AvoidSubcommands,),
    )


if __name__ == "__main__":
    run_command(main)

"""Training: `python -m experiments.train --config NAME`; for scripts and notebooks there is `train(config)`.

The same command on every process of a job trains on all of them. On Cloud TPU, SLURM, Open MPI and Kubernetes they
find each other; elsewhere the options `--distributed.*` say where and who.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import traceback

import jax
import tyro

from experiments import configs, distributed
from experiments.batches import load_data
from experiments.checkpoint import CheckpointError
from experiments.command import run_command
from experiments.config import TrainConfig, check
from experiments.distributed import LOST_STATUS, PATIENCE, DistributedError
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
    for name, kind, metavar, default, text in (
        ("coordinator", str, "ADDRESS", None, "HOST:PORT of process 0; not needed where JAX finds it"),
        ("num-processes", int, "N", None, "how many there are"),
        ("process-id", int, "I", None, "which one this is, from 0"),
        ("timeout", int, "SECONDS", 300, "to wait for the others at the start (default: 300)"),
        ("patience", int, "SECONDS", PATIENCE, f"to wait for one that is stuck, later on (default: {PATIENCE})"),
    ):
        option = f"--distributed.{name}"
        several.add_argument(
            option, dest=name.replace("-", "_"), type=kind, metavar=metavar, default=default, help=text
        )
    known, overrides = parser.parse_known_args(given)
    if known.config is None:
        parser.print_help(sys.stdout if {"-h", "--help"} & set(overrides) else sys.stderr)
        return 0 if {"-h", "--help"} & set(overrides) else 2
    try:
        config = parse_config(known.config, overrides)
        check(config)
        distributed.start(known.coordinator, known.num_processes, known.process_id, known.timeout, known.patience)
    except (ValueError, DistributedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    try:
        status = _train(config, known.fresh, given)
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        status = 1
    return distributed.leave(status)


def _train(config: TrainConfig, fresh: bool, given: list[str]) -> int:
    """Trains; returns the exit status."""
    try:
        result = train(config, fresh=fresh)
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        # A collective that fails in a compiled program is a JaxRuntimeError, one of Orbax's or JAX's own a ValueError.
        if jax.process_count() > 1 and distributed.is_loss(error):
            distributed.warn_lost(error)
            return LOST_STATUS
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except (CheckpointError, NonFiniteError, BusyError, DistributedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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

"""The command line: `python -m experiments.launch tpu|gke|slurm|ssh OPTIONS -- TRAINING`.

What follows `--` is the command line of `python -m experiments.train`; it is handed on word by word.
"""

from __future__ import annotations

import sys

import tyro

from experiments.command import run_command
from experiments.launch.common import LaunchError
from experiments.launch.gke import Gke
from experiments.launch.slurm import Slurm
from experiments.launch.ssh import Ssh
from experiments.launch.tpu import Tpu


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 1 a command failed, 2 wrong options, or that of training."""
    given = sys.argv[1:] if arguments is None else arguments
    split = given.index("--") if "--" in given else len(given)
    launcher = tyro.extras.subcommand_cli_from_dict(
        {"tpu": Tpu, "gke": Gke, "slurm": Slurm, "ssh": Ssh},
        args=given[:split],
        prog="python -m experiments.launch",
        description="Starts training elsewhere. After `--` comes the command line of `python -m experiments.train`.",
    )
    try:
        return launcher.launch(given[split + 1 :])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_command(main)

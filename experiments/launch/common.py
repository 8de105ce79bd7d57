"""What the launchers share: running commands, checking what is to be trained, and when to start it again."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
INTERRUPTED, ABORTED = 130, 134  # 128 + SIGINT, 128 + SIGABRT
WINDOW_MINUTES = 30
EXAMPLE = "-- --config lm --work-dir gs://my-bucket/run"
REMEDIES = {
    "gcloud": "install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install",
    "git": "install git",
    "kubectl": "install it with `gcloud components install kubectl`",
    "sbatch": "run this on a login node of the SLURM cluster",
    "ssh": "install the OpenSSH client",
    "xpk": "install it with `pip install xpk`, in an environment of its own",
}


class LaunchError(RuntimeError):
    """A command failed, or the cloud is not in the state that it should be in. The message says what to do."""


class GiveUpError(LaunchError):
    """What trying again does not help against."""


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


def check_program(program: str) -> None:
    """Checks that a program is there.

    Raises:
        LaunchError: It is not on the PATH.
    """
    if shutil.which(program) is None:
        raise LaunchError(f"{program} is not on the PATH; {REMEDIES[program]}")


def run(words: Sequence[str], dry_run: bool) -> None:
    """Shows a command and, unless `dry_run`, runs it to its end; what it prints goes to the terminal.

    Raises:
        LaunchError: Its program is not there, or its exit status is not 0.
    """
    say(f"$ {shlex.join(words)}")
    if dry_run:
        return
    check_program(words[0])
    status = subprocess.run(words).returncode
    if status:
        raise LaunchError(f"`{' '.join(words[:5])} ...` ended with exit status {status}; see what it printed above")


def ask(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command that only looks, and returns what it prints.

    Raises:
        LaunchError: Its program is not there.
    """
    check_program(words[0])
    # Without input, so that gcloud fails where it would ask something that nobody sees.
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def check_training(training: Sequence[str], needed: bool, action: str) -> None:
    """Checks that the part after `--` is there exactly if an action trains.

    Raises:
        ValueError: It is missing, or of no use.
    """
    if needed and not training:
        raise ValueError(f"{action} needs the training command line after `--`, e.g. {EXAMPLE}")
    if training and not needed:
        raise ValueError(f"{action} trains nothing, but got `-- {shlex.join(training)}`; leave it away")


def check_bucket(training: Sequence[str], why: str) -> None:
    """Checks that the run's folder is in a bucket, for machines whose disks do not outlive them.

    Raises:
        ValueError: It is not.
    """
    folder = None
    for word, following in zip(training, [*training[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == "--work-dir":
            folder = value if equals else following
    if folder is None or not folder.startswith("gs://"):
        raise ValueError(f"work_dir={folder!r} {why}; give --work-dir gs://BUCKET/RUN after `--`")


def train_command(python: str, training: Sequence[str]) -> str:
    """Shell code that trains. Every word of `training` reaches Python as it is, whatever characters it has."""
    return f"{python} -m experiments.train {shlex.join(training)}"


def verdict(codes: Sequence[int]) -> int | None:
    """What to do when all processes of a run have ended.

    A process that dies takes the others with it, which JAX then aborts: an abort is not the cause if there is another.

    Args:
        codes: Exit codes of the processes; 137 or 255 for one whose machine is lost.

    Returns:
        None to start the same command again; else the exit code to end with: 0 done, 1 failed, 2 wrong settings,
        130 interrupted by the user.
    """
    causes = [code for code in codes if code not in (0, ABORTED)]
    if not causes:
        return None if ABORTED in codes else 0
    if any(code > 128 and code != INTERRUPTED for code in causes):
        return None
    return causes[0]


class Starts:
    """Ends loops of restarts: no more than `limit` starts within half an hour.

    A run that makes progress for half an hour between two stops may be stopped any number of times.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"max_starts={limit} is not allowed; it must be at least 1")
        self.limit = limit
        self.times: list[float] = []

    def count(self) -> None:
        """Counts a start that is about to happen.

        Raises:
            GiveUpError: It would be one too many.
        """
        now = time.monotonic()
        self.times = [moment for moment in self.times if now - moment < WINDOW_MINUTES * 60] + [now]
        if len(self.times) > self.limit:
            raise GiveUpError(
                f"training was started {self.limit} times within {WINDOW_MINUTES} minutes and did not keep running; "
                "read its log, and raise --max-starts if it only needs patience"
            )

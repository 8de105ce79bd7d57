"""GPUs of a SLURM cluster: `python -m experiments.launch slurm --name run ... -- TRAINING` writes and submits a job.

The job gives itself back to the queue before its time is over, after a crash and, by SLURM itself, when a node is lost.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiments.command import make_folder
from experiments.launch import common

# Notes on the choices:
# * `B:` sends USR1 to this script only. It is not TERM, which also comes from scancel: that must not requeue.
# * srun hands TERM on to all processes, which save a checkpoint and end with 143.
# * srun's own exit code is the highest of all processes. It must not kill the others when one fails, since their
#   codes would then hide that of the failure; processes end by themselves when one is lost.
SCRIPT = """\
#!/bin/bash
{directives}

cd {root} || exit 2
{environment}expiring=
trap 'expiring=1; kill -TERM "$step"' USR1
srun --kill-on-bad-exit=0 --wait=300 {command} &
step=$!
wait "$step"; code=$?
while [ "$code" -eq 138 ]; do wait "$step"; code=$?; done  # 128 + USR1: the signal ended `wait`, not the step

case $code in
  143) again=$expiring ;;  # saved; at other times SIGTERM is scancel's, or SLURM requeues by itself
  129 | 13[1-35-9] | 1[4-9]? | 2??) again=1 ;;  # killed or lost; 130 is the user's, 134 follows another failure
  *) again= ;;  # 0 done, 1 failed, 2 wrong settings
esac
if [ -n "$again" ] && [ -z "$expiring" ] && [ "$SECONDS" -lt {seconds} ] \\
    && [ "${{SLURM_RESTART_COUNT:-0}}" -ge {limit} ]; then
  echo "exit code $code after $SECONDS s, at restart $SLURM_RESTART_COUNT: not started again" >&2
  again=
fi
if [ -n "$again" ]; then
  echo "exit code $code: back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """GPUs of a SLURM cluster: writes a job script and submits it. Run it where `sbatch` is, in the checkout.

    Attributes:
        name: Of the job, its script and its log.
        nodes: How many.
        gpus_per_node: On each of them.
        process_per: Whether a process drives one GPU, as JAX expects on SLURM, or all of its node's.
        time: Limit of one stay, as SLURM writes it; the job goes back to the queue before and continues.
        grace: Seconds before the limit at which training is asked to save.
        max_starts: A job that has crashed within half an hour is not started again after so many restarts.
        python: The Python to use, at the same path on all nodes. None: this one.
        folder: Where script and log go; on a disk that all nodes share.
        options: More of sbatch's, e.g. `partition=gpu account=me cpus-per-task=8`.
        dry_run: Print the script and the command, write and run nothing.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = 1
    process_per: Literal["gpu", "node"] = "gpu"
    time: str = "24:00:00"
    grace: int = 120
    max_starts: int = 5
    python: str | None = None
    folder: Path = Path("runs/slurm")
    options: tuple[str, ...] = ()
    dry_run: bool = False

    def launch(self, training: Sequence[str]) -> int:
        """Writes and submits the script; returns 0.

        Raises:
            ValueError: An option is wrong, or the folder cannot be made.
            LaunchError: sbatch failed or is not there.
        """
        common.check_training(training, True, "slurm")
        script = self.script(training)
        path = self.folder.absolute() / f"{self.name}.sbatch"
        if self.dry_run:
            common.say(f"{path}:\n{script}")
        else:
            common.check_program("sbatch")
            make_folder(path.parent, "folder").joinpath(path.name).write_text(script, encoding="utf-8")
        common.run(["sbatch", str(path)], self.dry_run)
        common.say(f"log: {path.parent}/{self.name}-JOB.log; look: squeue --me; end: scancel JOB")
        return 0

    def script(self, training: Sequence[str]) -> str:
        """The job script."""
        for field in ("nodes", "gpus_per_node", "grace", "max_starts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} is not allowed; it must be at least 1")
        if not self.name or set(self.name) & set("/ \t\n%"):
            raise ValueError(f"name={self.name!r} is not allowed; it must be a file name without spaces and %")
        for option in self.options:
            if option.startswith("-") or "\n" in option:
                raise ValueError(f"options={option!r} is not allowed; write it as NAME=VALUE, e.g. partition=gpu")
        per_gpu = self.process_per == "gpu"
        # All processes of a node must see all its GPUs (no gpus-per-task): JAX picks by the process's number there.
        directives = [
            *(f"job-name={self.name}", f"nodes={self.nodes}"),
            *(f"ntasks-per-node={self.gpus_per_node if per_gpu else 1}", f"gpus-per-node={self.gpus_per_node}"),
            *(f"time={self.time}", f"signal=B:USR1@{self.grace}", "requeue", "open-mode=append"),
            f"output={self.folder.absolute()}/%x-%j.log",
            *self.options,
        ]
        # JAX would take a single GPU for a process that is alone on its node.
        devices = ",".join(map(str, range(self.gpus_per_node)))
        return SCRIPT.format(
            directives="\n".join(f"#SBATCH --{directive}" for directive in directives),
            root=shlex.quote(str(common.ROOT)),
            environment="" if per_gpu else f"export JAX_LOCAL_DEVICE_IDS={devices}\n",
            command=common.train_command(shlex.quote(self.python or sys.executable), training),
            seconds=common.WINDOW_MINUTES * 60,
            limit=self.max_starts,
        )

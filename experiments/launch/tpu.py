"""Cloud TPU VMs and pod slices, through gcloud: `python -m experiments.launch tpu ACTION ... -- TRAINING`.

Every remote command runs on all workers: a pod slice whose program runs on some of its hosts only waits forever.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from experiments.launch import common, tpu_remote, tpu_watch
from experiments.launch.common import LaunchError, say

# https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A Cloud TPU VM or pod slice, through gcloud.

    Attributes:
        action: create makes the TPU and waits for it, install copies the checkout's last commit to all workers and
            installs it, start trains in the background, watch does all three and again after every preemption, status
            and logs look, stop lets training save and end, delete removes the TPU.
        name: Of the TPU, and of its queued resource.
        zone: Where it is. None: the one that gcloud is set to.
        project: Whose it is. None: the one that gcloud is set to.
        accelerator: For create and watch: its type, e.g. v6e-8, v5litepod-16 or v5p-32.
        runtime: For create and watch: its software. None: the one for JAX on this accelerator.
        spot: For create and watch: cheaper, but it can be taken away at any time.
        queued: Ask through a queued resource, which waits until there is capacity; else it is there at once or not.
        service_account: For create and watch: what it may access. None: the project's default one.
        interval: Seconds between two looks while waiting or watching.
        max_starts: For watch: give up after so many starts within half an hour.
        lines: For logs: of each worker.
        follow: For logs: go on as lines come.
        dry_run: Print the commands, run none.
    """

    action: tyro.conf.Positional[Literal["create", "install", "start", "watch", "status", "logs", "stop", "delete"]]
    name: str
    zone: str | None = None
    project: str | None = None
    accelerator: str | None = None
    runtime: str | None = None
    spot: bool = False
    queued: bool = True
    service_account: str | None = None
    interval: float = 60.0
    max_starts: int = 5
    lines: int = 50
    follow: bool = False
    dry_run: bool = False

    def launch(self, training: Sequence[str]) -> int:
        """Does what `action` says; returns the exit status.

        Raises:
            ValueError: An option is missing or wrong.
            LaunchError: A command failed, or the TPU is not in the state that the action needs.
        """
        common.check_training(training, self.action in ("start", "watch"), self.action)
        if self.action == "watch":
            return tpu_watch.watch(self, training)
        if self.action == "create":
            self.create()
        elif self.action == "install":
            self.install()
        elif self.action == "start":
            self.on_workers(tpu_remote.start(training))
        elif self.action == "status":
            common.run(self.words("tpu-vm", "describe", "--format=value(state,health)"), self.dry_run)
            self.on_workers(tpu_remote.STATUS)
        elif self.action == "logs":
            self.on_workers(tpu_remote.logs(self.lines, self.follow))
        elif self.action == "stop":
            self.on_workers(tpu_remote.STOP)
        else:
            self.delete()
        return 0

    def words(self, group: str, verb: str, *flags: str) -> list[str]:
        """A gcloud command on this TPU (`tpu-vm`) or its request (`queued-resources`)."""
        words = ["gcloud", "compute", "tpus", group, verb, self.name]
        words += [f"--zone={self.zone}"] if self.zone else []
        return words + ([f"--project={self.project}"] if self.project else []) + list(flags)

    def create_words(self) -> list[str]:
        """The gcloud command that asks for the TPU."""
        generation = (self.accelerator or "").partition("-")[0]
        if self.runtime is None and not (generation in RUNTIMES and re.fullmatch(r"\w+-\d+", self.accelerator or "")):
            raise ValueError(
                f"accelerator={self.accelerator!r} is not known; give one of {', '.join(RUNTIMES)} with a size, e.g. "
                "--accelerator v6e-8, or also --runtime for another (`gcloud compute tpus accelerator-types list`)"
            )
        runtime = self.runtime or RUNTIMES[generation]
        flags = [f"--accelerator-type={self.accelerator}"]
        flags += ["--spot"] if self.spot else []
        flags += [f"--service-account={self.service_account}"] if self.service_account else []
        if self.queued:
            flags += [f"--node-id={self.name}", f"--runtime-version={runtime}"]
            return self.words("queued-resources", "create", *flags)
        return self.words("tpu-vm", "create", *flags, f"--version={runtime}")

    def ssh_words(self, script: str) -> list[str]:
        """The gcloud command that runs shell code on all workers."""
        return self.words("tpu-vm", "ssh", "--worker=all", f"--command={script}")

    def copy_words(self, file: str) -> list[str]:
        """The gcloud command that copies a file into the home folder of all workers."""
        *start, name = self.words("tpu-vm", "scp")[:6]
        where = self.words("tpu-vm", "scp")[6:]
        return [*start, file, f"{name}:", "--worker=all", *where]

    def on_workers(self, script: str) -> None:
        """Runs shell code on all workers."""
        common.run(self.ssh_words(script), self.dry_run)

    def state(self, group: str) -> str | None:
        """State of the TPU (`tpu-vm`) or of its request (`queued-resources`); None if there is none.

        Raises:
            LaunchError: gcloud cannot tell.
        """
        field = "state" if group == "tpu-vm" else "state.state"
        done = common.ask(self.words(group, "describe", f"--format=value({field})"))
        if done.returncode == 0:
            return done.stdout.strip()
        if "NOT_FOUND" in done.stderr:
            return None
        raise LaunchError(f"gcloud cannot tell the state of {self.name!r}: {done.stderr.strip()}")

    def create(self) -> None:
        """Makes the TPU and waits until it is there.

        Raises:
            LaunchError: There is one of this name, or it cannot be had.
        """
        words = self.create_words()
        for group in () if self.dry_run else ("tpu-vm", "queued-resources"):
            if state := self.state(group):
                raise LaunchError(
                    f"name={self.name!r} is taken: there is one in {group}, in state {state}; go on with it by install "
                    "or start, delete it first, or give another --name"
                )
        common.run(words, self.dry_run)
        self.wait()

    def wait(self) -> None:
        """Waits until a queued request is fulfilled.

        Raises:
            LaunchError: It failed or is gone.
        """
        if self.dry_run or not self.queued:
            return  # without a queue, gcloud returns when the TPU is there
        shown = None
        while (state := self.state("queued-resources")) != "ACTIVE":
            if state in (None, "FAILED", "SUSPENDED"):
                raise LaunchError(
                    f"the request for {self.name!r} is {state or 'gone'}; see why by "
                    f"`{shlex.join(self.words('queued-resources', 'describe'))}`, delete it and try again, perhaps in "
                    "another zone"
                )
            if state != shown:
                say(f"{self.name}: {state}")
                shown = state
            time.sleep(self.interval)

    def install(self) -> None:
        """Copies the checkout's last commit to all workers and installs it there."""
        git = ["git", "-C", str(common.ROOT)]
        if not self.dry_run and (changed := common.ask([*git, "status", "--porcelain", "--untracked-files=no"]).stdout):
            say(f"note: changes that are not committed are not copied:\n{changed.rstrip()}")
        with tempfile.TemporaryDirectory() as folder:
            # A bundle is a clone in one file, so that run.json on the workers names the commit.
            bundle = str(Path(folder) / tpu_remote.BUNDLE)
            common.run([*git, "bundle", "create", "--quiet", bundle, "HEAD"], self.dry_run)
            common.run(self.copy_words(bundle), self.dry_run)
        self.on_workers(tpu_remote.INSTALL)

    def delete(self) -> None:
        """Removes the TPU and its request, without asking again."""
        kind = ("queued-resources", "--force", "--quiet") if self.queued else ("tpu-vm", "--quiet")
        common.run(self.words(kind[0], "delete", *kind[1:]), self.dry_run)

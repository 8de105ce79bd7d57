"""TPU slices of a GKE cluster, through xpk: `python -m experiments.launch gke create ... -- TRAINING`.

xpk makes a JobSet: one pod on each host of each slice, started again as a whole if one fails. Its rule is training's
own: it restarts on exit codes from 127 and on lost machines, not on 0, 1 and 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tyro

from experiments.launch import common

GRACE_SECONDS = 120  # from SIGTERM to SIGKILL; a Spot machine may be taken away sooner


@dataclasses.dataclass(frozen=True)
class Gke:
    """TPU slices of a GKE cluster, through xpk.

    Attributes:
        action: create submits a workload, list shows those of the cluster, logs prints the pods' last lines, delete
            ends and removes the workload.
        cluster: Name of the cluster, which `xpk cluster create` made.
        workload: Name of the workload; for all but list.
        tpu_type: For create: the slice, e.g. v6e-16.
        image: For create: the Docker image that holds the checkout, installed, as its working directory.
        slices: For create: how many of them.
        max_restarts: For create: how often the workload may start again.
        zone: Of the cluster. None: the one that gcloud is set to.
        project: Its project. None: the one that gcloud is set to.
        lines: For logs: of each pod.
        follow: For logs: go on as lines come.
        dry_run: Print the commands, run none.
    """

    action: tyro.conf.Positional[Literal["create", "list", "logs", "delete"]]
    cluster: str
    workload: str | None = None
    tpu_type: str | None = None
    image: str | None = None
    slices: int = 1
    max_restarts: int = 50
    zone: str | None = None
    project: str | None = None
    lines: int = 50
    follow: bool = False
    dry_run: bool = False

    def launch(self, training: Sequence[str]) -> int:
        """Does what `action` says; returns 0.

        Raises:
            ValueError: An option is missing or wrong.
            LaunchError: A command failed.
        """
        common.check_training(training, self.action == "create", self.action)
        words = {"create": self.create_words, "list": self.list_words, "logs": self.logs_words}
        command = words[self.action](training) if self.action in words else self.delete_words()
        common.run(command, self.dry_run)
        return 0

    def create_words(self, training: Sequence[str]) -> list[str]:
        """The xpk command that submits."""
        for name, example in (
            ("tpu_type", "--tpu-type v6e-16"),
            ("image", "--image REGION-docker.pkg.dev/P/R/fam-jax"),
        ):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None is not allowed for create; give {example}")
        common.check_bucket(training, "would be on the disk of a pod, which does not outlive it")
        for word in training:
            if "\n" in word:
                raise ValueError(f"the argument {word!r} has a line break, which xpk cannot pass on; leave it out")
        # xpk runs the command in a subshell and sends SIGTERM there: with `exec` that is Python itself. Kubernetes
        # would read $(NAME) in it as a variable, also between quotes; to Kubernetes, $$ is a dollar sign.
        command = f"exec {common.train_command('python', training)}".replace("$", "$$")
        return [
            *("xpk", "workload", "create", *self._where(), f"--workload={self._workload()}"),
            *(f"--tpu-type={self.tpu_type}", f"--num-slices={self.slices}", f"--docker-image={self.image}"),
            *(f"--max-restarts={self.max_restarts}", f"--termination-grace-period-seconds={GRACE_SECONDS}"),
            f"--command={command}",
        ]

    def list_words(self, _: Sequence[str]) -> list[str]:
        """The xpk command that lists the cluster's workloads and their states."""
        return ["xpk", "workload", "list", *self._where()]

    def logs_words(self, _: Sequence[str]) -> list[str]:
        """The kubectl command that prints what the pods print; any xpk command before has chosen the cluster."""
        label = f"--selector=xpk.google.com/workload={self._workload()}"
        many = "--max-log-requests=1000"  # kubectl follows five pods by default
        return [
            *("kubectl", "logs", label, "--all-containers", "--prefix", f"--tail={self.lines}", many),
            *(["--follow"] if self.follow else []),
        ]

    def delete_words(self) -> list[str]:
        """The xpk command that ends and removes the workload."""
        return ["xpk", "workload", "delete", *self._where(), f"--workload={self._workload()}"]

    def _where(self) -> list[str]:
        words = [f"--cluster={self.cluster}"]
        words += [f"--zone={self.zone}"] if self.zone else []
        return words + ([f"--project={self.project}"] if self.project else [])

    def _workload(self) -> str:
        # Without a name, `xpk workload delete` would offer to delete every workload of the cluster.
        if not self.workload:
            raise ValueError(f"workload={self.workload!r} is not allowed for {self.action}; give --workload NAME")
        return self.workload

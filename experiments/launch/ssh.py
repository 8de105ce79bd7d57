"""Plain hosts: `python -m experiments.launch ssh --hosts a b -- TRAINING` runs one process on each and stays with them.

When one process fails the others are ended; when this launcher dies or loses a host, that host's process is ended.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from experiments.command import make_folder
from experiments.launch import common
from experiments.launch.common import say

PORT = 8476
POLL_SECONDS = 0.2
SSH = (
    "ssh",
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)

# Without a terminal, sshd lets a program run on when the connection is lost. A second process therefore reads from the
# connection: its end is the request to stop.
REMOTE = """\
cd {directory} || exit 2
exec 3<&0
{command} < /dev/null 3<&- &
process=$!
( read -r _ <&3; kill -TERM $process; sleep {grace}; kill -KILL $process ) > /dev/null 2>&1 &
guard=$!
wait $process
code=$?
kill $guard 2> /dev/null
exit $code
"""


@dataclasses.dataclass(frozen=True)
class Ssh:
    """Plain hosts with GPUs: one process on each, over ssh, until all have ended.

    Attributes:
        hosts: As ssh takes them; the first one's process is the coordinator.
        coordinator: HOST:PORT at which all hosts reach the first. None: the first host's name and port 8476.
        directory: The checkout on the hosts.
        python: The Python to use on the hosts, e.g. .venv/bin/python.
        logs: Folder on this machine for what each process prints.
        grace: Seconds in which a process that was asked to stop has to save and end.
        max_starts: Give up after so many starts within half an hour.
        dry_run: Print the commands, run none.
    """

    hosts: tuple[str, ...] = ()
    coordinator: str | None = None
    directory: str = "fam-jax"
    python: str = ".venv/bin/python"
    logs: Path = Path("runs/ssh")
    grace: float = 90.0
    max_starts: int = 5
    dry_run: bool = False

    def launch(self, training: Sequence[str]) -> int:
        """Trains until it ends by itself; returns its exit code.

        Raises:
            ValueError: An option is wrong, or the folder for the logs cannot be made.
            LaunchError: ssh is not there, or training was started too often.
        """
        common.check_training(training, True, "ssh")
        commands = self.commands(training)
        if self.dry_run:
            for command in commands:
                common.run(command, dry_run=True)
            return 0
        common.check_program("ssh")
        starts = common.Starts(self.max_starts)
        make_folder(self.logs, "logs")
        while True:
            starts.count()
            codes = self._run(commands)
            code = common.verdict(codes)
            if code is not None:
                say("done" if code == 0 else f"ended with exit code {code}; see {self.logs}")
                return code
            say("starting again; training continues from its last checkpoint")
            time.sleep(min(10.0, self.grace))  # the coordinator's port has to become free

    def commands(self, training: Sequence[str]) -> list[list[str]]:
        """The ssh command of each host."""
        if not self.hosts:
            raise ValueError("hosts=() is not allowed; give at least one, e.g. --hosts user@gpu1 user@gpu2")
        if wrong := [host for host in self.hosts if not host or host.startswith("-")]:
            raise ValueError(f"hosts={wrong[0]!r} is not the name of a host; give names as ssh takes them")
        if doubled := [host for host in self.hosts if self.hosts.count(host) > 1]:
            raise ValueError(f"hosts={doubled[0]!r} is there twice; one process drives all devices of its host")
        coordinator = self.coordinator or f"{self.hosts[0].rpartition('@')[2]}:{PORT}"
        if not coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator={coordinator!r} has no port; give HOST:PORT")
        commands = []
        for number, host in enumerate(self.hosts):
            flags = ["--distributed.coordinator", coordinator]
            flags += ["--distributed.num-processes", str(len(self.hosts)), "--distributed.process-id", str(number)]
            script = REMOTE.format(
                directory=shlex.quote(self.directory),
                command=common.train_command(shlex.quote(self.python), [*training, *flags]),
                grace=self.grace,
            )
            commands.append([*SSH, host, f"sh -c {shlex.quote(script)}"])
        return commands

    def _run(self, commands: Sequence[Sequence[str]]) -> list[int]:
        """Runs all processes once; returns the exit codes of those that ended by themselves."""
        files: list[BinaryIO] = []
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for number, (host, command) in enumerate(zip(self.hosts, commands, strict=True)):
                path = self._log(number)
                say(f"process {number} on {host}, log {path}")
                files.append(path.open("ab"))
                processes.append(
                    # In a session of its own, so that Ctrl-C reaches this launcher only, which then ends them in order.
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=files[-1],
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            return self._wait(processes)
        finally:
            self._end(processes)
            for file in files:
                file.close()

    def _log(self, number: int) -> Path:
        return self.logs / f"{number}-{self.hosts[number]}.log"

    def _last(self, number: int) -> str:
        """The last line that a process has printed."""
        lines = self._log(number).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")

    def _wait(self, processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
        """Waits until all have ended, or one has failed and the others have had their time."""
        seen: dict[int, int] = {}
        deadline = None
        while len(seen) < len(processes) and (deadline is None or time.monotonic() < deadline):
            for number, process in enumerate(processes):
                code = process.poll()
                if code is None or number in seen:
                    continue
                seen[number] = code
                if code:
                    say(f"process {number} on {self.hosts[number]} ended with exit code {code}: {self._last(number)}")
                if code and deadline is None:
                    # After a signal all processes save together: a second one now would keep them from it.
                    deadline = time.monotonic() + (self.grace if code > 128 else 0)
            time.sleep(POLL_SECONDS)
        return list(seen.values())

    def _end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Ends those that still run: closing the connection's input asks them to save and end."""
        running = [(number, process) for number, process in enumerate(processes) if process.poll() is None]
        for number, process in running:
            say(f"ending process {number} on {self.hosts[number]}")
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + self.grace + 10  # the host itself kills after `grace`
        for _, process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

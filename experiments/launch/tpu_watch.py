"""Keeps training on a TPU going: makes the TPU, installs, starts, looks, and again after a preemption or a crash."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.launch import common, tpu_remote
from experiments.launch.common import LaunchError, say

if TYPE_CHECKING:
    from experiments.launch.tpu import Tpu

GONE = ("PREEMPTED", "TERMINATED", "UNKNOWN")  # states of a node that it does not come back from
FAILURES = 10  # looks in a row that may fail before this gives up


def watch(tpu: Tpu, training: Sequence[str]) -> int:
    """Keeps training going until it ends by itself.

    If training is running already, under the same command or another, that is what is watched.

    Returns:
        Its exit code.

    Raises:
        ValueError: The options would not make a TPU, or the run's folder would be lost with it.
        LaunchError: Training was started too often, the TPU was stopped by hand, or gcloud fails again and again.
    """
    common.check_bucket(training, "would be on the TPU's own disk, which goes with it")
    starts = common.Starts(tpu.max_starts)
    create = tpu.create_words()  # complains before anything is done
    if tpu.dry_run:
        say(f"$ {shlex.join(create)}")
        tpu.install()
        tpu.on_workers(tpu_remote.start(training))
        tpu.on_workers(tpu_remote.STATUS)
        return 0
    ours, failures = False, 0  # ours: this has started what runs, or has seen it run
    while True:
        try:
            state = tpu.state("tpu-vm")
            if state == "STOPPED":
                raise common.GiveUpError(f"{tpu.name!r} was stopped by hand; start it in the console, or delete it")
            if state in (None, *GONE):
                say(f"{tpu.name}: {'there is none' if state is None else state}; making it")
                starts.count()
                ours = False
                _recreate(tpu, state)
                ours = _begin(tpu, training)
            elif state == "READY":
                reports = _reports(tpu)
                if "running" in reports and "none" in reports:
                    tpu.on_workers(tpu_remote.STOP)  # an earlier start did not reach all workers
                elif "running" in reports:
                    ours = True  # where some have ended, the others do so within a minute
                elif "none" in reports or not ours:
                    starts.count()
                    ours = _begin(tpu, training)
                else:
                    code = common.verdict([137 if report == "lost" else int(report) for report in reports])
                    say(f"{tpu.name}: training ended with {', '.join(reports)}")
                    if code is not None:
                        return code
                    starts.count()
                    tpu.on_workers(tpu_remote.start(training))
            failures = 0
        except common.GiveUpError:
            raise
        except LaunchError as error:
            failures += 1
            if failures > FAILURES:
                raise
            say(f"{error}\nlooking again in {tpu.interval:g} s")
        time.sleep(tpu.interval)


def _begin(tpu: Tpu, training: Sequence[str]) -> bool:
    tpu.install()
    tpu.on_workers(tpu_remote.start(training))
    return True


def _recreate(tpu: Tpu, state: str | None) -> None:
    """Makes the TPU anew, from whatever a preemption or an interrupted launcher left behind."""
    request = tpu.state("queued-resources") if tpu.queued else None
    if state in GONE or request in ("FAILED", "SUSPENDED"):
        tpu.delete()
        request = None
    if request is None:
        common.run(tpu.create_words(), tpu.dry_run)
    tpu.wait()


def _reports(tpu: Tpu) -> list[str]:
    """What training does on the workers: "running", "lost", "none" or an exit code each.

    Raises:
        LaunchError: Not all workers answer.
    """
    done = common.ask(tpu.ssh_words(tpu_remote.STATUS))
    reports = re.findall(rf"^{tpu_remote.MARK}(\w+)", done.stdout, re.MULTILINE)
    if done.returncode or not reports:
        raise LaunchError(f"not all workers of {tpu.name!r} answer: {done.stderr.strip()[-500:]}")
    return reports

"""Several processes as one job: how they find each other, and how they agree.

Every process runs the same program on the same config. Process 0, the *main* one, writes files and prints; what it
finds out alone it shares, so that all go on alike or fail alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
HEARTBEAT_SECONDS = 30  # after which a process that is not heard of is taken for dead
LOST_STATUS = 134  # exit status of a process that ends because another has: that of an abort, as JAX itself ends


class DistributedError(RuntimeError):
    """The processes of a job did not find each other, or do not agree. The message says which and what to check."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where the processes of a job find each other; see `start`.

    Attributes:
        coordinator: HOST:PORT of process 0; not needed where JAX finds it.
        num_processes: How many there are.
        process_id: Which one this is, from 0.
        timeout: Seconds to wait for the others at the start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process to its job; must come before anything else that JAX does.

    Without arguments, JAX looks for a job of Cloud TPU, SLURM, Open MPI or Kubernetes; where there is none, or with
    `num_processes` 1 alone, the process is a job of its own.

    Args:
        coordinator: HOST:PORT at which all processes reach process 0.
        num_processes: How many there are.
        process_id: Which one this is, from 0.
        timeout: Seconds to wait for the others; then the process ends, with status 1.

    Raises:
        ValueError: Some arguments are given, but not all, or they are wrong.
        DistributedError: JAX cannot join them.
    """
    if num_processes == 1 and coordinator is None and process_id is None:
        return
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"--distributed.{missing[0]} is missing; give all of {', '.join(given)}, or none")
    elif not re.fullmatch(r".+:\d+", coordinator or ""):
        raise ValueError(f"--distributed.coordinator={coordinator!r} has no port; give HOST:PORT")
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    at = coordinator or "the coordinator"

    def give_up() -> None:
        print(
            f"error: {who} could not meet the others at {at} within {timeout} s: check that all are started, with the "
            "same coordinator and different process ids, that process 0 runs on its host, and that no firewall closes "
            "the port",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    # JAX would abort the process with the addresses of its own functions for a message.
    alarm = threading.Timer(timeout, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        if missing and ("coordinator_address should be defined" in str(error) or "before any JAX" in str(error)):
            return  # there is no job, or a notebook or a test has used JAX already
        if isinstance(error, ValueError) and not missing:
            raise ValueError(f"--distributed: {error}") from error
        raise DistributedError(
            f"{who} could not join the others at {at}: {type(error).__name__}: {str(error).splitlines()[0]}; "
            "--distributed.num-processes 1 trains with this process alone"
        ) from error
    finally:
        alarm.cancel()


def leave(status: int) -> int:
    """The exit status of a command; after an error with several processes, ends this one.

    Leaving as usual would wait for processes that may never come.
    """
    if status in (1, 2, LOST_STATUS) and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_main() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def share(value: Any) -> Any:
    """The main process's value on all processes; waits for them.

    Args:
        value: JSON-able. That of other processes is not used.
    """
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    padded = np.zeros(size, np.uint8)
    if is_main():
        padded[:] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def on_main(action: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
    """Does something on the main process while the others wait; its result, JSON-able, is that of all.

    Raises:
        One of `errors`: the main process did; on all processes, with the same message.
    """
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    raised: Exception | None = None
    if is_main():
        try:
            outcome = {"result": action()}
        except errors as error:
            raised = error
            outcome = {"error": [isinstance(error, kind) for kind in errors].index(True), "text": str(error)}
    outcome = share(outcome)
    if raised is not None:
        raise raised
    if "error" in outcome:
        raise errors[outcome["error"]](outcome["text"])
    return outcome["result"]


def check_same(what: str, value: Any) -> None:
    """Checks that all processes have the same value.

    Raises:
        DistributedError: They have not; names the first process that differs.
    """
    if jax.process_count() == 1:
        return
    mark = np.uint32(zlib.crc32(json.dumps(value, sort_keys=True).encode()))
    found = np.asarray(multihost_utils.process_allgather(mark))
    for number, other in enumerate(found):
        if other != found[0]:
            raise DistributedError(
                f"process {number} has other {what} than process 0: check that all have the same code, settings and "
                "files"
            )


def is_loss(error: Exception) -> bool:
    """Whether an error of JAX's runtime means that another process is not there any more."""
    return bool(re.search(r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED|gloo|onnection|oordination", str(error)))


def warn_lost(error: BaseException) -> None:
    """Says that another process was lost, as far as it is known."""
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} lost the others: {str(error).splitlines()[0]}. "
        "Look for the first error in the logs of all processes; start the same command again on all",
        file=sys.stderr,
        flush=True,
    )

"""Several processes as one job: how they find each other, and how they agree.

Every process runs the same program on the same config. Process 0, the *main* one, writes files and prints; what it
finds out alone it shares, so that all go on alike or fail alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
HEARTBEAT_SECONDS = 30  # after which a process that is not heard of is taken for dead
PATIENCE = 3600  # seconds to wait for the others, once all are there
LOST_STATUS = 134  # exit status of a process that ends because another has: that of an abort, as JAX itself ends


_patience: float = PATIENCE  # of this process
_giving_up = threading.Lock()


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
        patience: Seconds to wait later on for one that is stuck; more than compiling takes. Preparing text has 6 h.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300
    patience: int = PATIENCE


def start(processes: Processes) -> None:
    """Joins this process to its job; must come before anything else that JAX does.

    If nothing says where and who, JAX looks for a job of Cloud TPU, SLURM, Open MPI or Kubernetes; where there is none,
    or with `num_processes` 1 alone, the process is a job of its own. One whose others do not come within `timeout` ends
    with status 1.

    Raises:
        ValueError: Some of coordinator, number and id are given, but not all, or they are wrong.
        DistributedError: JAX cannot join them.
    """
    global _patience
    _patience = processes.patience
    coordinator, num_processes, process_id = processes.coordinator, processes.num_processes, processes.process_id
    timeout = processes.timeout
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


def run_joined(processes: Processes, action: Callable[[], int], errors: tuple[type[Exception], ...] = ()) -> int:
    """Joins this process to its job, does what a command does, and says what goes wrong; the exit status.

    That is the action's, or 2 after a ValueError, LOST_STATUS after the loss of another process, and 1 after any other
    error. With several processes, one that fails ends here: leaving as usual would wait for some that may never come.

    Args:
        processes: See `start`.
        action: Does it and returns a status.
        errors: Those, besides ValueError, OSError and DistributedError, whose message tells people enough. Others are
            raised in a process that is alone, and else shown as Python does.
    """
    errors = (*errors, ValueError, OSError, DistributedError)
    try:
        start(processes)
    except (ValueError, DistributedError) as error:
        return _status(error)
    try:
        return action()
    except Exception as error:
        several = jax.process_count() > 1
        # A collective that fails in a compiled program is a JaxRuntimeError, one of Orbax's or JAX's own a ValueError.
        if several and isinstance(error, (ValueError, OSError, jax.errors.JaxRuntimeError)) and is_loss(error):
            warn_lost(error)
            status = LOST_STATUS
        elif isinstance(error, errors):
            status = _status(error)
        elif several:
            traceback.print_exc()
            status = 1
        else:
            raise
        if several:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


def _status(error: Exception) -> int:
    """The exit status after an error, which it shows."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


def is_main() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def waiting(what: str, at_least: float = 0) -> Iterator[None]:
    """Inside, this process waits for the others; one that is there but stuck does not hold up the job for ever.

    After `patience` seconds the process ends with LOST_STATUS and says which processes do not wait with it. Those that
    are gone are noticed without this, after HEARTBEAT_SECONDS.

    Args:
        what: What it waits for, for the message.
        at_least: Seconds, where the others may rightly take longer than `patience`.
    """
    if jax.process_count() == 1:
        yield
        return
    seconds = max(_patience, at_least)
    # What is waited for is in code that nothing can interrupt, so it is another thread that gives up.
    alarm = threading.Timer(seconds, _give_up, (what, seconds))
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _give_up(what: str, seconds: float) -> None:
    """Ends the process, whose others do not come."""
    if not _giving_up.acquire(blocking=False):
        return  # of waits inside one another the outer one speaks
    number, count = jax.process_index(), jax.process_count()
    found: dict[int, str] = {}
    with contextlib.suppress(Exception):  # whatever fails here, the process ends and says so
        from jax._src import distributed  # the store of the coordinator has no public name

        store: Any = distributed.global_state.client
        store.key_value_set(f"waiting/{number}", what, allow_overwrite=True)
        time.sleep(min(30.0, seconds))  # for the others, who may have begun to wait a little later
        found = {int(key.rpartition("/")[2]): value for key, value in store.key_value_dir_get("waiting/")}
    stuck = [other for other in range(count) if other not in found]
    if not found:
        who = "The coordinator, process 0, does not answer: look there first"
    elif stuck:
        names = f"process{'es' * (len(stuck) > 1)} {', '.join(map(str, stuck))}"
        who = f"Stuck elsewhere: {names}; look there first, at the end of the log and with py-spy dump --pid PID"
    else:
        who = "All processes wait: check that the network between them lets everything through"
    other = "".join(f"; process {n} waits for {text}" for n, text in sorted(found.items()) if text != what)
    print(
        f"error: process {number} of {count} has waited {seconds:,.0f} s for {what}. {who}{other}. Start the same "
        "command again on all; --distributed.patience SECONDS waits longer",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST_STATUS)


def share(value: Any, at_least: float = 0) -> Any:
    """The main process's value on all processes; waits for them.

    Args:
        value: JSON-able. That of other processes is not used.
        at_least: As that of `waiting`.
    """
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    what = "the others, to tell them what it has found" if is_main() else "process 0, to hear what it has found"
    with waiting(what, at_least):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
        padded = np.zeros(size, np.uint8)
        if is_main():
            padded[:] = data
        return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())


def on_main(action: Callable[[], T], errors: tuple[type[Exception], ...], at_least: float = 0) -> T:
    """Does something on the main process while the others wait, `at_least` as in `waiting`.

    Its result, JSON-able, is that of all.

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
    outcome = share(outcome, at_least)
    if raised is not None:
        raise raised
    if "error" in outcome:
        raise errors[outcome["error"]](outcome["text"])
    return outcome["result"]


def check_same(what: str, value: Any, at_least: float = 0) -> None:
    """Checks that all processes have the same value, JSON-able; waits for them, `at_least` as in `waiting`.

    Raises:
        DistributedError: They have not; names the first process that differs.
    """
    if jax.process_count() == 1:
        return
    mark = np.uint32(zlib.crc32(json.dumps(value, sort_keys=True).encode()))
    with waiting(f"all to compare their {what}", at_least):
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

"""Where the time of a training step goes: `python -m experiments.benchmark parts`.

Arms are those of `experiments.speed`, without other libraries. Of each, one step is traced by JAX's profiler, and the
time of every operation is given to the part of the model that it comes from, by the scopes in its name; an operation
that XLA has fused from several has the name of the last. Operations of several threads or streams count one by one.
Beside them is the time of the step, traced and not, and how much of it no operation ran: what starting them costs.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import peers, report, results
from experiments.arms import Shape, model_config
from experiments.speed import Cell, build
from experiments.typed import to_json

# Parts by the scope that they run under, the first that is found; loops and calls hold the time of what is in them.
SCOPES = {
    "fam_scan": "FAM",
    "mix": "mixing of layers",
    "attend": "attention",
    "project": "projections of attention",
    "feed_forward": "feed-forward",
    "layers": "rest of layers",
    "Decoder": "embedding and loss",
}
OTHER = "optimizer"  # what is not of the model
UNNAMED = "without a name"
_ORDER = [name for part in (*SCOPES.values(), OTHER, UNNAMED) for name in (part, f"{part}, backward")]
_HOLDERS = ("while", "conditional", "call", "tuple", "parameter")


@dataclasses.dataclass(frozen=True)
class Options:
    """Tells where the time of a training step goes.

    Attributes:
        shape: Of the models.
        arms: Which to trace.
        length: Tokens of a text.
        batch_size: Texts in a step.
        rounds: Steps before, of which the median time is told.
        name: Name of the result.
        output: Folder of the result file and the plot.
    """

    shape: tyro.conf.OmitArgPrefixes[Shape] = Shape()  # noqa: RUF009
    arms: tuple[str, ...] = ("bswa", "fam")
    length: int = 8192
    batch_size: int = 1
    rounds: int = 5
    name: str = "parts"
    output: Path = results.DIRECTORY


class Event(NamedTuple):
    """An operation that ran.

    Attributes:
        name: Of the instruction.
        start: When, in nanoseconds.
        duration: How long, in nanoseconds.
    """

    name: str
    start: float
    duration: float


def part_of(scopes: str) -> str:
    """The part of a model that an instruction belongs to, and if it is of the backward pass.

    Args:
        scopes: Its `op_name`, empty if it has none.
    """
    if not scopes:
        return UNNAMED
    words = set(re.split(r"[^\w]+", scopes))
    part = next((part for scope, part in SCOPES.items() if scope in words), OTHER)
    return f"{part}, backward" if "transpose" in scopes.partition("Decoder")[0] and part != OTHER else part


def names(text: str) -> dict[str, str]:
    """The `op_name` of each instruction of a compiled program, but of those that hold others.

    One without a name, as copies are that XLA adds, has that of the loop that it is in, and outside of loops none.

    Args:
        text: The program: `compiled.as_text()`.
    """
    found, loops, inside = {}, dict[str, str](), ""
    of = dict[str, str]()  # the computation of each
    for line in text.splitlines():
        if heading := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line):
            inside = heading[1]
        match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (?:\([^=]*\)|\S+) ([\w-]+)\(", line)
        if not match:
            continue
        scopes = re.search(r'op_name="([^"]*)"', line)
        if match[2] not in _HOLDERS:
            found[match[1]], of[match[1]] = scopes[1] if scopes else "", inside
        elif scopes and (body := re.search(r"body=%?([\w.-]+)", line)):
            loops[body[1]] = scopes[1]
    return {name: scopes or loops.get(of[name], "") for name, scopes in found.items()}


def add_up(events: Iterable[Event], scopes: dict[str, str]) -> tuple[dict[str, tuple[float, int]], float]:
    """Milliseconds and number of the operations of each part, and milliseconds in which any of them ran."""
    parts: dict[str, tuple[float, int]] = {}
    busy, until = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start):
        if event.name not in scopes:
            continue
        part = part_of(scopes[event.name])
        took, count = parts.get(part, (0.0, 0))
        parts[part] = took + event.duration / 1e6, count + 1
        end = event.start + event.duration
        busy += max(0.0, end - max(event.start, until)) / 1e6
        until = max(until, end)
    return parts, busy


def trace(step: Any, carry: Any, tokens: jax.Array) -> tuple[list[Event], float]:
    """The operations of one step, and its seconds."""
    with tempfile.TemporaryDirectory(prefix="fam-jax-parts-") as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(step(carry, tokens))
            seconds = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.xplane.pb")
        with warnings.catch_warnings():  # of the types of the profiler's own module, which a test may make errors
            warnings.simplefilter("ignore", DeprecationWarning)
            data = jax.profiler.ProfileData.from_file(str(file))
            events = [
                Event(str(name), event.start_ns, event.duration_ns)
                for plane in data.planes
                for line in plane.lines
                for event in line.events
                if (name := dict(event.stats).get("hlo_op")) is not None
            ]
    return events, seconds


def measure(arm: str, options: Options) -> dict[str, Any]:
    """The curve of an arm.

    Raises:
        ValueError: It cannot be compiled, or the profiler saw none of its operations.
    """
    cell = Cell("train", arm, options.length, options.batch_size, model_config(options.shape, arm))
    build(cell)
    if cell.error is not None:
        raise ValueError(f"arms={arm!r}: {cell.error}")
    shape = options.batch_size, options.length
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cell.config.vocab_size, shape), jnp.int32)
    carry, times = cell.make(jax.random.key(0)), []
    for _ in range(options.rounds + 2):
        start = time.perf_counter()
        carry, out = cell.step(carry, tokens)
        jax.block_until_ready((carry, out))
        times.append(time.perf_counter() - start)
    events, traced = trace(cell.step, carry, tokens)
    parts, busy = add_up(events, names(cell.step.as_text()))
    if not parts:
        raise ValueError(f"arms={arm!r}: the profiler saw no operation of the step on {jax.default_backend()}")
    ordered = [name for name in _ORDER if name in parts]
    return {
        "label": arm,
        "seed": 0,
        "part": list(range(1, len(ordered) + 1)),
        "name": ordered,
        "milliseconds": [parts[name][0] for name in ordered],
        "operations": [parts[name][1] for name in ordered],
        "step_milliseconds": 1e3 * float(np.median(times[2:])),
        "traced_milliseconds": 1e3 * traced,
        "idle_milliseconds": max(0.0, 1e3 * traced - busy),
    }


def table(result: results.Result) -> str:
    """Milliseconds and operations of all parts in Markdown, two columns for each arm."""
    curves = result.values["curves"]
    every = {name for curve in curves for name in curve["name"]}
    cells = [["part", *(column for curve in curves for column in (f"{curve['label']}, ms", "operations"))]]
    for name in sorted(every, key=_ORDER.index):
        line = [name]
        for curve in curves:
            at = curve["name"].index(name) if name in curve["name"] else None
            line += ["–", "–"] if at is None else [f"{curve['milliseconds'][at]:.1f}", f"{curve['operations'][at]:,}"]
        cells.append(line)
    for name, field in (
        ("no operation runs", "idle_milliseconds"),
        ("step, traced", "traced_milliseconds"),
        ("step", "step_milliseconds"),
    ):
        cells.append([name, *(cell for curve in curves for cell in (f"{curve[field]:.1f}", ""))])
    return report.markdown(cells)


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Traces, and writes the result.

    Raises:
        ValueError: There is no arm, one is not known, of another library, or cannot run, or the output folder cannot be
            made.
    """
    if not options.arms:
        raise ValueError("arms=() leaves nothing to trace; give at least one")
    others = [arm for arm in options.arms if peers.is_peer(arm)]
    if others:
        raise ValueError(f"arms={others} are of another library, whose parts are not known; leave them out")
    configs = {arm: model_config(options.shape, arm) for arm in options.arms}
    results.make_directory(options.output)
    start = time.perf_counter()
    curves = [measure(arm, options) for arm in configs]
    settings = dataclasses.asdict(options) | {"models": {arm: to_json(config) for arm, config in configs.items()}}
    del settings["output"]
    result = results.make(
        "parts",
        options.name,
        config=settings,
        seeds=[0],
        values={"curves": curves, "marks": []},
        wall_seconds=time.perf_counter() - start,
        data=None,
    )
    file = results.write(result, options.output)
    return result, file, report.plot(result, file.with_suffix(".png"))

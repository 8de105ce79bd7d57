"""Speed of whole models: `python -m experiments.benchmark speed`.

An arm is written MEMORY[+lime][/SCHEDULE][@ATTENTION][:REMAT], see `experiments.arms`, or is of another library, see
`experiments.peers`. All programs are compiled first, and then the arms of a length and batch run in turns, so that
whatever else the machine does meets all of them. An arm that cannot be compiled, or does not fit into memory, is
reported as that, and the others go on.

Utilisation (MFU) is by what a model needs: nothing computed twice, only keys that are seen. Beside it are that of the
hardware, by all operations of the program, and the speed relative to plain matrix products on the same machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from experiments import flops, peers, report, results
from experiments.arms import MODES, STREAM, TEXT_MODES, TOKEN_MODES, Shape, functions, model_config
from experiments.typed import to_json
from fam_jax import DecoderConfig
from lime_jax import LimeConfig

PART = 4096  # tokens at a time of a stream


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures how fast models are, and how close to the limit.

    Attributes:
        shape: Of the models.
        arms: Which to compare.
        modes: "forward" gives the loss of every token, "train" makes a step of AdamW, "prefill" gives the state that
            further tokens need, and no logits, and "stream" the same in parts; "decode" reads a token of each text, in
            the middle of a block, and "decode-end" a block's last, with which the FAM is updated; with full attention
            both read the text's last.
        lengths: Tokens of a text.
        batch_sizes: Texts in a step.
        rounds: Steps of each arm, after two that are not counted.
        seconds: No more rounds after so many seconds, but three.
        apart: Arm after arm, each alone in memory, instead of in turns.
        jobs: Programs that are compiled at the same time.
        lock: A file by which several such commands agree that none runs steps while another compiles or runs.
        product: Rows and columns of the plain matrix product to compare with.
        name: Name of the result.
        output: Folder of the result file and the plot.
    """

    shape: tyro.conf.OmitArgPrefixes[Shape] = Shape()  # noqa: RUF009
    arms: tuple[str, ...] = ("bswa", "fam", "full")
    modes: tuple[str, ...] = TEXT_MODES
    lengths: tuple[int, ...] = (8192,)
    batch_sizes: tuple[int, ...] = (1,)
    rounds: int = 10
    seconds: float = 60.0
    apart: bool = False
    jobs: int = 1
    lock: Path | None = None
    product: int = 8192
    name: str = "speed"
    output: Path = results.DIRECTORY


@dataclasses.dataclass
class Cell:
    """One arm at one length and batch.

    Attributes:
        mode: Of MODES.
        arm: Its name.
        length: Tokens of a text.
        batch: Texts.
        config: The decoder's.
        make: Compiled, key -> what the first step is given.
        step: Compiled, (carry, tokens) -> (carry, anything).
        compile_seconds: Of the step; with several jobs others were compiled meanwhile. None of another library's.
        peak_bytes: Memory of the device that the step needs at once, arguments and results included; None likewise.
        counted: Operations of the step as its program has them; None if they cannot be counted.
        seconds: Of each counted step.
        error: Why there are none.
    """

    mode: str
    arm: str
    length: int
    batch: int
    config: DecoderConfig
    make: Any = None
    step: Any = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    counted: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None

    @property
    def name(self) -> str:
        """Of all but the length."""
        return f"{self.mode}, {self.arm}, batch {self.batch}"


def build(cell: Cell) -> None:
    """Compiles a cell's programs; an error is noted there."""
    if peers.is_peer(cell.arm):
        try:
            cell.make, cell.step = peers.functions(cell.mode, cell.config, cell.arm)
        except ValueError as error:
            cell.error = _first_line(error)
        return
    make, step = functions(cell.mode, cell.config, cell.batch, cell.length)
    part = PART if cell.mode == STREAM else cell.length
    tokens = jax.ShapeDtypeStruct((cell.batch, part), jnp.int32)
    try:
        made = jax.jit(make).lower(jax.random.key(0))
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made.out_info)
        traced = jax.jit(step, donate_argnums=0).trace(shapes, tokens)
        lowered = traced.lower()
        start = time.perf_counter()
        compiled = lowered.compile()
        cell.step = _in_parts(compiled, part) if cell.mode == STREAM else compiled
        cell.compile_seconds = time.perf_counter() - start
        used = compiled.memory_analysis()
        results_bytes = used.output_size_in_bytes - used.alias_size_in_bytes  # those in no argument's place
        cell.peak_bytes = used.argument_size_in_bytes + used.temp_size_in_bytes + results_bytes
        cell.make = made.compile()
    except (RuntimeError, ValueError) as error:  # the first is also JAX's own: out of memory, or cuDNN has no kernel
        cell.error = _first_line(error)
        return
    if cell.mode == "decode":  # of what a block's end needs, the program has all, and the step does nothing
        return
    with contextlib.suppress(ValueError):  # it has no single count
        cell.counted = flops.count_jaxpr(traced.jaxpr.jaxpr) * (cell.length // part)


def _in_parts(step: Any, part: int) -> Any:
    """A step that reads so many tokens at a time."""

    def read(carry: Any, tokens: jax.Array) -> Any:
        ids = np.asarray(tokens)
        for start in range(0, ids.shape[1], part):
            carry, out = step(carry, ids[:, start : start + part])
        return carry, out

    return read


def measure(cells: list[Cell], rounds: int, seconds: float) -> None:
    """Runs the steps of cells of one length and batch in turns."""
    batch, length = cells[0].batch, cells[0].length
    vocab = min(cell.config.vocab_size for cell in cells)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocab, (batch, length)), jnp.int32)
    carries: dict[int, Any] = {}

    def run(number: int) -> float | None:
        try:
            if number not in carries:
                carries[number] = cells[number].make(jax.random.key(0))
            start = time.perf_counter()
            carries[number], out = cells[number].step(carries[number], tokens)
            jax.block_until_ready((carries[number], out))
            return time.perf_counter() - start
        except RuntimeError as error:
            cells[number].error = _first_line(error)
            carries.pop(number, None)
            gc.collect()
            return None

    def alive() -> list[int]:
        return [number for number, cell in enumerate(cells) if cell.error is None]

    for number in alive():
        if run(number) is not None:
            run(number)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for number in alive():
            taken = run(number)
            if taken is not None:
                cells[number].seconds.append(taken)


def product_speed(size: int, dtype: str) -> dict[str, Any]:
    """Operations per second of plain products of square matrices, eight after another, on this machine."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    w = x * size**-0.5

    @jax.jit
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda _, x: x @ w, x)

    times = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, w))
        times.append(time.perf_counter() - start)
    return {"size": size, "dtype": dtype, "seconds": times, "speed": 16 * size**3 / float(np.median(times[2:]))}


_LOCKS: dict[Path, IO[str]] = {}


def hold(lock: Path | None, exclusive: bool) -> None:
    """Takes the lock together with others that compile, or alone to run steps; without one, nothing.

    It is kept until the process ends, with which its memory on the device is free again.
    """
    if lock is not None:
        file = _LOCKS.setdefault(lock.absolute(), lock.open("a"))
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)


def model_flops(cell: Cell) -> int | None:
    """Operations that a step needs, nothing computed twice, only keys that are seen; None if there is no formula."""
    if cell.mode in TOKEN_MODES:
        return None
    if isinstance(cell.config.mixing, LimeConfig) and cell.config.mixing.router == "dynamic_views":
        return None
    c, tokens = cell.config, cell.batch * cell.length
    count = flops.train_flops if cell.mode == "train" else flops.forward_flops
    logits = 2 * c.d_model * c.vocab_size * tokens if cell.mode in ("prefill", STREAM) else 0
    return count(c, cell.batch, cell.length, useful=True) - logits


def summary(cell: Cell, first: Cell, speed: float) -> dict[str, Any]:
    """The numbers of a cell.

    Args:
        cell: That was measured.
        first: The first cell that ran in turns with it.
        speed: Of the plain product.
    """
    seconds = float(np.median(cell.seconds))
    device, needed = jax.devices()[0].device_kind, model_flops(cell)
    pairs = zip(cell.seconds, first.seconds, strict=False)
    return {
        "tokens": cell.length,
        "step_seconds": seconds,
        "seconds": cell.seconds,
        "tokens_per_second": cell.batch * (1 if cell.mode in TOKEN_MODES else cell.length) / seconds,
        "ratio": float(np.median([mine / other for mine, other in pairs])),
        "model_flops": needed,
        "mfu": flops.mfu(needed, seconds, device, 1) if needed else None,
        "of_product": needed / seconds / speed if needed else None,
        "counted_flops": cell.counted,
        "hardware": flops.mfu(cell.counted, seconds, device, 1) if cell.counted else None,
        "peak_gib": None if cell.peak_bytes is None else cell.peak_bytes / 2**30,
        "compile_seconds": None if cell.compile_seconds is None else round(cell.compile_seconds, 2),
    }


def table(result: results.Result) -> str:
    """All numbers of a result in Markdown, a line for each length of each arm."""
    cells = [["step", "tokens", "ms", "tokens/s", "time to first", "MFU", "hardware", "of product", "GiB", "compile s"]]

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    for curve in result.values["curves"]:
        for at in range(len(curve["tokens"])):
            one = {name: values[at] for name, values in curve.items() if isinstance(values, list)}
            cells.append(
                [
                    curve["label"],
                    f"{one['tokens']:,}",
                    f"{1e3 * one['step_seconds']:.2f}",
                    f"{one['tokens_per_second']:,.0f}",
                    f"{one['ratio']:.3f}",
                    *(share(one[name]) for name in ("mfu", "hardware", "of_product")),
                    "–" if one["peak_gib"] is None else f"{one['peak_gib']:.2f}",
                    "–" if one["compile_seconds"] is None else f"{one['compile_seconds']:.1f}",
                ]
            )
    product = result.values["product"]
    lines = [report.markdown(cells), f"\nproduct of {product['size']}: {product['speed'] / 1e12:.2f} TFLOP/s"]
    return "\n".join(
        lines + [f"{error['label']}, {error['tokens']}: {error['error']}" for error in result.values["errors"]]
    )


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Measures, and writes the result.

    Raises:
        ValueError: There is nothing to measure, an arm or a mode is not known, or the output folder cannot be made.
    """
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown:
        raise ValueError(f"modes={unknown} are not known; there are {', '.join(map(repr, MODES))}")
    if STREAM in options.modes and any(length % PART for length in options.lengths):
        raise ValueError(f"lengths={options.lengths} must be multiples of {PART}, the parts of a stream")
    empty = [name for name in ("arms", "modes", "lengths", "batch_sizes") if not getattr(options, name)]
    if empty:
        raise ValueError(f"{empty[0]}=() leaves nothing to measure; give at least one")
    configs = {arm: model_config(options.shape, arm) for arm in options.arms}
    results.make_directory(options.output)
    start = time.perf_counter()
    groups = [
        [Cell(mode, arm, length, batch, config) for arm, config in configs.items()]
        for mode in options.modes
        for length in options.lengths
        for batch in options.batch_sizes
    ]
    if options.apart:
        groups = [[cell] for group in groups for cell in group]
    cells = [cell for group in groups for cell in group]
    hold(options.lock, exclusive=False)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(tqdm(pool.map(build, cells), total=len(cells), unit="program", disable=None))
    curves: dict[str, dict[str, Any]] = {}
    settings = dataclasses.asdict(options) | {"models": {arm: to_json(config) for arm, config in configs.items()}}
    del settings["output"], settings["lock"]
    hold(options.lock, exclusive=True)
    product = product_speed(options.product, cells[0].config.dtype)
    for group in tqdm(groups, unit="group", disable=None):
        measure(group, options.rounds, options.seconds)
        ran = [cell for cell in group if cell.error is None]
        for cell in ran:
            curve = curves.setdefault(cell.name, {"label": cell.name, "seed": 0})
            for name, value in summary(cell, ran[0], product["speed"]).items():
                curve.setdefault(name, []).append(value)
        for cell in group:
            cell.make = cell.step = None
        failed = [{"label": cell.name, "tokens": cell.length, "error": cell.error} for cell in cells if cell.error]
        result = results.make(
            "speed",
            options.name,
            config=settings,
            seeds=[0],
            values={"curves": list(curves.values()), "marks": [], "errors": failed, "product": product},
            wall_seconds=time.perf_counter() - start,
            data=None,
        )
        file = results.write(result, options.output)  # after each group: what is measured is not lost with the rest
    return result, file, report.plot(result, file.with_suffix(".png"))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"

"""Reads a long text in a stream, and measures speed and memory: `python -m experiments.reading --checkpoint DIR`.

The text is read as `experiments.generate --context-file` reads it. Without `--text` it is Python source code that is
installed on the machine. The result file has tokens per second, the resident memory of the process and the size of the
model's state at evenly spaced places. If only a part is read (`--limit`), the time for all of it is extrapolated, and
the field that holds it says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments import report, results
from experiments.chat import read_settings
from experiments.checkpoint import CheckpointError, load_model
from experiments.command import run_command
from experiments.config import reading_mesh
from experiments.conversation import Codec, Reader, Style
from experiments.data import DataError
from experiments.data.cache import build_once, digest
from experiments.data.config import local_cache
from experiments.data.sources import python_source
from experiments.data.tokenizers import Literal, encode_pieces
from experiments.files import location, run_folder
from experiments.generate import begun, state_bytes, text_pieces, tokenizer_of
from experiments.measures import check_positive
from experiments.stored import find_checkpoint
from experiments.typed import to_json
from fam_jax import MeshConfig, StreamState

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    """Reads a long text in a stream, and measures speed and memory on the way; writes a result file.

    Attributes:
        checkpoint: Folder of a run, or one checkpoint in it.
        text: UTF-8 text file. None is Python source code that is installed on the machine.
        size: Bytes of that source code; a file of one's own is taken whole.
        limit: Read only the first so many tokens, and extrapolate the time for the rest. None: all.
        chunk: Tokens read at a time.
        points: Places, evenly spaced, at which is measured.
        name: Name of the result. None: the run's name and `reading`.
        output: Folder of the result file. None: `results` in the run's folder.
        mesh: How the devices are used, as in training.
    """

    checkpoint: Path
    text: Path | None = None
    size: int = 10_000_000
    limit: int | None = None
    chunk: int = 512
    points: int = 20
    name: str | None = None
    output: Path | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class Course:
    """What was measured while a text was read, in lists with a value for each place.

    Attributes:
        tokens: Tokens read from the beginning.
        seconds: Time since the beginning, tokenizing included, compiling not.
        cpu_seconds: Processor time of the process, which depends less on what else the machine does.
        tokens_per_second: Since the place before, of all time that has passed.
        resident_mib: Resident memory of the process in MiB; None where the system does not tell.
        state_bytes: Size of the model's state.
    """

    tokens: list[int]
    seconds: list[float]
    cpu_seconds: list[float]
    tokens_per_second: list[float]
    resident_mib: list[float | None]
    state_bytes: list[int]


def source_code(size: int) -> Path:
    """A file of the first bytes of the installed Python source code; it is made once, in the cache for data.

    Args:
        size: Bytes, or up to three less, so that no character is cut.

    Raises:
        DataError: There is not so much of it, or the disk is full.
    """
    source = python_source()

    def build(partial: Path) -> None:
        left = size
        with open(partial / "text.txt", "wb") as file:
            for document in source.texts("train"):
                left -= file.write(document.text.encode()[:left].decode(errors="ignore").encode())
                if left < 4:
                    return
        raise DataError(f"size={size:,}: only {size - left:,} bytes of Python source are installed; ask for less")

    return build_once(local_cache() / "reading" / digest(source.key, size)[:16], build) / "text.txt"


def resident_bytes(field: str = "VmRSS") -> int | None:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at most; None where there is no /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def follow(reader: Reader, chunks: Iterable[np.ndarray], every: int) -> Course:
    """Reads a text in a stream, and measures after every so many chunks.

    Args:
        reader: The model.
        chunks: Ids, int [t] each; whole chunks of the reader, but for the last.
        every: Chunks from one place to the next.

    Raises:
        ValueError: There is no token, or one that the model does not know.
    """
    course = Course([], [], [], [], [], [])
    state: StreamState | None = None
    start, worked = time.perf_counter(), time.process_time()
    before = start
    total, chunks = 0, iter(chunks)
    for first in chunks:
        state, count = reader.read(chain([first], islice(chunks, every - 1)), state)
        jax.block_until_ready(state)
        now = time.perf_counter()
        used = resident_bytes()
        total += count
        course.tokens.append(total)
        course.seconds.append(round(now - start, 3))
        course.cpu_seconds.append(round(time.process_time() - worked, 3))
        course.tokens_per_second.append(round(count / (now - before), 2))
        course.resident_mib.append(None if used is None else round(used / MIB, 1))
        course.state_bytes.append(state_bytes(state))
        before = now
    if not total:
        raise ValueError("the text has no token; give some text")
    return course


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Reads and measures as the options say.

    Returns:
        The result, of kind "reading", its file and its plot.

    Raises:
        ValueError: An option or the text cannot be used.
        CheckpointError: See `load_model`.
    """
    check_positive(size=options.size, limit=options.limit, chunk=options.chunk, points=options.points)
    if options.name is not None:
        results.check_name(options.name)
    folder, _, config = find_checkpoint(options.checkpoint)
    tokenizer, home = tokenizer_of(config, options.checkpoint)
    bos = read_settings(tokenizer, home).bos
    path = source_code(options.size) if options.text is None else location(options.text)
    text = _lengths(path, tokenizer, bos)
    output = results.make_directory(options.output or run_folder(options.checkpoint) / "results")
    mesh = reading_mesh(options.mesh)
    model, variables, config = load_model(folder, mesh=mesh)
    reader = Reader(model, variables, Style(max_new_tokens=1, chunk=options.chunk))
    planned = min(text["tokens"], options.limit or text["tokens"])
    every = -(-planned // (options.points * reader.size))
    load = os.getloadavg()
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        jax.block_until_ready(reader.read([np.zeros(reader.size, np.int32)])[0])
        compiling = time.perf_counter() - start
        with tqdm(total=planned, unit="token", unit_scale=True, disable=None, leave=False) as bar:
            course = follow(reader, _chunks(_ids(path, tokenizer, bos), reader.size, planned, bar), every)
    peak = resident_bytes("VmHWM")
    seconds = course.seconds[-1]
    values = {
        "curves": [{"label": config.name, "seed": config.seed, **to_json(course)}],
        "marks": [],
        "text": text,
        "tokens_read": planned,
        "seconds": seconds,
        "tokens_per_second": round(planned / seconds, 2),
        "extrapolated_seconds_for_all": None
        if planned == text["tokens"]
        else round(seconds / planned * text["tokens"]),
        "compile_seconds": round(compiling, 2),
        "peak_resident_mib": None if peak is None else round(peak / MIB, 1),
        "load_average_before": [round(value, 2) for value in load],
    }
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    settings = dataclasses.asdict(options)
    for name in ("output", "mesh"):
        del settings[name]  # they shape no number
    result = results.make(
        "reading",
        options.name or f"{config.name}-reading",
        config={"train": to_json(config), "reading": settings},
        seeds=[config.seed],
        values=values,
        wall_seconds=seconds,
        data={"sha256": sha256} | ({"packages": python_source().packages} if options.text is None else {}),
    )
    written = results.write(result, output)
    return result, written, report.plot(result, written.with_suffix(".png"))


def table(result: results.Result) -> str:
    """A result of kind "reading" as a Markdown table: a line per place."""
    (curve,) = result.values["curves"]
    names = [field.name for field in dataclasses.fields(Course)]
    cells = [["tokens", "seconds", "CPU seconds", "tokens per second", "resident memory (MiB)", "state (bytes)"]]
    for tokens, seconds, worked, rate, used, state in zip(*(curve[name] for name in names), strict=True):
        times = [f"{value:,.1f}" for value in (seconds, worked, rate)]
        cells.append([f"{tokens:,}", *times, "–" if used is None else f"{used:,.1f}", f"{state:,}"])
    return report.markdown(cells)


def summary(result: results.Result) -> str:
    """What was read and how long it took, in a line; if it was a part, what that means for all of it."""
    values, text = result.values, result.values["text"]
    line = (
        f"read {values['tokens_read']:,} of the {text['tokens']:,} tokens of {text['bytes']:,} bytes in "
        f"{values['seconds']:,.1f} s, {values['tokens_per_second']:,.1f} tokens/s"
    )
    more = values["extrapolated_seconds_for_all"]
    return line if more is None else f"{line}; at that speed all would take {more:,} s (extrapolated, not measured)"


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.reading", description=__doc__)
    try:
        result, file, figure = run(options)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(f"\n{summary(result)}\nwrote {file} and {figure}")
    return 0


def _ids(path: Path, tokenizer: Codec, bos: int | None) -> Iterator[np.ndarray]:
    """The ids of the file's text, int32 [t] each, as `experiments.generate` reads a context."""
    return begun(encode_pieces(Literal(tokenizer), text_pieces(path)), bos)


def _lengths(path: Path, tokenizer: Codec, bos: int | None) -> dict[str, int]:
    """How long the text is; the file is read without the model."""
    characters = sum(map(len, text_pieces(path)))
    tokens = sum(map(len, _ids(path, tokenizer, bos)))
    return {"bytes": path.stat().st_size, "characters": characters, "tokens": tokens}


def _chunks(pieces: Iterable[np.ndarray], size: int, limit: int, bar: tqdm) -> Iterator[np.ndarray]:
    """The first `limit` ids in chunks of `size`, but for the last; moves the bar on."""
    held = np.zeros(0, np.int32)
    for ids in pieces:
        held = np.concatenate([held, ids])[:limit]
        whole = len(held) // size * size
        for start in range(0, whole, size):
            yield held[start : start + size]
            bar.update(size)
        held, limit = held[whole:], limit - whole
        if len(held) == limit:
            break
    if len(held):
        yield held
        bar.update(len(held))


if __name__ == "__main__":
    run_command(main)

"""Tables and plots made from result files and training runs: `python -m experiments.report [FILES or FOLDERS]`.

Every kind of result is a set of curves: `values["curves"]` is a list of objects with a `label`, a `seed`, and
lists of equal length, two of which `KINDS` names as x and y. Curves of one label are runs of one thing with
different seeds: their mean is shown, with a 95 % interval of the mean. `values["marks"]`, a list of
`{"x": ..., "label": ...}`, draws vertical lines.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

from experiments import results
from experiments.command import make_folder, run_command
from experiments.files import as_os_errors, is_remote, location
from experiments.kinds import KINDS, Kind
from experiments.results import Result, ResultError
from lime_jax.analysis import plot_matrix

COLUMNS = 10  # most values of x in a table; a plot shows all


@dataclasses.dataclass(frozen=True)
class Line:
    """The curves of one label, averaged over seeds.

    Attributes:
        label: What it is.
        x: Sorted values of x.
        mean: Mean of y at each x over the seeds that have it.
        half: Half the width of the 95 % interval of the mean (Student's t); NaN with one seed.
        seeds: Number of curves.
        words: What stands for y at each x, of the first seed; None if the kind has no words.
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    half: np.ndarray
    seeds: int
    words: dict[float, str] | None = None


def lines(result: Result) -> list[Line]:
    """Averages the curves of a result over seeds, in order of their first appearance.

    Raises:
        ResultError: the kind is unknown, or `values` does not hold what the kind needs.
    """
    return _lines(result, _kind(result))


def _lines(result: Result, kind: Kind) -> list[Line]:
    curves = result.values.get("curves")
    if not isinstance(curves, list) or not curves:
        raise ResultError(f"{result.name}: field 'values.curves' must be a list of at least one curve")
    groups: dict[str, list[dict[float, float]]] = {}
    words: dict[str, dict[float, str]] = {}
    for index, curve in enumerate(curves):
        where = f"{result.name}: field 'values.curves[{index}]"
        for field in filter(None, ("label", kind.x, kind.y, kind.text)):
            if not isinstance(curve, dict) or field not in curve:
                raise ResultError(f"{where}.{field}' is missing; results of kind {result.kind!r} need it")
        if len(curve[kind.x]) != len(curve[kind.y]):
            raise ResultError(f"{where}': {kind.x} and {kind.y} differ in length")
        y = [np.nan if value is None else float(value) for value in curve[kind.y]]
        groups.setdefault(curve["label"], []).append(dict(zip(curve[kind.x], y, strict=True)))
        if kind.text is not None:
            words.setdefault(curve["label"], dict(zip(curve[kind.x], curve[kind.text], strict=True)))
    return [dataclasses.replace(_average(label, group), words=words.get(label)) for label, group in groups.items()]


def table(result: Result) -> str:
    """The result as a Markdown table: a row per label, a column per x, evenly chosen if there are many.

    What a kind has beside y follows in tables of its own, with the curves that have it.
    """
    kind, rows = _kind(result), lines(result)
    tables = [_table(kind, rows)]
    for name, label in kind.also:
        beside = dataclasses.replace(kind, y=name, y_label=label)
        curves = [curve for curve in result.values["curves"] if beside.y in curve]
        if curves:
            tables.append(_table(beside, _lines(dataclasses.replace(result, values={"curves": curves}), beside)))
    return "\n\n".join(tables)


def _table(kind: Kind, rows: Sequence[Line]) -> str:
    xs = sorted({float(x) for row in rows for x in row.x})
    if len(xs) > COLUMNS:
        xs = [xs[i] for i in np.unique(np.linspace(0, len(xs) - 1, COLUMNS).round().astype(int))]
    cells = [[f"{kind.y_label} by {kind.x_label}", *(f"{x:,.10g}" for x in xs)]]
    for row in rows:
        at = {x: (mean, half) for x, mean, half in zip(row.x, row.mean, row.half, strict=True)}
        label = row.label if row.seeds == 1 else f"{row.label} ({row.seeds} seeds)"
        texts = {} if row.words is None else {x: f"{_escape(word)} " for x, word in row.words.items()}
        cells.append([_escape(label), *(texts.get(x, "") + _cell(at.get(x), kind.decimals) for x in xs)])
    return markdown(cells)


def markdown(cells: Sequence[Sequence[str]], right: bool = True) -> str:
    """Lines of cells, the heading first, as a Markdown table.

    Args:
        cells: Line by line.
        right: Align all columns but the first to the right.
    """
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + (":" if right else "-") for width in widths[1:])]

    def show(line: Sequence[str]) -> str:
        place = str.rjust if right else str.ljust
        padded = [line[0].ljust(widths[0])] + [place(c, w) for c, w in zip(line[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    return "\n".join(map(show, [cells[0], rule, *cells[1:]]))


def plot(result: Result, path: str | Path) -> Path:
    """Draws the result; the suffix of `path` picks the format. Returns the path."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    kind, rows = _kind(result), lines(result)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    if kind.heat:
        figure.set_size_inches(10.0 if kind.text else 6.4, min(max(4.0, 0.2 * len(rows)), 12.0))
        figure.colorbar(_heat(kind, rows, axes), label=kind.y_label)
        axes.set(xlabel=kind.x_label, title=result.name)
        return _save(figure, path)
    for number, row in enumerate(rows):
        label = row.label if row.seeds == 1 else f"{row.label} (mean of {row.seeds} seeds, 95 %)"
        marker, dash = "o" if len(row.x) <= 40 else None, "--" if number % 20 >= 10 else "-"  # there are ten colours
        (drawn,) = axes.plot(row.x, row.mean, dash, marker=marker, markersize=4, label=label)
        if row.seeds > 1:
            low, high = row.mean - row.half, row.mean + row.half
            axes.fill_between(row.x, low, high, color=drawn.get_color(), alpha=0.2)
    for mark in result.values.get("marks", []):
        axes.axvline(mark["x"], color="0.5", linestyle="--", linewidth=1)
        place = axes.get_xaxis_transform()
        axes.text(mark["x"], 0.5, f" {mark['label']}", rotation=90, va="center", fontsize=8, transform=place)
    if kind.log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
    if kind.y_range:
        axes.set_ylim(*kind.y_range)
    axes.set(xlabel=kind.x_label, ylabel=kind.y_label, title=result.name)
    axes.grid(alpha=0.3)
    if len(rows) > 7:
        figure.set_size_inches(9.6, 4.8)
        figure.legend(fontsize=8, loc="outside right upper")
    else:
        axes.legend(fontsize=8)
    return _save(figure, path)


def circumstances(result: Result) -> str:
    """One paragraph of Markdown: the command, seeds, time, machine, versions and commit of a result."""
    commit = result.commit.get("hash")
    changes = " with local changes" if result.commit.get("dirty") else ""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    seeds = ", ".join(map(str, result.seeds)) or "none"
    machine = result.hardware
    return (
        f"`{result.command}`; seeds {seeds}; {result.wall_seconds:,.0f} s "
        f"on {machine.get('devices')}, {machine.get('cpu')} with {machine.get('cores')} cores; "
        f"{versions}; commit {commit[:12] if commit else 'unknown'}{changes}; {result.time}."
    )


def section(result: Result, figure: str | Path | None = None) -> str:
    """The Markdown of a result: title, table, figure and circumstances.

    Args:
        result: The result.
        figure: Path or address of its plot, as the Markdown is to name it. None: no figure.
    """
    parts = [f"## {result.name}", table(result)]
    if figure is not None:
        parts.append(f"![{result.name}]({figure})")
    return "\n\n".join([*parts, circumstances(result)]) + "\n"


def together(many: Sequence[Result]) -> list[Result]:
    """Puts results of one kind into one, so that a table compares them. Labels get their result's name.

    The circumstances are those of the first, the seeds and the time are those of all.
    """
    merged = []
    for kind in dict.fromkeys(result.kind for result in many):
        group = [result for result in many if result.kind == kind]
        curves: list[dict[str, Any]] = []
        for result in group:
            lines(result)  # the checks
            for curve in result.values["curves"]:
                curves.append({**curve, "label": f"{result.name}: {curve['label']}"})
        merged.append(
            dataclasses.replace(
                group[0],
                name=kind,
                values={"curves": curves},
                seeds=sorted({seed for result in group for seed in result.seeds}),
                wall_seconds=sum(result.wall_seconds for result in group),
            )
        )
    return merged


@dataclasses.dataclass(frozen=True)
class Options:
    """Shows result files and training runs as Markdown tables and draws their plots.

    Attributes:
        paths: Result files, folders of training runs, or folders of both.
        together: One table and plot per kind instead of one per file.
        plots: Folder for the plots. None: next to each result file, in a run's folder, or with `together` next to
            the first.
        output: File for the Markdown. None: the terminal.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]] = (results.DIRECTORY,)
    together: bool = False
    plots: Path | None = None
    output: Path | None = None


def run(options: Options) -> str:
    """Draws the plots and returns the Markdown.

    Raises:
        ResultError: see `results.find`, `results.read`, `results.read_run` and `lines`.
        ValueError: the folder for the plots cannot be made.
    """
    files = results.find(options.paths)
    loaded = [results.read_run(file) if file.is_dir() else results.read(file) for file in files]
    places = [file / "training.png" if file.is_dir() else file.with_suffix(".png") for file in files]
    if options.together:
        loaded = together(loaded)
        places = [places[0].with_name(f"{result.name}.png") for result in loaded]
    if options.plots is not None:
        make_folder(options.plots, "plots")
        places = [options.plots / f"{result.name}.png" for result in loaded]
    base = options.output.parent if options.output else Path.cwd()
    parts = []
    for result, place in zip(loaded, places, strict=True):
        figure = plot(result, place)
        parts.append(
            section(result, str(figure) if is_remote(figure) else Path(os.path.relpath(figure, base)).as_posix())
        )
    return "\n".join(parts)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.report", description=Options.__doc__)
    try:
        if options.output is not None and options.output.is_dir():
            raise ResultError(f"output={str(options.output)!r} is a folder; give the name of a file")
        text = run(options)
        if options.output is None:
            print(text)
        else:
            make_folder(options.output.parent, "the folder of output")
            options.output.write_text(text, encoding="utf-8")
            print(f"wrote {options.output}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _heat(kind: Kind, rows: Sequence[Line], axes: Any) -> Any:
    """Draws lines as rows of colours; what a line does not have is blank."""
    xs = sorted({float(x) for row in rows for x in row.x})
    values = np.full((len(rows), len(xs)), np.nan)
    texts = [[""] * len(xs) for _ in rows]
    for number, row in enumerate(rows):
        places = np.searchsorted(xs, row.x)
        values[number, places] = row.mean
        for x, word in (row.words or {}).items():
            texts[number][xs.index(x)] = word
    columns = [f"{x:,.6g}" for x in xs]
    return plot_matrix(values, [row.label for row in rows], columns, axes, texts if kind.text else None)


def _save(figure: Any, path: str | Path) -> Path:
    target = location(path)
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with as_os_errors(target), target.open("wb") as file:
        figure.savefig(file, format=target.suffix[1:], dpi=150)
    return target


def _escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _kind(result: Result) -> Kind:
    if result.kind not in KINDS:
        raise ResultError(f"{result.name}: field 'kind' is {result.kind!r}; known kinds: {', '.join(KINDS)}")
    return KINDS[result.kind]


def _average(label: str, runs: list[dict[float, float]]) -> Line:
    xs = sorted({x for run in runs for x in run})
    mean, half = [], []
    for x in xs:
        y = np.array([run[x] for run in runs if x in run])
        mean.append(y.mean())
        spread = y.std(ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.nan
        half.append(stats.t.ppf(0.975, len(y) - 1) * spread if len(y) > 1 else np.nan)
    return Line(label, np.array(xs, float), np.array(mean), np.array(half), len(runs))


def _cell(value: tuple[float, float] | None, decimals: int) -> str:
    if value is None or np.isnan(value[0]):
        return "–" if value is None else "not finite"
    mean, half = value
    return f"{mean:.{decimals}f}" + ("" if np.isnan(half) else f" ± {half:.{decimals}f}")


if __name__ == "__main__":
    run_command(main)

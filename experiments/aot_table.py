"""Compiles the rows of experiments/docs/compile.md, those without a result file yet, and prints its tables.

python -m experiments.aot_table                         # what is missing, one after another, then the tables
python -m experiments.aot_table --only palm_1b-v5e      # of it those whose name has this in it
python -m experiments.aot_table --compile-none          # no more than the tables of what there is

The tables are written into the page, too, if the results are where it takes them from. Each row is a run of
`experiments.aot` in a process of its own, which takes minutes and some gigabytes; interrupt and start again when you
like. Delete a result file to have its row compiled anew.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro

from experiments import aot, aot_gpu, report, results
from experiments.command import run_command
from experiments.results import Result

DIRECTORY = results.DIRECTORY / "aot"
PAGE = Path(__file__).parent / "docs" / "compile.md"
BATCH, LENGTH = 128, 8192

# The gates: share of the usable memory; FAM's peak, collective bytes and operations against BSWA's; difference of the
# operations of a forward pass to the closed formula.
PEAK, PEAK_RATIO, BYTES_RATIO, FLOPS_RATIO, FORMULA = 0.9, 1.35, 1.6, 1.06, 0.01

# Preset, topology, rows at once: a row or two a chip, as attention's scores of all blocks are there at once.
TRAINING = (
    ("palm_1b", "v5e:4x4", 16),
    ("palm_1b", "v5p:2x2x4", 32),
    ("palm_8b", "v5p:2x4x4", 32),
    ("palm_24b", "v5p:4x4x4", 64),
    ("palm_1b", "h100:8", 32),
)
# Preset, topology, mesh: weights over few chips, as each token needs all of them.
GENERATION = (
    ("palm_1b", "v5e:4x4", "data=4,tensor=4"),
    ("palm_24b", "v5p:4x4x4", "data=8,fsdp=1,tensor=8"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles what is missing and prints the tables.

    Attributes:
        only: Part of the name of the rows to compile; None is all.
        compile_none: Only print.
        output: Folder of the result files.
    """

    only: str | None = None
    compile_none: bool = False
    output: Path = DIRECTORY


def rows() -> Iterator[aot.Options]:
    """All rows."""
    for preset, topology, microbatch in TRAINING:
        arms: tuple[tuple[Literal["bswa", "fam"], bool], ...] = (("bswa", False), ("fam", False), ("fam", True))
        for memory, lime in arms:
            yield aot.Options(
                preset=preset,
                memory=memory,
                lime=lime,
                topology=topology,
                batch=BATCH,
                microbatch=microbatch,
                length=LENGTH,
            )
    for preset, topology, mesh in GENERATION:
        steps: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
        for what in steps:
            yield aot.Options(
                what=what,
                preset=preset,
                topology=topology,
                mesh=mesh,
                batch=16 if what == "prefill" else BATCH,
                length=LENGTH,
            )


def command(row: aot.Options, output: Path) -> list[str]:
    """The command that compiles a row."""
    words = [sys.executable, "-m", "experiments.aot", "--output", os.path.relpath(output)]
    words += ["--what", row.what, "--preset", row.preset, "--memory", row.memory, "--topology", row.topology]
    words += ["--mesh", row.mesh, "--batch", str(row.batch), "--length", str(row.length)]
    words += [] if row.microbatch is None else ["--microbatch", str(row.microbatch)]
    return words + (["--lime"] if row.lime else [])


def verdict(curve: dict, bswa: dict | None) -> str:
    """The gates that are missed, or "yes"."""
    peak, usable = curve["peak_gib"][0], curve["usable_gib"][0]
    missed = [] if peak <= PEAK * usable else [f"peak over {PEAK:.0%}"]
    if curve["fam_scan_moves"][0]:
        missed.append("the FAM scan moves arrays")
    if abs(curve["forward_flops"][0] / curve["forward_formula"][0] - 1) > FORMULA:
        missed.append("the forward count is not the formula's")
    if bswa is not None:
        for name, field, gate in (
            ("peak", "peak_gib", PEAK_RATIO),
            ("bytes", "collective_gb", BYTES_RATIO),
            ("operations", "flops", FLOPS_RATIO),
        ):
            if curve[field][0] > gate * bswa[field][0]:
                missed.append(f"{name} over {gate}")
    return ", ".join(missed) or "yes"


def training_table(found: Sequence[Result]) -> str:
    """Markdown of the training steps; ratios are to BSWA on the same chips at the same number of rows at once."""
    heading = ["model, chips", "rows at once", "peak, GiB", "of usable", "peak / BSWA", "collectives, GB", "/ BSWA"]
    heading += ["in FAM scan, MB", "moves", "PFLOP", "/ BSWA", "forward / formula"]
    heading += ["compiled in, s", "in bounds"]
    cells = [heading]
    curves = {_key(result): result.values["curves"][0] for result in found if _settings(result)["what"] == "train"}
    for (preset, topology, memory, lime, rows_at_once), curve in curves.items():
        bswa = None if memory == "bswa" else curves.get((preset, topology, "bswa", False, rows_at_once))

        def ratio(field: str, curve: dict = curve, bswa: dict | None = bswa) -> str:
            return "" if bswa is None else f"{curve[field][0] / bswa[field][0]:.3f}"

        name = {"fam": "FAM", "bswa": "BSWA", "full": "full"}[memory] + (" with LIMe" if lime else "")
        cells.append(
            [
                f"{preset} {name}, {topology}",
                str(rows_at_once),
                f"{curve['peak_gib'][0]:.2f}",
                f"{curve['peak_gib'][0] / curve['usable_gib'][0]:.0%}",
                ratio("peak_gib"),
                f"{curve['collective_gb'][0]:.1f}",
                ratio("collective_gb"),
                f"{curve['fam_scan_gb'][0] * 1000:.1f}",
                str(curve["fam_scan_moves"][0]),
                f"{curve['flops'][0] / 1e15:.2f}",
                ratio("flops"),
                f"{curve['forward_flops'][0] / curve['forward_formula'][0]:.4f}",
                f"{curve['compile_seconds'][0]:.0f}",
                verdict(curve, None if lime else bswa),  # what LIMe adds is not the FAM's
            ]
        )
    return report.markdown(cells)


def generation_table(found: Sequence[Result]) -> str:
    """Markdown of the steps of generation."""
    cells = [
        ["model, chips, mesh", "step", "rows", "peak, GiB", "of usable", "collectives, GB", "TFLOP", "compiled in, s"]
    ]
    for result in found:
        settings, curve = _settings(result), result.values["curves"][0]
        if settings["what"] == "train":
            continue
        cells.append(
            [
                f"{settings['preset']} FAM, {settings['topology']}, {settings['mesh']}",
                settings["what"],
                str(settings["batch"]),
                f"{curve['peak_gib'][0]:.2f}",
                f"{curve['peak_gib'][0] / curve['usable_gib'][0]:.0%}",
                f"{curve['collective_gb'][0]:.3f}",
                f"{curve['flops'][0] / 1e12:.2f}",
                f"{curve['compile_seconds'][0]:.0f}",
            ]
        )
    return report.markdown(cells)


def _settings(result: Result) -> dict:
    return result.config["aot"]


def _key(result: Result) -> tuple:
    settings = _settings(result)
    rows_at_once = settings["microbatch"] or settings["batch"]
    return settings["preset"], settings["topology"], settings["memory"], settings["lime"], rows_at_once


def read(output: Path) -> list[Result]:
    """The results that there are, in the order of the rows."""
    files = [output / f"{aot.result_name(row)}.json" for row in rows()]
    return [results.read(file) for file in files if file.exists()]


def page(text: str, found: Sequence[Result]) -> str:
    """The page with the tables of these results, each between its mark and the next heading or the end."""
    for mark, table in (("training", training_table(found)), ("generation", generation_table(found))):
        text, places = re.subn(rf"(<!-- {mark} -->\n).*?(?=\n## |\Z)", rf"\1\n{table}\n", text, flags=re.DOTALL)
        assert places == 1, mark
    return text


def main() -> int:
    """The command line; returns the exit code: 1 if a row could not be compiled."""
    options = tyro.cli(Options, prog="python -m experiments.aot_table", description=__doc__)
    failed = []
    for row in () if options.compile_none else rows():
        name = aot.result_name(row)
        if (options.output / f"{name}.json").exists() or (options.only or "") not in name:
            continue
        if row.topology.startswith("h100") and (reason := aot_gpu.missing()):
            print(f"skipped {name}: {reason}", flush=True)
            continue
        print(f"compiling {name}", flush=True)
        done = subprocess.run(command(row, options.output), capture_output=True, text=True)
        if done.returncode:
            print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
            failed.append(name)
    found = read(options.output)
    if options.output == DIRECTORY:
        PAGE.write_text(page(PAGE.read_text(), found))
    print(f"\n{training_table(found)}\n\n{generation_table(found)}")
    if failed:
        print(f"\nnot compiled: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)

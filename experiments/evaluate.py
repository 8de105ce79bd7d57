"""Evaluation of a trained model: `python -m experiments.evaluate --checkpoint DIR`.

`loss-by-position` is the loss of each token of whole validation documents by its place in the document, and the share
of tokens that are the most likely one: a memory that works lowers the loss far beyond the window. `passkey` is the
share of pass keys told right, by the length of the text; `pairs`, `tracking` and `babi` are the same for key-value
pairs, for the product of a group's generators, and for questions about facts in book text. `answers` is the share of
test questions answered right in free writing, by difficulty or, for several checkpoints of a run, by step. The
measures themselves are in `experiments.measures`.

Rows are spread over all devices. The same command on every process of a job evaluates on all of them, as in training.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments import data, distributed, report, results
from experiments.batches import prepare_together
from experiments.checkpoint import CheckpointError, load_model
from experiments.command import run_command
from experiments.config import TrainConfig, reading_mesh
from experiments.data import TextData
from experiments.data.babi import BabiData
from experiments.data.levels import LevelData
from experiments.data.passkey import PasskeyData
from experiments.data.questions import QuestionData
from experiments.distributed import Processes, check_same, is_main, on_main
from experiments.files import location, run_folder
from experiments.measures import answer_accuracy, check_positive, loss_by_position, recall_accuracy
from experiments.typed import to_json
from fam_jax import Decoder, MeshConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates a trained model; writes a result file and a plot.

    Attributes:
        checkpoint: Folder of a run, or one checkpoint in it.
        task: What to measure. None: what fits the model's training data.
        name: Name of the result. None: the run's name and the task.
        output: Folder of the result file and the plot. None: `results` in the run's folder.
        batch_size: Texts read side by side.
        chunk: For all but answers: tokens of a row per step.
        source: Text for loss-by-position instead of the run's own, named as in training.
        documents: For loss-by-position: at most so many validation documents. None: all.
        max_tokens: For loss-by-position: read at most so many tokens of each document. None: all.
        piece: For loss-by-position: cut documents into pieces of so many tokens, of which each is read by itself, as
            rows of packed training are. None: whole documents.
        lengths: For passkey, tracking and babi: lengths in blocks; for pairs: numbers of pairs. None: the trained ones,
            and 2, 4 and 14 times the longest.
        trials: For passkey, pairs, tracking and babi: samples per length.
        depth: For passkey: where the key stands. None: as in training, and uniform if that mixes both.
        zero_memory: For all but answers: measure also with the FAM set to zero after every block.
        reset_memory: For all but answers: measure also with the FAM set after every block to what it starts from.
        seed: For passkey, pairs, tracking and babi: of the samples.
        steps: For answers: the checkpoints of these steps of the run. None: the latest only.
        mesh: How the devices are used, as in training.
        distributed: Several processes, as in training.
    """

    checkpoint: Path
    task: Literal["loss-by-position", "passkey", "pairs", "tracking", "babi", "answers"] | None = None
    name: str | None = None
    output: Path | None = None
    batch_size: int = 16
    chunk: int = 512
    source: str | None = None
    documents: int | None = None
    max_tokens: int | None = None
    piece: int | None = None
    lengths: tuple[int, ...] | None = None
    trials: int = 500
    depth: Literal["uniform", "first"] | None = None
    zero_memory: bool = False
    reset_memory: bool = False
    seed: int = 0
    steps: tuple[int, ...] | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: Processes = dataclasses.field(default_factory=Processes)


_RECALL = {"chunk", "lengths", "trials", "zero_memory", "reset_memory", "seed"}
# Of the options, those that only some tasks read. One that is given to another would be ignored.
_READ_BY = {
    "loss-by-position": {"chunk", "source", "documents", "max_tokens", "piece", "zero_memory", "reset_memory"},
    "passkey": {"depth", *_RECALL},
    "pairs": _RECALL,
    "tracking": _RECALL,
    "babi": _RECALL,
    "answers": {"steps"},
}


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Evaluates as the options say, but for `distributed`: processes have been joined before, and all must call this.

    Returns:
        The result, its file and its plot, which the main process writes.

    Raises:
        ValueError: an option does not fit the model or is for another task, or the output folder cannot be made; see
            also the functions of `experiments.measures`.
        CheckpointError: see `load_model`.
        DistributedError: the processes of the job have other settings or other data.
    """
    mesh = reading_mesh(options.mesh)
    with jax.set_mesh(mesh):
        return _run(options, mesh)


def _run(options: Options, mesh: Mesh) -> tuple[results.Result, Path, Path]:
    start = time.perf_counter()
    check_same("settings", to_json(dataclasses.replace(options, distributed=Processes())))
    if options.name is not None:
        results.check_name(options.name)
    model, variables, config = load_model(options.checkpoint, mesh=mesh)
    _warn_rows(options, config, mesh)
    fits, trained_on = _fits(config)
    task: str = options.task or fits
    if task != fits:
        raise ValueError(
            f"task={task!r}, but the run {config.name!r} was trained on {trained_on}; use task={fits}, or another run"
        )
    _check_options(options, task, f"the run {config.name!r} was trained on {trained_on}")
    # What is measured for minutes must have a place to go to.
    folder = options.output or run_folder(options.checkpoint) / "results"
    output = location(on_main(lambda: str(results.make_directory(folder)), (ValueError, OSError)))
    if isinstance(config.data, LevelData):
        values, manifest, seeds = _recall(options, model, variables, config)
    elif task == "loss-by-position":
        values, manifest, seeds = _documents(options, model, variables, config)
    elif options.steps is None:
        values, manifest, seeds = _answers(options, model, variables, config)
    else:
        task = "answers-by-step"
        values, manifest, seeds = _answers_by_step(options, options.steps, config, mesh)
    settings = dataclasses.asdict(options)
    for name in ("output", "mesh", "distributed"):
        del settings[name]  # they shape no number, and tell of this machine
    result = results.make(
        task,
        options.name or f"{config.name}-{task}",
        config={"train": to_json(config), "evaluate": settings},
        seeds=seeds,
        values=values,
        wall_seconds=time.perf_counter() - start,
        data=manifest,
    )

    def write() -> list[str]:
        file = results.write(result, output)
        return [str(file), str(report.plot(result, file.with_suffix(".png")))]

    file, figure = on_main(write, (ValueError, OSError))
    return result, location(file), location(figure)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.evaluate", description=Options.__doc__)

    def measure() -> int:
        result, file, figure = run(options)
        if is_main():
            print(report.table(result))
            print(f"\nwrote {file} and {figure}")
        return 0

    return distributed.run_joined(options.distributed, measure, (CheckpointError,))


def _controls(options: Options) -> tuple[str | None, ...]:
    """Without a control, and with those that are asked for."""
    return (None, *["zeroed"] * options.zero_memory, *["reset"] * options.reset_memory)


def _warn_rows(options: Options, config: TrainConfig, mesh: Mesh) -> None:
    """Says so if devices do the same work."""
    rows = math.prod(mesh.shape[axis] for axis in config.model.sharding.batch)
    if options.batch_size % rows and is_main():
        print(
            f"WARNING: batch_size={options.batch_size} is not a multiple of the {rows} devices that rows are spread "
            "over, so that some do the same work",
            file=sys.stderr,
        )


def _fits(config: TrainConfig) -> tuple[str, str]:
    """The task that fits what a run was trained on, and what that is called."""
    if isinstance(config.data, LevelData):
        return config.data.kind, f"the {config.data.title} task"
    return ("loss-by-position", "text") if isinstance(config.data, TextData) else ("answers", "questions")


def _check_options(options: Options, task: str, trained: str) -> None:
    """Raises a ValueError for an option that is for other tasks."""
    for field in dataclasses.fields(Options):
        tasks = [name for name, read in _READ_BY.items() if field.name in read]
        value = getattr(options, field.name)
        if tasks and task not in tasks and value != field.default:
            raise ValueError(
                f"{field.name}={value!r} is for task={' and task='.join(tasks)}, but {trained}, which task={task} "
                "measures; leave it out, or give another run"
            )


def _answers(options: Options, model: Decoder, variables: Any, config: TrainConfig) -> tuple[Any, Any, list[int]]:
    """Values, data manifest and seeds of the answers of a checkpoint."""
    assert isinstance(config.data, QuestionData)
    curve = answer_accuracy(model, variables, config.data.task(), batch_size=options.batch_size)
    return {"curves": [{"label": config.name, "seed": config.seed, **curve}]}, None, [config.seed]


def _answers_by_step(
    options: Options, steps: tuple[int, ...], config: TrainConfig, mesh: Mesh
) -> tuple[Any, Any, list[int]]:
    """Values, data manifest and seeds of the answers of several checkpoints of a run, a curve per level."""
    if not steps or (location(options.checkpoint) / "meta.json").exists():
        raise ValueError(
            f"steps={steps} picks checkpoints of a run, but checkpoint={str(options.checkpoint)!r} is one of them, or "
            "no step is given; give the folder of the run and at least one step"
        )
    assert isinstance(config.data, QuestionData)
    names = ("accuracy", "correct", "trials")
    curves: dict[int, dict[str, Any]] = {}
    for step in steps:
        model, variables, _ = load_model(options.checkpoint, step, mesh)
        measured = answer_accuracy(model, variables, config.data.task(), batch_size=options.batch_size)
        for place, level in enumerate(measured["level"]):
            empty = {"label": f"{config.name}, level {level}", "seed": config.seed}
            curve = curves.setdefault(level, empty | {name: [] for name in ("step", *names)})
            curve["step"].append(step)
            for name in names:
                curve[name].append(measured[name][place])
    return {"curves": list(curves.values())}, None, [config.seed]


def _recall(options: Options, model: Decoder, variables: Any, config: TrainConfig) -> tuple[Any, Any, list[int]]:
    """Values, data manifest and seeds of a checkpoint's result in a task with levels."""
    settings, manifest, more = config.data, None, {}
    assert isinstance(settings, LevelData)
    if isinstance(settings, PasskeyData):
        trained = "uniform" if settings.depth == "mixed" else settings.depth
        settings = dataclasses.replace(settings, depth=options.depth or trained)
        more = {"depth": settings.depth}
    if isinstance(settings, BabiData):
        prepare_together(settings)
        manifest = data.manifest(settings.text)
        check_same("data", manifest)
    hardest = settings.levels[-1]
    beyond = (level for level in (2 * hardest, 4 * hardest, 14 * hardest) if _possible(settings, level))
    levels = options.lengths or (*settings.levels, *beyond)
    curves = []
    for part, measured in settings.parts().items():
        for control in _controls(options):
            curve = recall_accuracy(
                model,
                variables,
                measured.task("validation"),
                levels,
                trials=options.trials,
                batch_size=options.batch_size,
                seed=options.seed,
                control=control,
                chunk=options.chunk,
            )
            label = f"{config.name}{part}, memory {control}" if control else f"{config.name}{part}"
            curves.append({"label": label, "seed": config.seed, **more, **curve})
    marks = [{"x": hardest, "label": "longest trained" if settings.counted == "blocks" else "most trained"}]
    return {"curves": curves, "marks": marks}, manifest, [config.seed, options.seed]


def _possible(settings: LevelData, level: int) -> bool:
    """Whether a task has a level."""
    try:
        settings.check_levels((level,))
    except ValueError:
        return False
    return True


def _documents(options: Options, model: Decoder, variables: Any, config: TrainConfig) -> tuple[Any, Any, list[int]]:
    """Values, data manifest and seeds of the loss by position of a checkpoint."""
    settings = config.data
    assert isinstance(settings, TextData)
    if options.source is not None:
        settings = dataclasses.replace(settings, source=options.source)
    if settings.weighted:
        raise ValueError(
            f"source={settings.source!r} is examples, of which the answers alone count; loss-by-position is of whole "
            "texts: give one with --source, such as python-source or text:GLOB"
        )
    check_positive(documents=options.documents, max_tokens=options.max_tokens, piece=options.piece)
    prepare_together(settings)
    manifest = data.manifest(settings)
    check_same("data", manifest)
    found = data.documents(settings, "validation")
    chosen = [found[i] for i in range(min(len(found), options.documents or len(found)))]
    texts = [document.tokens[: options.max_tokens] for document in chosen]
    starts = [range(0, max(1, len(text)), options.piece or max(1, len(text))) for text in texts]
    pieces = [text[start : start + one.step] for text, one in zip(texts, starts, strict=True) for start in one]
    curves = []
    for control in _controls(options):
        curve = loss_by_position(
            model,
            variables,
            pieces,
            batch_size=options.batch_size,
            chunk=options.chunk,
            control=control,
        )
        label = f"{config.name}, memory {control}" if control else config.name
        curve |= _by_document(curve, [len(one) for one in starts])
        curves.append({"label": label, "seed": config.seed, **curve, "documents": [one.name for one in chosen]})
    return {"curves": curves}, manifest, [config.seed]


def _by_document(curve: dict[str, Any], pieces: list[int]) -> dict[str, Any]:
    """A curve's means over each document, of which it has those over each of its pieces."""
    first = np.cumsum([0, *pieces[:-1]])
    tokens = np.asarray(curve["document_tokens"])
    whole = np.add.reduceat(tokens, first)
    told = {"document_tokens": whole.tolist()}
    for name in ("document_loss", "document_accuracy"):
        total = np.add.reduceat(np.where(tokens > 0, np.asarray(curve[name]) * tokens, 0.0), first)
        told[name] = [float(part / count) if count else math.nan for part, count in zip(total, whole, strict=True)]
    return told


if __name__ == "__main__":
    run_command(main)

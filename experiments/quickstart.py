"""The whole thing in under ten minutes on two CPU cores: `python -m experiments.quickstart`.

1. Trains a FAM model and a window-only model (BSWA) of the same size on PassKey, a three-digit key before growing
   lengths of filler, and asks both for keys far beyond the window and the trained length; with the FAM zeroed at
   every block as a control.
2. Trains a small FAM language model on the Python source code that every machine has, measures its loss by the
   position in the document, and lets it continue a real file.
3. Prints one table and writes figures and result files.

Started again, it goes on where it was stopped. What it prints is what it measured, good or bad.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments import configs, data, report, results
from experiments.checkpoint import CheckpointError
from experiments.command import run_command
from experiments.config import TrainConfig
from experiments.conversation import continue_text
from experiments.data.passkey import PasskeyData
from experiments.measures import loss_by_position, recall_accuracy
from experiments.process import BusyError, Stopped
from experiments.train import NonFiniteError, TrainResult, train
from experiments.typed import to_json

PROMPT_TOKENS = 4096  # of the file that the language model continues
READ_TOKENS = 65_536  # of each validation document


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains and measures small FAM models on this machine.

    Attributes:
        work_dir: Where checkpoints, figures and result files go. None: runs/quickstart.
        smoke: A few steps of everything, to see that it works; the numbers mean nothing.
        fresh: Start anew; earlier runs are moved aside, not deleted.
    """

    work_dir: Path | None = None
    smoke: bool = False
    fresh: bool = False

    @property
    def directory(self) -> Path:
        """Where the files go."""
        return self.work_dir or Path("runs") / ("quickstart-smoke" if self.smoke else "quickstart")


@dataclasses.dataclass(frozen=True)
class Part:
    """A model to train: its settings, and the seconds after which training stops."""

    config: TrainConfig
    seconds: float


def parts(options: Options) -> dict[str, Part]:
    """The three models, by the label that tables give them."""
    fam, bswa, text = (configs.get(name) for name in ("passkey", "passkey_bswa", "lm"))
    blocks: tuple[int, ...] = (4,) if options.smoke else (4, 6, 12)
    steps = 4 if options.smoke else 1500

    def passkey(config: TrainConfig) -> TrainConfig:
        assert isinstance(config.data, PasskeyData)
        # Three digits at a place that is always the same are learnt in a minute; `passkey` itself is harder.
        task = dataclasses.replace(config.data, blocks=blocks, digits=3, depth="first")
        return dataclasses.replace(config, data=task, steps=steps, checkpoint_every=200)

    # A language model learns more in a short time from short rows and many updates.
    assert isinstance(text.data, data.TextData)
    rows = dataclasses.replace(text.data, length=512, batch_size=8)
    text = dataclasses.replace(text, data=rows, steps=4 if options.smoke else 600, eval_every=0, checkpoint_every=200)
    made = {"FAM": Part(passkey(fam), 200), "window only": Part(passkey(bswa), 60), "FAM, text": Part(text, 180)}
    return {label: dataclasses.replace(part, config=_settle(options, part.config)) for label, part in made.items()}


def _settle(options: Options, config: TrainConfig) -> TrainConfig:
    """The config with its folder, and a warm-up that fits a smoke run."""
    optim = dataclasses.replace(config.optim, warmup_steps=1) if options.smoke else config.optim
    return dataclasses.replace(config, optim=optim, work_dir=str(options.directory / config.name))


def limited(part: Part, fresh: bool) -> TrainResult:
    """Trains until the steps or the seconds are over, and says so if it is the seconds.

    Raises:
        Stopped: A signal came. What was trained is saved.
    """
    start = time.monotonic()

    def too_long(step: int, metrics: Any, state: Any) -> bool:
        return time.monotonic() - start > part.seconds

    result = train(part.config, callback=too_long, fresh=fresh)
    if result.stopped == "callback":
        print(f"{part.config.name}: time is up after {result.step:,} of {part.config.steps:,} steps")
    elif result.stopped:
        raise Stopped(result.stopped)
    return result


def measure_passkey(options: Options, models: dict[str, Part]) -> results.Result:
    """Trains both PassKey models and measures them by length."""
    start = time.perf_counter()
    trained = {label: limited(part, options.fresh) for label, part in models.items()}
    settings = trained["FAM"].config.data
    assert isinstance(settings, PasskeyData)
    longest = settings.blocks[-1]
    lengths = [longest * times for times in ((1, 2) if options.smoke else (1, 4, 14))]
    curves = []
    for label, result in trained.items():
        for control in (None, "zeroed") if result.config.model.fam_length else (None,):
            curve = recall_accuracy(
                result.model,
                result.variables,
                settings.task("validation"),
                lengths,
                trials=10 if options.smoke else 200,
                batch_size=10 if options.smoke else 50,
                control=control,
            )
            name = f"{label}, memory zeroed" if control else label
            curves.append({"label": name, "seed": result.config.seed, "steps": result.step, **curve})
    return results.make(
        "passkey",
        "quickstart-passkey",
        config={label: to_json(part.config) for label, part in models.items()},
        seeds=[trained["FAM"].config.seed],
        values={"curves": curves, "marks": [{"x": longest, "label": "longest trained"}]},
        wall_seconds=time.perf_counter() - start,
    )


def measure_text(options: Options, label: str, part: Part) -> tuple[results.Result, str]:
    """Trains the language model, measures its loss by position, and continues a validation document."""
    start = time.perf_counter()
    settings = part.config.data
    assert isinstance(settings, data.TextData)
    result = limited(part, options.fresh)
    found = data.documents(settings, "validation")
    size = 2048 if options.smoke else READ_TOKENS
    chosen = [found[index] for index in range(min(len(found), 2 if options.smoke else 8))]
    texts = [document.tokens[:size] for document in chosen]
    curve = loss_by_position(result.model, result.variables, texts, batch_size=8)
    tokenizer = data.load_tokenizer(settings.tokenizer)
    prompt = tokenizer.decode(texts[0][:PROMPT_TOKENS])
    answer = continue_text(
        result.model,
        result.variables,
        tokenizer,
        [prompt],
        20 if options.smoke else 300,
        temperature=0.7,
        top_p=0.9,
        key=jax.random.key(0),
    )
    sample = {"document": chosen[0].name, "prompt_tokens": answer.prompt_tokens, "text": answer.text}
    made = results.make(
        "loss-by-position",
        "quickstart-text",
        config=to_json(part.config),
        seeds=[part.config.seed],
        values={
            "curves": [{"label": label, "seed": part.config.seed, "steps": result.step, **curve}],
            "sample": sample,
        },
        wall_seconds=time.perf_counter() - start,
        data=data.manifest(settings),
    )
    shown = f"--- the end of what it read of {chosen[0].name}:\n{prompt[-300:]}\n--- it goes on:\n{answer.text}\n---"
    return made, shown


def summary(passkey: results.Result, text: results.Result) -> str:
    """The one table at the end, in Markdown: what was measured, of which model, and the number."""
    rows = [("measure", "model", "value")]
    for curve in passkey.values["curves"]:
        for blocks, accuracy, trials in zip(curve["blocks"], curve["accuracy"], curve["trials"], strict=True):
            rows.append((f"PassKey exact match, {blocks} blocks, {trials} trials", curve["label"], f"{accuracy:.3f}"))
    for curve in text.values["curves"]:
        lower = 1
        for position, loss in zip(curve["position"], curve["loss"], strict=True):
            if loss is not None:
                rows.append(
                    (f"nats per byte, bytes {lower:,} to {position:,} of a document", curve["label"], f"{loss:.3f}")
                )
            lower = position + 1
    return report.markdown(rows)


def keep(result: results.Result, directory: Path) -> list[Path]:
    """Writes a result file and its figure."""
    file = results.write(result, directory)
    return [file, report.plot(result, file.with_suffix(".png"))]


def run(options: Options, say: Callable[[str], None] = print) -> str:
    """Does it all. Returns the table.

    Raises:
        Stopped: a signal came.
        DataError, CheckpointError, ValueError: as in `experiments.train.train`.
    """
    start = time.monotonic()
    models = parts(options)
    say("1. PassKey: a number is read, much later it is asked for.")
    passkey = measure_passkey(options, {label: models[label] for label in ("FAM", "window only")})
    files = keep(passkey, options.directory)
    say(f"\n{report.table(passkey)}\n\nafter {time.monotonic() - start:.0f} s\n")
    say("2. Text: the Python source code on this machine, byte by byte.")
    text, sample = measure_text(options, "FAM, text", models["FAM, text"])
    files += keep(text, options.directory)
    say(f"\n{sample}\n")
    table = summary(passkey, text)
    say(f"{table}\n\nfigures and result files, after {time.monotonic() - start:.0f} s:")
    for file in files:
        say(f"  {file}")
    say(
        "\nnext:\n"
        f"  python -m experiments.generate --checkpoint {options.directory / 'lm'} --prompt-file README.md\n"
        "  python -m experiments.train --config lm        # longer, with evaluation; then experiments.evaluate\n"
        "  python -m experiments.train --config passkey   # a five-digit key anywhere in the text"
    )
    return table


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.quickstart", description=__doc__)
    try:
        run(options)
    except Stopped as stopped:
        print("to continue, give the same command again")
        return stopped.status
    except (ValueError, CheckpointError, NonFiniteError, BusyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)

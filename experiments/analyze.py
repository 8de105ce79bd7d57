"""Analysis of a trained model: `python -m experiments.analyze --checkpoint DIR --what entropy`.

Of a FAM, `attention` is how much tokens read of it and its rows of each block, `attention-layers` the same by layer,
and how few tokens rows pick, `fam-drift` its size and change from block to block, and `fam-rows` which of its rows hold
a pass key: by attention, and by exchanging rows between texts (`experiments.memory_maps`).

`entropy` is the matrix Renyi entropy of hidden states and values by layer, `probes` how well linear probes tell tokens
apart by them; both work on any model. Those that mix layers by LIMe have routers: `routers` is the heat map of what
each layer reads of earlier ones, `depth-circuits` its summary, `semantic-circuits` lists the tokens that make a router
which reads the token turn to a source, and `pruning` is the loss with the smallest weights of static routers cut.
The analyses themselves are in `lime_jax.analysis`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments import memory_maps, report, results
from experiments.checkpoint import CheckpointError, load_model
from experiments.command import run_command
from experiments.data.passkey import PasskeyData
from experiments.files import run_folder
from experiments.layers import Texts, collect, examples, loss_on, texts, tokenizer_of, word
from experiments.measures import check_positive
from experiments.typed import to_json
from lime_jax import LimeConfig, analysis, make_mixer
from lime_jax.mixer import shape_of


@dataclasses.dataclass(frozen=True)
class Options:
    """Analyses a trained model on texts of the kind that it was trained on; writes a result file and a plot.

    Attributes:
        checkpoint: Folder of a run, or one checkpoint in it.
        what: The analysis.
        name: Name of the result. None: the run's name and the analysis.
        output: Folder of the result file and the plot. None: `results` in the run's folder.
        source: For models of text: text instead of the run's own validation split, named as in training.
        sequences: Texts to read, each from its beginning; at most, if there are fewer.
        length: For models of text: tokens of each.
        level: For tasks with levels, such as PassKey: of the samples. None: the hardest trained.
        batch_size: Texts read side by side.
        order: For entropy: of the Renyi entropy; 1 is Shannon's.
        words: For probes: the words to tell apart, by the state at their last token. None: the most frequent tokens.
        classes: For probes without words: how many of the most frequent tokens.
        examples: For probes: at most so many of each word, all of them as often as the rarest.
        folds: For probes: of the cross-validation.
        per_head: For routers: a row for each head too.
        circuits: For depth and semantic circuits: how many of the strongest to name.
        top: For semantic circuits: tokens to list for each.
        p: For pruning: shares of each head's absolute weight to keep.
        seed: Of the samples of tasks with levels, such as PassKey, and of what probes pick and how they divide it.
    """

    checkpoint: Path
    what: Literal[
        "attention",
        "attention-layers",
        "fam-drift",
        "fam-rows",
        "entropy",
        "probes",
        "routers",
        "depth-circuits",
        "semantic-circuits",
        "pruning",
    ]
    name: str | None = None
    output: Path | None = None
    source: str | None = None
    sequences: int = 64
    length: int = 256
    level: int | None = None
    batch_size: int = 16
    order: float = 0.99
    words: tuple[str, ...] | None = None
    classes: int = 4
    examples: int = 500
    folds: int = 5
    per_head: bool = False
    circuits: int = 20
    top: int = 10
    p: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
    seed: int = 0


class _Run:
    """A loaded model.

    Attributes:
        options: What was asked for.
        config: The run's.
        model: The decoder.
        params: Its parameters.
        mixer: Its layer mixer.
        router: Of the parameters, those of the mixer by layer.
        manifest: What the data is made of; None if none was read or it is synthetic.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, variables, self.config = load_model(options.checkpoint)
        self.params: dict[str, Any] = variables["params"]
        self.mixer = make_mixer(self.model.config.mixing, shape_of(self.model.config))
        self.router: dict[str, Any] = self.params.get("mixing", {}).get("layers", {})
        self.manifest: dict[str, Any] | None = None

    @functools.cached_property
    def texts(self) -> Texts:
        """The texts, read when something asks for them."""
        o = self.options
        read = texts(self.config, o.sequences, length=o.length, source=o.source, seed=o.seed, level=o.level)
        self.manifest = read.manifest
        return read

    @functools.cached_property
    def whole_blocks(self) -> np.ndarray:
        """The texts that are as long as asked for, cut to whole blocks: int32 [b, t]."""
        memory = self.model.config.memory
        assert memory is not None
        time = self.texts.ids.shape[1] // memory.block_size * memory.block_size
        whole = self.texts.lengths >= max(time, 1)
        if not time or not whole.any():
            raise ValueError(
                f"length={self.options.length}: no text is that long and has a block of {memory.block_size} tokens; "
                "give another length or source"
            )
        return self.texts.ids[whole, :time]

    @functools.cached_property
    def reading(self) -> memory_maps.Reading:
        """Who reads what in these texts."""
        return memory_maps.read(self.model, self.params, self.whole_blocks, self.options.batch_size)

    def curve(self, label: str, **values: Any) -> dict[str, Any]:
        """A curve of a result, whose label is the run's name and what it is."""
        name = f"{self.config.name}, {label}" if label else self.config.name
        return {"label": name, "seed": self.config.seed, **values}

    def curves(self, values: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Curves of a result, by what each is."""
        return [self.curve(label, **lists) for label, lists in values.items()]


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Analyses as the options say.

    Returns:
        The result, its file and its plot.

    Raises:
        ValueError: an option does not fit the model, the model has no router, or the output folder cannot be made; see
            also `lime_jax.analysis`.
        CheckpointError: see `load_model`.
    """
    start = time.perf_counter()
    if options.name is not None:
        results.check_name(options.name)
    check_positive(
        sequences=options.sequences,
        length=options.length,
        level=options.level,
        batch_size=options.batch_size,
        examples=options.examples,
        circuits=options.circuits,
        top=options.top,
    )
    loaded = _Run(options)
    memory = loaded.model.config.memory
    if options.what in _OF_FAM and (memory is None or memory.kind != "fam" or not memory.fam_length):
        raise ValueError(
            f"what={options.what!r} needs a FAM, but the run {loaded.config.name!r} has none (model.memory is "
            f"{memory!r}); give a run whose model.memory is of kind 'fam' with fam_length above 0"
        )
    if options.what == "fam-rows" and not isinstance(loaded.config.data, PasskeyData):
        raise ValueError(
            f"what='fam-rows' looks for a pass key, but the run {loaded.config.name!r} was trained on "
            f"{type(loaded.config.data).__name__}; give a run that was trained on PasskeyData"
        )
    if options.what in _OF_ROUTERS and not isinstance(loaded.model.config.mixing, LimeConfig):
        raise ValueError(
            f"what={options.what!r} needs a router, but the run {loaded.config.name!r} has none (model.mixing is "
            f"{loaded.model.config.mixing!r}); give a run whose model.mixing is a LimeConfig, or "
            "use what=entropy or what=probes"
        )
    # What is measured for minutes must have a place to go to.
    output = results.make_directory(options.output or run_folder(options.checkpoint) / "results")
    values = _ANALYSES[options.what](loaded)
    settings = dataclasses.asdict(options)
    del settings["output"]  # shapes no number, and names a folder of this machine
    result = results.make(
        options.what,
        options.name or f"{loaded.config.name}-{options.what}",
        config={"train": to_json(loaded.config), "analyze": settings},
        seeds=[loaded.config.seed, options.seed],
        values=values,
        wall_seconds=time.perf_counter() - start,
        data=loaded.manifest,
    )
    file = results.write(result, output)
    return result, file, report.plot(result, file.with_suffix(".png"))


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.analyze", description=Options.__doc__)
    try:
        result, file, figure = run(options)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.table(result))
    for note in result.values.get("notes", []):
        print(note)
    print(f"\nwrote {file} and {figure}")
    return 0


def _reading(curves: Callable[[memory_maps.Reading], dict[str, dict[str, Any]]]) -> Callable[[_Run], dict[str, Any]]:
    """The analysis of a FAM whose values are these curves."""
    return lambda run: {"curves": run.curves(curves(run.reading)), "texts": len(run.whole_blocks)}


def _fam_rows(run: _Run) -> dict[str, Any]:
    """Values of which FAM rows hold a pass key."""
    read = run.texts
    exchange = memory_maps.exchange_rows(run.model, {"params": run.params}, read.ids, read.targets, read.weights)
    told = memory_maps.told_places(read.ids, read.targets, read.weights)
    curves = run.curves(memory_maps.row_curves(run.reading, told, read.weights > 0, exchange))
    own, other = exchange.all_own.mean(), exchange.all_other.mean()
    note = f"with all rows of another text {own:.3f} of the digits are right, {other:.3f} those of the other text"
    return {"curves": curves, "exchange": exchange._asdict(), "texts": len(read.ids), "notes": [note]}


def _entropy(run: _Run) -> dict[str, Any]:
    """Values of the entropy of a model's states by layer; layer 0 are the embeddings."""
    read = run.texts
    curves = []
    for name, first, states in collect(run.model, run.params, read, run.options.batch_size):
        entropy = analysis.layer_entropy(states, read.lengths, run.options.order)
        layers = range(first, first + len(states))
        curves.append(run.curve(name, layer=list(layers), entropy=entropy.mean, std=entropy.std))
    return {"curves": curves, "tokens": read.lengths.sum()}


def _probes(run: _Run) -> dict[str, Any]:
    """Values of the accuracy of linear probes by layer."""
    o = run.options
    read = run.texts
    found = examples(read, o.words, classes=o.classes, most=o.examples, folds=o.folds, seed=o.seed)
    curves = []
    for name, first, states in collect(run.model, run.params, read, o.batch_size, found.rows, found.columns):
        measured = analysis.separability(states, found.labels, folds=o.folds, seed=o.seed)
        layers = list(range(first, first + len(states)))
        curves.append(run.curve(name, layer=layers, accuracy=measured.mean, folds=measured.folds))
    layers = curves[0]["layer"]
    guessed = [1 / len(found.names)] * len(layers)
    curves.append({"label": "chance", "seed": run.config.seed, "layer": layers, "accuracy": guessed})
    each = len(found.labels) // len(found.names)
    return {"curves": curves, "words": found.names, "notes": [f"{each} of each: {', '.join(found.names)}"]}


def _weights(run: _Run) -> analysis.RouterWeights:
    """The weights of the routers; those that depend on the token are averaged over the texts."""
    if not analysis.is_dynamic(run.mixer):
        return analysis.router_weights(run.mixer, run.router)
    rows, columns = np.nonzero(np.arange(run.texts.ids.shape[1]) < run.texts.lengths[:, None])
    held = {
        name: states
        for name, _, states in collect(
            run.model, run.params, run.texts, run.options.batch_size, rows, columns, ("hidden", "ff_inputs")
        )
    }
    return analysis.router_weights(
        run.mixer,
        run.router,
        held["hidden states"][:-1],
        norm=run.params["layers"]["attn_norm"],
        ff_inputs=held.get("feed-forward inputs"),
    )


def _routers(run: _Run) -> dict[str, Any]:
    """Values of the heat map: a row for each layer, and if asked for each head."""
    weights = _weights(run)
    heat = analysis.heat_map(run.mixer, weights)
    curves = []
    for layer in range(len(heat.layers)):
        sources = list(range(1, layer + 2))
        curves.append(run.curve(f"layer {layer + 1}", source=sources, share=heat.layers[layer, : layer + 1]))
        if run.options.per_head:
            for name, share in zip(heat.names, heat.heads[layer], strict=True):
                curves.append(run.curve(f"layer {layer + 1}, {name}", source=sources, share=share[: layer + 1]))
    return {"curves": curves, "weights": weights.mean, "axes": ["layer", "view", "head", "slot", "source head"]}


def _depth_circuits(run: _Run) -> dict[str, Any]:
    """Values of the depth circuits: what each layer reads, and how much of it is read later."""
    heat = analysis.heat_map(run.mixer, _weights(run))
    found = analysis.depth_circuits(heat, run.options.circuits)
    layers = list(range(1, len(found.own) + 1))
    shares = {
        "read of the own layer": found.own,
        "of the previous layer": found.previous,
        "of earlier layers": found.earlier,
        "retrieved by later layers": found.retrieved[:-1],
    }
    curves = [run.curve(label, layer=layers[: len(share)], share=share) for label, share in shares.items()]
    notes = [
        f"layer {edge.layer}, {edge.name} <- layer {edge.source}: {edge.share:.3f} of what it reads"
        for edge in found.edges
    ]
    edges = [edge._asdict() for edge in found.edges]
    return {"curves": curves, "distance": found.distance, "edges": edges, "notes": notes}


def _semantic_circuits(run: _Run) -> dict[str, Any]:
    """Values of the semantic circuits: the tokens of the strongest of them."""
    tokenizer = tokenizer_of(run.config)
    words = run.params["embed"] if run.model.config.tie_embeddings else run.params["unembed"].T
    found = analysis.semantic_circuits(
        run.mixer,
        run.router,
        words[: tokenizer.vocab_size] / run.params["final_norm"],
        norm=run.params["layers"]["attn_norm"],
        top=run.options.top,
    )
    curves = []
    for index in found.strongest(run.options.circuits):
        tokens = [int(token) for token in found.tokens[index]]
        curves.append(
            run.curve(
                found.name(*index),
                rank=list(range(1, len(tokens) + 1)),
                weight=found.weights[index],
                token=[word(tokenizer, token) for token in tokens],
                id=tokens,
                mean=found.mean[index],
            )
        )
    if not curves:
        raise ValueError("no token changes what the routers read, so there is nothing to list; train the model first")
    return {"curves": curves}


def _pruning(run: _Run) -> dict[str, Any]:
    """Values of the pruning curve: the loss with smaller and smaller shares of the weights kept."""
    if not run.options.p:
        raise ValueError("p names no share to keep; give at least one")

    loss = loss_on(run.model, run.texts, run.options.batch_size)

    def measure(router: dict[str, Any]) -> float:
        return loss({**run.params, "mixing": {**run.params["mixing"], "layers": router}})

    found = analysis.pruning_curve(run.mixer, run.router, measure, run.options.p)
    by_layer = [report.layers for report in found.reports]
    curve = run.curve("", p=found.p, loss=found.value, cut=found.cut, cut_by_layer_and_source=by_layer)
    return {"curves": [curve], "notes": [str(report) for report in found.reports]}


_OF_FAM = ("attention", "attention-layers", "fam-drift", "fam-rows")
_OF_ROUTERS = ("routers", "depth-circuits", "semantic-circuits", "pruning")
_ANALYSES = {
    "attention": _reading(memory_maps.share_curves),
    "attention-layers": _reading(memory_maps.layer_curves),
    "fam-drift": _reading(memory_maps.drift_curves),
    "fam-rows": _fam_rows,
    "entropy": _entropy,
    "probes": _probes,
    "routers": _routers,
    "depth-circuits": _depth_circuits,
    "semantic-circuits": _semantic_circuits,
    "pruning": _pruning,
}


if __name__ == "__main__":
    run_command(main)

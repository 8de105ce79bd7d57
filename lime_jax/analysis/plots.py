"""Plots of the analyses on Matplotlib axes that the caller makes; nothing here needs Matplotlib itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lime_jax.analysis.circuits import DepthCircuits, SemanticCircuits
from lime_jax.analysis.entropy import Entropy
from lime_jax.analysis.probes import Separability
from lime_jax.analysis.pruning import PruningCurve
from lime_jax.analysis.weights import HeatMap


def plot_matrix(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    axes: Any,
    texts: Sequence[Sequence[str]] | None = None,
) -> Any:
    """A table as colours, NaN left blank; returns the image, for a colour bar.

    Args:
        values: [row, column].
        rows: Names of the rows; at most 32 are written.
        columns: Names of the columns; at most 32 are written.
        axes: To draw on.
        texts: What to write into the cells.
    """
    values = np.asarray(values, float)
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis", interpolation="none")
    for set_ticks, names in ((axes.set_yticks, rows), (axes.set_xticks, columns)):
        places = np.unique(np.linspace(0, len(names) - 1, min(len(names), 32)).round().astype(int))
        set_ticks(places, [names[place] for place in places], fontsize=7)
    for row, line in enumerate(texts or []):
        for column, text in enumerate(line):
            dark = np.isnan(values[row, column]) or image.norm(values[row, column]) < 0.6
            color = "white" if dark else "black"
            # Words of a vocabulary are no formulas.
            axes.text(
                column, row, text, ha="center", va="center", fontsize=6, color=color, parse_math=False, clip_on=True
            )
    return image


def plot_entropy(curves: Mapping[str, Entropy], axes: Any) -> None:
    """Entropy by layer, a line with the spread over texts for each of several states or models."""
    _plot_layers({name: (curve.mean, curve.std) for name, curve in curves.items()}, axes)
    axes.set(xlabel="layer", ylabel="matrix Renyi entropy in nats")


def plot_separability(curves: Mapping[str, Separability], axes: Any) -> None:
    """Probe accuracy by layer, a line with the spread over folds for each of several states or models."""
    _plot_layers({name: (curve.mean, curve.std) for name, curve in curves.items()}, axes)
    for chance in {curve.chance for curve in curves.values()}:
        axes.axhline(chance, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="layer", ylabel="accuracy of linear probes")


def plot_heat_map(heat: HeatMap, axes: Any, circuit: int | None = None) -> Any:
    """What each layer reads of each source; returns the image.

    Args:
        heat: From `heat_map`.
        axes: To draw on.
        circuit: Number of a view and head in `heat.names`. None: their mean.
    """
    table = heat.layers if circuit is None else heat.heads[:, circuit]
    names = [str(number) for number in range(1, len(table) + 1)]
    image = plot_matrix(np.where(np.tri(len(table)) > 0, table, np.nan), names, names, axes)
    axes.set(xlabel="source layer", ylabel="reading layer", title="" if circuit is None else heat.names[circuit])
    return image


def plot_depth_circuits(circuits: DepthCircuits, axes: Any) -> None:
    """The strongest connections as arcs from the source layer to the reading layer, as wide as they are strong."""
    layers = len(circuits.own)
    strongest = max((edge.share for edge in circuits.edges), default=1.0)
    angles = np.linspace(0, np.pi, 50)
    for edge in circuits.edges:
        middle, radius = (edge.source + edge.layer) / 2, (edge.layer - edge.source) / 2
        width = 4 * edge.share / strongest
        axes.plot(middle - radius * np.cos(angles), radius * np.sin(angles), color="C0", alpha=0.5, linewidth=width)
    axes.plot(np.arange(1, layers + 1), np.zeros(layers), "o", color="black")
    axes.set(xlabel="layer", yticks=[], title="strongest connections")


def plot_semantic_circuits(
    circuits: SemanticCircuits, axes: Any, word: Callable[[int], str] = str, count: int = 12
) -> Any:
    """The tokens of the strongest circuits, coloured by weight; returns the image.

    Args:
        circuits: From `semantic_circuits`.
        axes: To draw on.
        word: What to call a token.
        count: Circuits to show.
    """
    chosen = circuits.strongest(count)
    values = [circuits.weights[index] for index in chosen]
    texts = [[word(int(token)) for token in circuits.tokens[index]] for index in chosen]
    ranks = [str(rank) for rank in range(1, circuits.tokens.shape[-1] + 1)]
    image = plot_matrix(values, [circuits.name(*index) for index in chosen], ranks, axes, texts)
    axes.set(xlabel="rank of the token")
    return image


def plot_pruning(curve: PruningCurve, axes: Any, label: str = "loss in nats per token") -> None:
    """The measure and the share of weights cut, by p."""
    axes.plot(curve.p, curve.value, marker="o", color="C0")
    axes.set(xlabel="share of each head's weight kept, p", ylabel=label)
    other = axes.twinx()
    other.plot(curve.p, curve.cut, marker="s", color="C1")
    other.set(ylabel="share of weights cut", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)


def _plot_layers(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], axes: Any) -> None:
    for name, (mean, std) in curves.items():
        layers = np.arange(1, len(mean) + 1)
        (drawn,) = axes.plot(layers, mean, marker="o", markersize=4, label=name)
        axes.fill_between(layers, mean - std, mean + std, color=drawn.get_color(), alpha=0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)

"""Pruning curves: what a model loses with its routers' smallest weights."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lime_jax.mixer import Mixer, Params
from lime_jax.pruning import PruningReport, prune_router


class PruningCurve(NamedTuple):
    """A measure of a model by how much of its routers is kept.

    Attributes:
        p: Shares of the weight to keep: [p].
        value: The measure: [p].
        reports: What was cut at each: [p].
    """

    p: np.ndarray
    value: np.ndarray
    reports: tuple[PruningReport, ...]

    @property
    def cut(self) -> np.ndarray:
        """Share of the weights that were cut: [p]."""
        return np.array([report.share for report in self.reports])


def pruning_curve(
    mixer: Mixer, params: Params, measure: Callable[[Params], float], p: Sequence[float] = (0.5, 0.7, 0.9, 0.95, 1.0)
) -> PruningCurve:
    """Measures a model with its routers pruned to each p.

    Args:
        mixer: From `make_mixer`.
        params: Its parameters as a checkpoint holds them: the `layers` of `mixer.init`.
        measure: What to measure of the model with such parameters; the loss on some text, for example.
        p: See `lime_jax.prune_router`.
    """
    pruned = [prune_router(mixer, params, share) for share in p]
    values = [float(measure(router)) for router, _ in pruned]
    return PruningCurve(np.array(p, float), np.array(values), tuple(report for _, report in pruned))

"""Token separability: how well a linear probe tells tokens apart by a layer's states (arXiv 2502.09245, section 6)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Separability(NamedTuple):
    """Accuracy of linear probes on examples that they were not fitted to.

    Attributes:
        folds: Of each fold: [l, folds].
        chance: Accuracy of guessing the most frequent class.
    """

    folds: np.ndarray
    chance: float

    @property
    def mean(self) -> np.ndarray:
        """Over folds: [l]."""
        return self.folds.mean(1)

    @property
    def std(self) -> np.ndarray:
        """Over folds: [l]."""
        return self.folds.std(1)


def probe_accuracy(features: ArrayLike, labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Accuracy of a linear classifier in cross-validation: [folds].

    The probe is a ridge classifier, one least-squares fit per class on standardised features with a penalty of
    1e-2 per example. It has a closed form: nothing about training (the paper's probes have one epoch of Adam) can be
    the reason for a difference between layers, and no library is needed.

    Args:
        features: [n, d].
        labels: Integers, the class of each: [n].
        folds: Parts that the examples are divided into at random, with equal shares of each class as far as
            possible; each is predicted by a probe fitted to the others.
        seed: Of the division.

    Raises:
        ValueError: Shapes do not fit, there is only one class, or a class has fewer examples than there are folds.
    """
    x = np.asarray(features, np.float64)
    y = np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"features has shape {list(x.shape)} and labels {list(y.shape)}; give [n, d] and [n]")
    classes, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    if folds < 2:
        raise ValueError(f"folds={folds} is not allowed; it must be at least 2")
    if len(classes) < 2 or counts.min() < folds:
        raise ValueError(
            f"labels has {len(classes)} classes of at least {counts.min(initial=len(y))} examples; {folds} folds need "
            f"two classes or more, with at least {folds} examples each"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(y))
    fold = np.empty(len(y), np.int64)
    fold[shuffled[np.argsort(index[shuffled], kind="stable")]] = np.arange(len(y)) % folds
    accuracy = []
    for number in range(folds):
        train, test = fold != number, fold == number
        weights = _fit(x[train], index[train], len(classes))
        right = np.argmax(_with_ones(x[test]) @ weights, axis=1) == index[test]
        accuracy.append(right.mean())
    return np.array(accuracy)


def separability(states: ArrayLike, labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> Separability:
    """Probes of every layer, on the same folds.

    Args:
        states: Of the labelled tokens: [l, n, ...]; the axes after n are one state.
        labels: Integers: [n].
        folds: See `probe_accuracy`.
        seed: See `probe_accuracy`.
    """
    states = np.asarray(states)
    rows = states.reshape(*states.shape[:2], -1)
    accuracy = np.stack([probe_accuracy(layer, labels, folds=folds, seed=seed) for layer in rows])
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    return Separability(accuracy, float(counts.max() / counts.sum()))


def _with_ones(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _fit(x: np.ndarray, index: np.ndarray, classes: int) -> np.ndarray:
    """Weights [d + 1, classes] of scores that are largest for the right class; the last row is the bias."""
    mean, scale = x.mean(0), x.std(0) + 1e-5
    normed = (x - mean) / scale
    wanted = np.eye(classes)[index]
    gram = normed.T @ normed + 1e-2 * len(x) * np.eye(x.shape[1])
    # Centred features leave the bias to the means of what is wanted.
    weights = np.linalg.solve(gram, normed.T @ (wanted - wanted.mean(0))) / scale[:, None]
    return np.concatenate([weights, (wanted.mean(0) - mean @ weights)[None]])

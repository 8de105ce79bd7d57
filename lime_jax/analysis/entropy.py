"""Matrix-based Renyi entropy: over how many directions the states of a text spread (arXiv 2502.09245, section 6)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Entropy(NamedTuple):
    """Entropy of a model's states in nats, at most log(min(t, d)).

    Attributes:
        mean: Over texts: [l].
        std: Over texts: [l].
    """

    mean: np.ndarray
    std: np.ndarray


def renyi_entropy(states: ArrayLike, order: float = 0.99) -> float:
    """S = log(sum over i of p[i]^order) / (1 - order), p the eigenvalues of Z Z^T over their sum.

    Computed in float64. The entropy of n orthogonal rows of one length is log(n), that of rank one is 0.

    Args:
        states: Z [t, d], the states of one text.
        order: Above 0; 1 is Shannon's entropy, the limit. The paper's code has 0.99.

    Returns:
        Nats; NaN if all states are zero.

    Raises:
        ValueError: Shape or order is wrong.
    """
    z = np.asarray(states, np.float64)
    if z.ndim != 2 or not z.size:
        raise ValueError(f"states has shape {list(z.shape)}; it must be [t, d], with at least one element")
    if not order > 0:
        raise ValueError(f"order={order!r} is not allowed; it must be above 0")
    # Z Z^T and Z^T Z have the same eigenvalues, but for zeros.
    eigenvalues = np.clip(np.linalg.eigvalsh(z @ z.T if len(z) <= z.shape[1] else z.T @ z), 0.0, None)
    total = eigenvalues.sum()
    if total == 0:
        return float("nan")
    # Zeros that rounding made positive would count at small orders.
    p = eigenvalues[eigenvalues > total * np.finfo(np.float64).eps * max(z.shape)] / total
    if order == 1:
        return float(-np.sum(p * np.log(p)))
    return float(np.log(np.sum(p**order)) / (1 - order))


def standardise(rows: np.ndarray) -> np.ndarray:
    """Rows [n, d] less their mean, over their standard deviation plus 1e-5, dimension by dimension, as the paper's."""
    rows = np.asarray(rows, np.float64)
    return (rows - rows.mean(0)) / (rows.std(0) + 1e-5)


def layer_entropy(states: ArrayLike, lengths: ArrayLike | None = None, order: float = 0.99) -> Entropy:
    """Entropy of each layer's states, after standardising every dimension over all tokens of all texts.

    Args:
        states: [l, b, t, ...]; the axes after t are one state, heads of values for example.
        lengths: Tokens of each text, at least 1, the rest being padding: [b]. None: all.
        order: See `renyi_entropy`.
    """
    states = np.asarray(states)
    layers, batch, time = states.shape[:3]
    counts = np.full(batch, time) if lengths is None else np.asarray(lengths)
    ends = np.cumsum(counts)[:-1]
    table = np.zeros((layers, batch))
    for number, layer in enumerate(states.reshape(layers, batch, time, -1)):
        rows = standardise(np.concatenate([text[:length] for text, length in zip(layer, counts, strict=True)]))
        table[number] = [renyi_entropy(text, order) for text in np.split(rows, ends)]
    return Entropy(table.mean(1), table.std(1))

"""The kinds of results, and how `experiments.report` shows each."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """How the curves of one kind of result are shown.

    Attributes:
        x: Name of the list that holds the x values.
        y: Name of the list that holds the y values.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        log: Whether the x axis is logarithmic.
        y_range: Limits of the y axis; None fits the data.
        decimals: Of y in tables.
        heat: Whether the plot shows y as colours, a row per label and a column per x, instead of lines.
        text: Name of a list of words that belong to y; None has none.
        also: Names of lists that were measured beside y and have a table each, and what they are. Curves from before
            something was measured have none, and are left out there.
    """

    x: str
    y: str
    x_label: str
    y_label: str
    log: bool
    y_range: tuple[float, float] | None
    decimals: int
    heat: bool = False
    text: str | None = None
    also: tuple[tuple[str, str], ...] = ()


_SHARE = "share of the absolute router weight"
KINDS = {
    "passkey": Kind("blocks", "accuracy", "length in blocks", "exact match", True, (-0.03, 1.03), 3),
    "pairs": Kind("pairs", "accuracy", "key-value pairs", "exact match", True, (-0.03, 1.03), 3),
    "tracking": Kind("blocks", "accuracy", "length in blocks", "products right", True, (-0.03, 1.03), 3),
    "babi": Kind("blocks", "accuracy", "length in blocks", "answers right", True, (-0.03, 1.03), 3),
    "loss-by-position": Kind(
        "position",
        "loss",
        "token of the document, up to",
        "loss in nats per token",
        True,
        None,
        3,
        also=(("accuracy", "next tokens right"),),
    ),
    "answers": Kind(
        "level", "accuracy", "operands, or steps of the reasoning", "answers right", False, (-0.03, 1.03), 3
    ),
    "answers-by-step": Kind("step", "accuracy", "training step", "answers right", False, (-0.03, 1.03), 3),
    "layer-memory": Kind("layers", "states", "layers", "temporary memory per layer, in layer states", False, None, 1),
    "layer-time": Kind("layers", "ratio", "layers", "step time relative to the first", False, None, 3),
    "entropy": Kind("layer", "entropy", "layer", "matrix Renyi entropy in nats", False, None, 3),
    "probes": Kind("layer", "accuracy", "layer", "accuracy of linear probes", False, None, 3),
    "routers": Kind("source", "share", "source layer", _SHARE, False, None, 3, heat=True),
    "depth-circuits": Kind("layer", "share", "layer", _SHARE, False, (-0.03, 1.03), 3),
    "semantic-circuits": Kind(
        "rank", "weight", "rank of the token", "router weight", False, None, 3, heat=True, text="token"
    ),
    "pruning": Kind("p", "loss", "share of each head's weight kept", "loss in nats per token", False, None, 4),
    "attention": Kind("block", "share", "block", "share of attention", False, None, 3, heat=True),
    "attention-layers": Kind("layer", "share", "layer", "share of attention", False, (-0.03, 1.03), 3),
    "fam-rows": Kind("row", "share", "FAM row", "share", False, None, 3, heat=True),
    "fam-drift": Kind(
        "block",
        "change",
        "block",
        "change of the FAM in a block, relative to its size",
        True,
        None,
        3,
        also=(("cosine", "cosine before and after"), ("norm", "root mean square")),
    ),
    "aot": Kind("microbatch", "peak_gib", "rows at once", "peak memory of a chip in GiB", False, None, 2),
    "kills": Kind("kill", "resumed", "kill", "step after which the next process went on", False, None, 0),
    "harness": Kind("step", "value", "training step", "score", False, None, 4),
    "speed": Kind("tokens", "tokens_per_second", "tokens of a text", "tokens per second", True, None, 0),
    "parts": Kind("part", "milliseconds", "part", "milliseconds in its operations", False, None, 1, True, "name"),
    "reading": Kind("tokens", "tokens_per_second", "tokens read", "tokens per second", False, None, 1),
    "training": Kind("step", "loss", "training step", "loss in nats per token", False, None, 3),
}

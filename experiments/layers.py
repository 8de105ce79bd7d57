"""What the analyses read of a trained model: texts of the kind that it was trained on, and its layers' states there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from experiments import data
from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.data.levels import LevelData
from experiments.data.questions import QuestionData
from experiments.step import make_eval_step, means
from fam_jax import Decoder, DecoderConfig
from fam_jax.layer_states import LayerStates, layer_states

# What the states are called in results, and the layer of the first of them.
_NAMES = {
    "hidden": ("hidden states", 0),
    "values": ("values", 1),
    "mixed": ("mixed values", 1),
    "ff_inputs": ("feed-forward inputs", 1),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Texts, each read from its beginning.

    Attributes:
        ids: int32 [b, t].
        lengths: Tokens of each, the rest being padding: int64 [b].
        targets: The token after each: int32 [b, t].
        weights: Which targets count in the loss: float32 [b, t].
        tokenizer: Of the ids.
        manifest: What the data is made of; None for synthetic tasks.
    """

    ids: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    tokenizer: Any
    manifest: dict[str, Any] | None


class Examples(NamedTuple):
    """Places of words in texts.

    Attributes:
        rows: Text of each example: [n].
        columns: Its place in it, the last token of the word: [n].
        labels: Number of the word: [n].
        names: Of the words.
    """

    rows: np.ndarray
    columns: np.ndarray
    labels: np.ndarray
    names: list[str]


def texts(
    config: TrainConfig,
    sequences: int,
    *,
    length: int = 256,
    source: str | None = None,
    seed: int = 0,
    level: int | None = None,
) -> Texts:
    """Texts that a run was not trained on.

    Args:
        config: The run's.
        sequences: At most so many texts.
        length: For text: tokens of each, cut from validation documents evenly, the first ones of all documents first.
        source: For text: another one than the run's.
        seed: For tasks with levels, such as PassKey: of the samples.
        level: For the same: of the samples. None: the hardest trained.

    Raises:
        ValueError: There is no text of two tokens, or `source` or `level` is given for a run that has none.
    """
    settings = config.data
    if source is not None and not isinstance(settings, TextData):
        raise ValueError(f"source={source!r} is for models of text, which the run {config.name!r} is not; leave it out")
    if level is not None and not isinstance(settings, LevelData):
        raise ValueError(f"level={level} is for tasks with levels, which the run {config.name!r} is not; leave it out")
    if isinstance(settings, TextData):
        settings = dataclasses.replace(settings, source=source or settings.source)
        pieces = _pieces(data.documents(settings, "validation"), sequences, length)
        ids = np.zeros((len(pieces), length + 1), np.int32)
        for row, piece in enumerate(pieces):
            ids[row, : len(piece)] = piece
        lengths = np.array([len(piece) - 1 for piece in pieces])
        weights = (np.arange(length) < lengths[:, None]).astype(np.float32)
        return Texts(ids[:, :-1], lengths, ids[:, 1:], weights, tokenizer_of(config), data.manifest(settings))
    if isinstance(settings, LevelData):
        task = settings.task("validation")
        if level is not None:
            settings.check_levels((level,))
        batch = task.sample(np.random.default_rng([seed, 0]), sequences, level or settings.levels[-1])
        lengths = np.full(sequences, batch["tokens"].shape[1])
        return Texts(batch["tokens"], lengths, batch["targets"], batch["weights"], tokenizer_of(config), None)
    assert isinstance(settings, QuestionData)
    questions = settings.task().questions("test")
    chosen = questions[np.unique(np.linspace(0, len(questions) - 1, sequences).round().astype(int))]
    batch = chosen.batch()
    # The filling after the end token is no text.
    return Texts(batch["tokens"], chosen.ends - 1, batch["targets"], batch["weights"], tokenizer_of(config), None)


def tokenizer_of(config: TrainConfig) -> Any:
    """The tokenizer of a run's data."""
    if isinstance(config.data, TextData):
        return data.load_tokenizer(config.data.tokenizer)
    return config.data.load_tokenizer() if isinstance(config.data, LevelData) else config.data.task().tokenizer


def word(tokenizer: Any, token: int) -> str:
    """What to call a token: its text in quotes, or its number where it has none of its own."""
    text = tokenizer.decode([token])
    return f"<{token}>" if not text or "\ufffd" in text else repr(text)


def _pieces(documents: data.Documents, sequences: int, length: int) -> list[np.ndarray]:
    """Pieces of documents, each with the token after it."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(len(documents), sequences)).round().astype(int))
    read = [documents[int(number)].tokens for number in chosen]
    longest = max(map(len, read), default=0)
    starts = ((start, tokens) for start in range(0, longest, length) for tokens in read if len(tokens) > start + 1)
    pieces = [tokens[start : start + length + 1] for start, tokens in starts][:sequences]
    if not pieces:
        raise ValueError(f"none of the {len(documents)} validation documents has two tokens; give another source")
    return pieces


def examples(read: Texts, words: Sequence[str] | None, *, classes: int, most: int, folds: int, seed: int) -> Examples:
    """Finds words in texts, equally many of each.

    Args:
        read: The texts.
        words: To find, one token or several. None: the most frequent tokens.
        classes: How many of the most frequent tokens.
        most: At most so many of each.
        folds: At least so many of each.
        seed: Of which are taken.

    Raises:
        ValueError: There are fewer than two words, or a word is too rare.
    """
    real = np.arange(read.ids.shape[1]) < read.lengths[:, None]
    if words is None:
        counts = np.bincount(read.ids[real], minlength=read.tokenizer.vocab_size)
        patterns = [np.array([token]) for token in np.argsort(-counts, kind="stable")[:classes]]
        names = [word(read.tokenizer, int(pattern[0])) for pattern in patterns]
    else:
        patterns, names = [read.tokenizer.encode(word) for word in words], list(words)
    if len(set(names)) < 2 or len(set(names)) < len(names) or not all(map(len, patterns)):
        raise ValueError(f"probes tell at least two different words apart, not {', '.join(names) or 'none'}")
    rng = np.random.default_rng(seed)
    places = [np.argwhere(_ends(read.ids, pattern) & real) for pattern in patterns]
    each = min(most, *map(len, places))
    if each < folds:
        rare = int(np.argmin([len(place) for place in places]))
        raise ValueError(
            f"{names[rare]} stands {len(places[rare])} times in the texts, too seldom for {folds} folds; read more "
            "sequences, or choose other words"
        )
    kept = np.concatenate([place[np.sort(rng.permutation(len(place))[:each])] for place in places])
    labels = np.repeat(np.arange(len(places)), each)
    return Examples(kept[:, 0], kept[:, 1], labels, names)


def _ends(ids: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """Where a pattern [k] ends in ids: bool [b, t]."""
    found = np.zeros(ids.shape, bool)
    width = len(pattern)
    if width <= ids.shape[1]:
        found[:, width - 1 :] = (np.lib.stride_tricks.sliding_window_view(ids, width, axis=1) == pattern).all(-1)
    return found


def collect(
    model: Decoder,
    params: Any,
    read: Texts,
    batch_size: int,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    fields: Sequence[str] = ("hidden", "values", "mixed"),
) -> Iterator[tuple[str, int, np.ndarray]]:
    """The states of all layers at all tokens or at some.

    Args:
        model: The decoder.
        params: Its parameters.
        read: The texts.
        batch_size: Texts read side by side.
        rows: Texts of the wanted tokens [n]. None: all tokens.
        columns: Their places [n].
        fields: Of `LayerStates`; one that a model does not have is left out, and so are mixed values that are the
            values themselves.

    Yields:
        The name of the states, the number of their first layer, the embeddings being layer 0, and the states, float32
        [l, b, t, ...], or [l, n, ...] if some tokens were asked for.
    """
    kept: dict[str, list[np.ndarray]] = {field: [] for field in fields}
    order = np.argsort(rows, kind="stable") if rows is not None else None
    for start in range(0, len(read.ids), batch_size):
        # The last batch is filled up, so that one program serves all.
        batch = np.arange(start, start + batch_size) % len(read.ids)
        where: tuple[Any, ...] = (slice(min(batch_size, len(read.ids) - start)),)
        if order is not None and rows is not None and columns is not None:
            here = order[(rows[order] >= start) & (rows[order] < start + batch_size)]
            where = (rows[here] - start, columns[here])
        states = _layer_states(model.config, params, read.ids[batch], read.lengths[batch])
        for field in fields:
            array = getattr(states, field)
            if array is not None:
                kept[field].append(np.asarray(array, np.float32)[(slice(None), *where)])
    arrays = {field: np.concatenate(parts, axis=1) for field, parts in kept.items() if parts}
    if "mixed" in arrays and np.array_equal(arrays["mixed"], arrays["values"]):
        del arrays["mixed"]
    for field, array in arrays.items():
        yield *_NAMES[field], array if order is None else array[:, np.argsort(order)]


def loss_on(model: Decoder, read: Texts, batch_size: int) -> Callable[[Any], float]:
    """A function of parameters: the mean loss of the targets that count, in nats per token."""
    step = make_eval_step(model)

    def loss(params: Any) -> float:
        total: dict[str, Any] = {}
        for start in range(0, len(read.ids), batch_size):
            rows = np.arange(start, start + batch_size)
            chosen, real = rows % len(read.ids), rows < len(read.ids)
            weights = read.weights[chosen] * real[:, None].astype(np.float32)
            batch = {"tokens": read.ids[chosen], "targets": read.targets[chosen], "weights": weights}
            sums, _ = step(params, batch, None)
            total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
        return float(means(total)["loss"])

    return loss


@partial(jax.jit, static_argnums=0)
def _layer_states(config: DecoderConfig, params: Any, tokens: Array, lengths: Array) -> LayerStates:
    return layer_states(config, params, tokens, lengths)

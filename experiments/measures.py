"""Measures of a trained model: loss and hits by position in the document, recall by length, answers by difficulty.

Texts are read in chunks of a fixed number of tokens, the state carried from chunk to chunk, so memory does
not grow with their length, and one compiled program serves all lengths (with full attention: one length).
Answers are written freely, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments.data.levels import LevelTask
from experiments.data.questions import QuestionTask
from experiments.distributed import is_main
from experiments.spread import as_before, initial_state, to_host
from fam_jax import Decoder, StreamState, generate
from fam_jax.call import check_ids
from fam_jax.loss import TokenLosses

# Keeps the samples of evaluation apart from those of training, whatever the seeds.
_EVALUATION = 0x6576616C


# What is done to a state after every block, so that nothing passes from block to block through the FAM: it is zero, or
# as at a text's beginning, so that what its rows do besides remembering stays.
CONTROLS: dict[str, Callable[[StreamState], StreamState]] = {
    "zeroed": StreamState.forget,
    "reset": StreamState.restart,
}


def loss_by_position(
    model: Decoder,
    variables: Any,
    documents: Sequence[np.ndarray],
    *,
    batch_size: int = 8,
    chunk: int = 512,
    edges: Sequence[int] | None = None,
    control: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Mean loss of the tokens of whole documents by their place in the document, and how many are the likeliest one.

    Args:
        model: The decoder.
        variables: Its parameters.
        documents: Token ids of each document, int [t]; those of fewer than two tokens say nothing.
        batch_size: Documents read side by side.
        chunk: Tokens of a row per step, rounded up to whole blocks.
        edges: Rising upper edges of the bins of positions, counted from 1; positions beyond the last are left
            out. None: doubling, from the block size (64 with full attention) to the longest document.
        control: See CONTROLS; None measures the model as it is.
        progress: Show a progress bar.

    Returns:
        A curve for a result of kind "loss-by-position": `position` (the edges), `loss` in nats per token, `accuracy`,
        the share of tokens to which the model gives the most probability (both NaN in an empty bin), and `tokens` per
        bin; per document in the given order `document_loss`, `document_accuracy` and `document_tokens` over all its
        positions. The first token of a document has no prediction.

    Raises:
        ValueError: no document has two tokens, an id is outside the vocabulary, a size is impossible, or there is no
            FAM to zero.
    """
    check_positive(batch_size=batch_size, chunk=chunk)
    _check_control(model, control)
    vocab = model.config.vocab_size
    texts = [check_ids(text, vocab, f"document {i}") for i, text in enumerate(documents)]
    longest = max(map(len, texts), default=0)
    if longest < 2:
        raise ValueError(f"none of the {len(texts)} documents has two tokens, so there is nothing to predict")
    bins = np.asarray(_doubling(model, longest) if edges is None else edges)
    if bins.ndim != 1 or len(bins) == 0 or (np.diff(bins) <= 0).any() or bins[0] < 1:
        raise ValueError(f"edges={bins.tolist()} is not allowed; give rising positions from 1")
    # Of each token, loss and hit: summed by bin, the last being those beyond all edges, and by document.
    totals, counts = np.zeros((2, len(bins) + 1)), np.zeros(len(bins) + 1, np.int64)
    of_documents = np.zeros((2, len(texts)))
    size = _chunk_tokens(model, chunk)
    # Documents of like length side by side: rows that are through wait for the longest.
    order = sorted((i for i in range(len(texts)) if len(texts[i]) > 1), key=lambda i: -len(texts[i]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with _bar(sum(len(texts[i]) for i in order), "token", progress) as bar:
        for group in groups:
            lengths = np.array([len(texts[i]) for i in group] + [0] * (batch_size - len(group)))
            ids = np.zeros((batch_size, lengths.max()), np.int32)
            for row, index in enumerate(group):
                ids[row, : lengths[row]] = texts[index]
            for start, *measured in _read_in_chunks(model, variables, ids[:, :-1], ids[:, 1:], size, control):
                shape = measured[0].shape
                position = np.arange(start + 2, start + shape[1] + 2)  # of the target, counted from 1
                real = position <= lengths[:, None]
                where = np.broadcast_to(np.searchsorted(bins, position), shape)[real]
                counts += np.bincount(where, minlength=len(counts))
                for number, values in enumerate(measured):
                    totals[number] += np.bincount(where, values[real], len(counts))
                    of_documents[number, group] += np.where(real, values, 0.0).sum(1)[: len(group)]
                bar.update(int(np.clip(lengths - start, 0, size).sum()))
    predicted = np.array([max(len(text) - 1, 0) for text in texts])
    with np.errstate(invalid="ignore"):
        (loss, accuracy), (document_loss, document_accuracy) = totals / counts, of_documents / predicted
    return {
        "position": bins.tolist(),
        "loss": loss[:-1].tolist(),
        "accuracy": accuracy[:-1].tolist(),
        "tokens": counts[:-1].tolist(),
        "document_loss": document_loss.tolist(),
        "document_accuracy": document_accuracy.tolist(),
        "document_tokens": predicted.tolist(),
    }


def recall_accuracy(
    model: Decoder,
    variables: Any,
    task: LevelTask,
    levels: Sequence[int],
    *,
    trials: int = 500,
    batch_size: int = 50,
    seed: int = 0,
    control: str | None = None,
    chunk: int = 512,
    progress: bool = True,
) -> dict[str, Any]:
    """Share of samples of which all that is asked is the model's greedy answer, by level.

    The answer is fed as it is read (teacher forcing); all its tokens are then the most likely ones exactly if
    greedy decoding writes it.

    Args:
        model: The decoder.
        variables: Its parameters.
        task: Makes the samples, such as PassKey's; what has weight is asked.
        levels: Lengths in blocks of the task, or numbers of pairs.
        trials: Samples per level.
        batch_size: Samples read side by side.
        seed: Of the samples, which do not depend on the other levels or on the model.
        control: See CONTROLS; None measures the model as it is. Memory segments stay.
        chunk: Tokens of a row per step, rounded up to whole blocks.
        progress: Show a progress bar.

    Returns:
        A curve for a result of the task's kind: the levels, under the name that its settings have for them (`blocks`,
        `pairs`), and `accuracy`, `correct` and `trials` per level.

    Raises:
        ValueError: a size is impossible, the task has no such level, the model's vocabulary is too small, or there is
            no FAM to zero.
    """
    check_positive(trials=trials, batch_size=batch_size, chunk=chunk)
    config = task.config
    if model.config.vocab_size < task.tokenizer.vocab_size:
        raise ValueError(
            f"the model's vocab_size={model.config.vocab_size} is too small for the {config.title} task, which has "
            f"{task.tokenizer.vocab_size} ids; evaluate a model that was trained on it"
        )
    _check_control(model, control)
    if not levels:
        raise ValueError(f"{config.counted}={list(levels)}: give at least one")
    config.check_levels(levels)
    size = _chunk_tokens(model, chunk)
    correct = []
    batches = -(-trials // batch_size)
    total = sum(map(config.row_blocks, levels)) * config.block_size * batches * batch_size
    with _bar(total, "token", progress) as bar:
        for level in levels:
            right = 0
            for number in range(batches):
                rng = np.random.default_rng([_EVALUATION, seed, level, number])
                batch = task.sample(rng, batch_size, level)
                good = np.ones(batch_size, bool)
                for start, _, hit in _read_in_chunks(
                    model, variables, batch["tokens"], batch["targets"], size, control
                ):
                    asked = batch["weights"][:, start : start + hit.shape[1]] > 0
                    good &= (hit | ~asked).all(1)
                    bar.update(hit.size)
                right += int(good[: trials - number * batch_size].sum())  # the last batch may be more than asked
            correct.append(right)
    return {
        config.counted: list(levels),
        "accuracy": [right / trials for right in correct],
        "correct": correct,
        "trials": [trials] * len(correct),
    }


def answer_accuracy(
    model: Decoder, variables: Any, task: QuestionTask, *, batch_size: int = 100, progress: bool = True
) -> dict[str, Any]:
    """Share of the test questions that the model answers right, by level.

    It writes freely: the most likely token each time, up to the end token. Only the answer that its text comes to
    counts, not the way there; a malformed text is wrong.

    Args:
        model: The decoder.
        variables: Its parameters.
        task: Makes and marks the questions.
        batch_size: Questions answered side by side.
        progress: Show a progress bar.

    Returns:
        A curve for a result of kind "answers": `level`, `accuracy`, `correct` and `trials` per level.

    Raises:
        ValueError: a size is impossible, or the model's vocabulary is too small.
    """
    check_positive(batch_size=batch_size)
    if model.config.vocab_size < task.tokenizer.vocab_size:
        raise ValueError(
            f"the model's vocab_size={model.config.vocab_size} is too small for the {task.tokenizer.name} task, which "
            f"has {task.tokenizer.vocab_size} ids; evaluate a model that was trained on it"
        )
    questions = task.questions("test")
    width, new = int(questions.prompt.max()), questions.longest_answer
    right = np.zeros(len(questions), bool)
    with _bar(len(questions), "question", progress) as bar:
        for start in range(0, len(questions), batch_size):
            # The last batch is filled up, so that one program serves all.
            rows = np.arange(start, start + batch_size) % len(questions)
            asked = questions[rows]
            out = generate(
                model,
                variables,
                asked.ids[:, :width],
                new,
                lengths=asked.prompt,
                state=initial_state(model, batch_size, width + new if model.config.memory is None else None),
                stop_tokens=(task.tokenizer.separator,),
            )
            written, lengths = to_host((out.ids, out.lengths))
            for row in range(min(batch_size, len(questions) - start)):
                truth = task.answer(asked.ids[row, asked.prompt[row] : asked.ends[row]])
                right[rows[row]] = task.answer(written[row, : lengths[row]]) == truth
                bar.update()
    levels = np.unique(questions.level)
    correct = [int(right[questions.level == level].sum()) for level in levels]
    trials = [int((questions.level == level).sum()) for level in levels]
    return {
        "level": levels.tolist(),
        "accuracy": [hits / of for hits, of in zip(correct, trials, strict=True)],
        "correct": correct,
        "trials": trials,
    }


def _read_in_chunks(
    model: Decoder,
    variables: Any,
    tokens: np.ndarray,
    targets: np.ndarray,
    size: int,
    control: str | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Reads rows from their beginning, `size` tokens a step.

    Args:
        model: The decoder.
        variables: Its parameters.
        tokens: int32 [b, t].
        targets: The token after each: int32 [b, t].
        size: Tokens per step, whole blocks.
        control: See CONTROLS.

    Yields:
        The column of the first of the step's tokens, and of each [b, up to size] the loss in nats and whether
        the target is the most likely token.
    """
    rows, length = tokens.shape
    padded = -(-length // size) * size
    state = initial_state(model, rows, padded if model.config.memory is None else None)
    for start in range(0, length, size):
        width = min(size, length - start)
        # Padding only ever follows the text, so nothing that counts reads it.
        fill = ((0, 0), (0, size - width))
        pieces = (np.pad(array[:, start : start + width], fill) for array in (tokens, targets))
        nll, hit, state = _read(model, control, variables, state, *pieces)
        nll, hit = to_host((nll, hit))
        yield start, nll[:, :width], hit[:, :width]


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    model: Decoder, control: str | None, variables: Any, state: StreamState, tokens: Array, targets: Array
) -> tuple[Array, Array, StreamState]:
    """Reads whole blocks from a block's beginning on: loss and hit of each target [b, t], and the state."""
    aligned = model.config.memory is not None

    def apply(state: StreamState, tokens: Array, targets: Array) -> tuple[StreamState, TokenLosses]:
        out: Any = model.apply(variables, tokens, state, aligned=aligned, targets=targets)
        return out.state, out.losses

    def forget(state: StreamState, block: tuple[Array, Array]) -> tuple[StreamState, TokenLosses]:
        state, losses = apply(state, *block)
        return state if control is None else CONTROLS[control](state), losses

    if control:
        rows = tokens.shape[0]
        in_blocks, their_targets = (
            jnp.moveaxis(ids.reshape(rows, -1, _block(model)), 1, 0) for ids in (tokens, targets)
        )
        state, losses = jax.lax.scan(forget, state, (in_blocks, their_targets))
        losses = jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(tokens.shape), losses)
    else:
        state, losses = apply(state, tokens, targets)
    return losses.nll, losses.hit, as_before(model, state)


def _check_control(model: Decoder, control: str | None) -> None:
    """Raises a ValueError if there is no such control, or no memory that it acts on."""
    memory = model.config.memory
    if control is None:
        return
    if control not in CONTROLS:
        raise ValueError(f"control={control!r} is not known; there are {', '.join(CONTROLS)}, or None")
    if not (memory and memory.fam_length):
        raise ValueError(f"control={control!r}, but this model has no FAM (fam_length=0); leave it out")


def _block(model: Decoder) -> int:
    memory = model.config.memory
    return 1 if memory is None else memory.block_size


def _chunk_tokens(model: Decoder, wanted: int) -> int:
    return -(-wanted // _block(model)) * _block(model)


def _doubling(model: Decoder, longest: int) -> list[int]:
    edges = [64 if model.config.memory is None else model.config.memory.block_size]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


def _bar(total: int, unit: str, progress: bool) -> tqdm:
    """A progress bar, shown on terminals only, by the main process."""
    shown = progress and is_main()
    return tqdm(total=total, unit=unit, unit_scale=True, disable=None if shown else True, leave=False)


def check_positive(**sizes: int | None) -> None:
    """Raises a ValueError that names the first size below 1; None stands for no limit."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not allowed; it must be at least 1")

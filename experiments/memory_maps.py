"""What a FAM does: who reads it, what it reads, how it changes, and which of its rows hold a key.

Pure functions of what `fam_jax.attention_maps` gives, or of a model and texts; `experiments.analyze` makes results of
them. Attention says where a model looks, not what comes of it: `exchange_rows` swaps rows between texts and asks whose
answer is told then.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fam_jax import Decoder, DecoderConfig, StreamState
from fam_jax.attention_maps import AttentionMaps, attention_maps
from lime_jax.analysis import plot_matrix


class Reading(NamedTuple):
    """Attention weights as means over heads, of layer l, text b, block n, token c and FAM row f.

    Attributes:
        token_fam: Of tokens over FAM rows, summed over the FAMs that they see: [l, b, n, c, f].
        token_past: Of tokens over all past blocks: [l, b, n, c].
        fam_block: Of FAM rows over the tokens of the block: [l, b, n, f, c]; NaN in layers without a FAM.
        fam: The FAM as it enters each block, and after the last: [l, b, n + 1, f, d].
    """

    token_fam: np.ndarray
    token_past: np.ndarray
    fam_block: np.ndarray
    fam: np.ndarray


class Drift(NamedTuple):
    """How a FAM changes from block to block, means over texts and rows.

    Attributes:
        norm: Root mean square of a row after each block: [l, n].
        change: Length of what a block changes, relative to the row before: [l, n - 1], from the second block on: the
            first begins at what every text begins with.
        cosine: Of the row before and after: [l, n - 1].
    """

    norm: np.ndarray
    change: np.ndarray
    cosine: np.ndarray


class Exchange(NamedTuple):
    """What is told once a row of a FAM is that of another text, by layer, row and token asked for (a).

    Attributes:
        own: Share of texts that still tell the right token: [l, f, a].
        other: Share that tell the token of the other text: [l, f, a].
        all_own: The same with all rows of all layers exchanged: [a].
        all_other: The same: [a].
    """

    own: np.ndarray
    other: np.ndarray
    all_own: np.ndarray
    all_other: np.ndarray


def read(model: Decoder, params: Any, ids: np.ndarray, batch_size: int = 16) -> Reading:
    """Reads texts from their beginning.

    Args:
        model: The decoder, with a FAM.
        params: Its parameters.
        ids: Texts of whole blocks: int32 [b, t].
        batch_size: Texts at once.

    Raises:
        ValueError: See `attention_maps`.
    """
    parts = [
        jax.tree.map(np.asarray, _read(model.config, params, ids[start : start + batch_size]))
        for start in range(0, len(ids), batch_size)
    ]
    return Reading(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def drift(fam: np.ndarray) -> Drift:
    """How a FAM changes.

    Args:
        fam: As it enters each block, and after the last: [l, b, n + 1, f, d].
    """
    rows = np.asarray(fam, np.float64)[:, :, 1:]
    before, after = rows[:, :, :-1], rows[:, :, 1:]

    def length(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.sum(x**2, axis=-1))

    with np.errstate(invalid="ignore"):  # layers without a FAM
        change = length(after - before) / length(before)
        cosine = (before * after).sum(-1) / (length(before) * length(after))
    norm = length(rows) / np.sqrt(rows.shape[-1])
    return Drift(*(values.mean((1, 3)) for values in (norm, change, cosine)))


def reads_of_places(reading: Reading, places: np.ndarray) -> np.ndarray:
    """How much FAM rows read of some tokens: [l, f], mean over all blocks that hold any of them.

    Args:
        reading: From `read`.
        places: The tokens: bool [b, t].
    """
    in_blocks = _in_blocks(reading, places)
    of_places = (reading.fam_block * in_blocks[:, :, None]).sum(-1)  # [l, b, n, f]
    return of_places[:, in_blocks.any(-1)].mean(1)


def reads_at_places(reading: Reading, places: np.ndarray) -> np.ndarray:
    """How much some tokens read of each FAM row: [l, f], their mean.

    Args:
        reading: From `read`.
        places: The tokens: bool [b, t].
    """
    return reading.token_fam[:, _in_blocks(reading, places)].mean(1)


def told_places(ids: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Where a text tells what it is asked for at its end: bool [b, t].

    Args:
        ids: Tokens: int [b, t].
        targets: The token after each: int [b, t].
        weights: Above 0 where the target is asked for: [b, t]; the same number in each row.
    """
    told = np.zeros(ids.shape, bool)
    for row, asked in enumerate(weights > 0):
        answer = targets[row, asked]
        windows = np.lib.stride_tricks.sliding_window_view(ids[row, : np.argmax(asked)], len(answer))
        for start in np.flatnonzero((windows == answer).all(-1)):
            told[row, start : start + len(answer)] = True
    return told


def exchange_rows(
    model: Decoder, variables: Any, ids: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> Exchange:
    """Reads up to the block with the first token asked for, swaps FAM rows, and reads on.

    Each text gets rows of the next one, the last those of the first.

    Args:
        model: The decoder, with a FAM.
        variables: Its parameters.
        ids: Texts of one task and length, at least two: int32 [b, t].
        targets: The token after each: int32 [b, t].
        weights: Above 0 where the target is asked for: [b, t]; the same places in all rows.

    Raises:
        ValueError: The model has no FAM, there is one text only, or the texts are not asked at the same places.
    """
    memory = model.config.memory
    if memory is None or not memory.rows:
        raise ValueError(f"there are no FAM rows to exchange in a model with memory={memory}; give one with a FAM")
    asked = weights[0] > 0
    if len(ids) < 2 or not asked.any() or ((weights > 0) != asked).any():
        raise ValueError(f"ids has {len(ids)} texts; give two or more that are asked at the same places")
    size = memory.block_size
    start = int(np.argmax(asked)) // size * size
    state = model.init_state(len(ids))
    for begin in range(0, start, 64 * size):
        state = _go_on(model, variables, state, ids[:, begin : min(begin + 64 * size, start)])[1]
    asked, rest, truth = asked[start:], ids[:, start:], targets[:, start:]

    def shares(fam: Array) -> np.ndarray:
        told = np.asarray(_go_on(model, variables, dataclasses.replace(state, fam=fam), rest)[0])
        return np.stack([(told == wanted)[:, asked].mean(0) for wanted in (truth, np.roll(truth, -1, axis=0))])

    layers, _, rows, _ = state.fam.shape
    others = jnp.roll(state.fam, -1, axis=1)
    table = np.array([[shares(state.fam.at[l, :, f].set(others[l, :, f])) for f in range(rows)] for l in range(layers)])
    return Exchange(table[:, :, 0], table[:, :, 1], *shares(others))


def share_curves(reading: Reading) -> dict[str, dict[str, Any]]:
    """Shares of attention by block: of tokens over the FAM and past blocks, of FAM rows over the block.

    The rest is what tokens read of their own block, and FAM rows of the FAM. Means over texts and heads.
    """
    of_tokens = {"tokens, of the FAM": reading.token_fam.sum(-1).mean((1, 3))}
    if reading.token_past.any():
        of_tokens["tokens, of past blocks"] = reading.token_past.mean((1, 3))
    of_rows = reading.fam_block.sum(-1).mean(1)  # [l, n, f]
    blocks = list(range(1, of_rows.shape[1] + 1))
    curves: dict[str, dict[str, Any]] = {}
    for layer in range(len(of_rows)):
        shares = {name: share[layer] for name, share in of_tokens.items()}
        shares |= {f"FAM row {row + 1}, of the block": of_rows[layer, :, row] for row in range(of_rows.shape[2])}
        curves |= {f"layer {layer + 1}, {name}": {"block": blocks, "share": share} for name, share in shares.items()}
    return curves


def layer_curves(reading: Reading) -> dict[str, dict[str, Any]]:
    """Shares of attention by layer, means over texts, heads and all blocks but the first, whose FAM is a learned one.

    A FAM row that looks at all tokens alike has a tenth of what it reads of a block from the tenth that it reads most.

    Raises:
        ValueError: The texts have one block.
    """
    if reading.token_past.shape[2] < 2:
        raise ValueError("attention by layer needs texts of two blocks or more: the first has only the start of a FAM")
    of_block = reading.fam_block[:, :, 1:]
    most = np.sort(of_block, axis=-1)[..., -math.ceil(of_block.shape[-1] / 10) :].sum(-1)
    shares = {
        "tokens, of the FAM": reading.token_fam[:, :, 1:].sum(-1),
        "tokens, of past blocks": reading.token_past[:, :, 1:],
        "FAM rows, of the block": of_block.sum(-1),
        "the tenth of its tokens that a row reads most": most / of_block.sum(-1),
    }
    if not reading.token_past.any():
        del shares["tokens, of past blocks"]
    layers = list(range(1, len(of_block) + 1))
    return {name: {"layer": layers, "share": share.mean((1, 2, 3))} for name, share in shares.items()}


def drift_curves(reading: Reading) -> dict[str, dict[str, Any]]:
    """`drift` by layer and block, from the second on."""
    found = drift(reading.fam)
    return {
        f"layer {layer + 1}": {
            "block": list(range(2, len(norm) + 1)),
            "change": change,
            "cosine": cosine,
            "norm": norm[1:],
        }
        for layer, (norm, change, cosine) in enumerate(zip(*found, strict=True))
    }


def row_curves(reading: Reading, told: np.ndarray, asked: np.ndarray, exchange: Exchange) -> dict[str, dict[str, Any]]:
    """What speaks for each FAM row holding what is told and asked later, by layer.

    Args:
        reading: From `read`.
        told: Tokens that tell it: bool [b, t].
        asked: Tokens before those asked for: bool [b, t].
        exchange: From `exchange_rows`.
    """
    shares = {
        "attention of the row to what is told": reads_of_places(reading, told),
        "attention of the answer to the row": reads_at_places(reading, asked),
        "right with another text's row": exchange.own.mean(-1),
        "that text's answer": exchange.other.mean(-1),
    }
    return {
        f"layer {layer + 1}, {name}": {"row": list(range(1, len(share[layer]) + 1)), "share": share[layer]}
        for layer in range(len(exchange.own))
        for name, share in shares.items()
    }


def matrix(maps: AttentionMaps, layer: int, text: int, block: int) -> np.ndarray:
    """The map of one layer as in the paper's figure 11, mean over heads: [c + f, e f + m c + c].

    Tokens of the block, then its FAM rows, read what the FAM was, past blocks and the block; NaN where FAM rows cannot.
    """
    token_fam, token_past, token_block, fam_fam, fam_block = (
        np.asarray(part[layer, text, block]).mean(0) for part in maps[:5]
    )
    tokens, rows = len(token_block), len(fam_fam)
    of_tokens = [part.reshape(tokens, -1) for part in (token_fam, token_past, token_block)]
    unseen = of_tokens[0].shape[1] - rows, of_tokens[1].shape[1]
    of_rows = [np.full((rows, unseen[0]), np.nan), fam_fam, np.full((rows, unseen[1]), np.nan), fam_block]
    return np.concatenate([np.concatenate(of_tokens, 1), np.concatenate(of_rows, 1)])


def plot_maps(maps: AttentionMaps, axes: Any, text: int = 0, block: int = -1, words: Any = None) -> None:
    """Draws `matrix` of each layer; lines part the FAM, past blocks and the block, and tokens and FAM rows.

    Args:
        maps: From `attention_maps`.
        axes: Matplotlib axes, one for each layer.
        text: Number of the text.
        block: Number of the block.
        words: Names of the block's tokens: [c]. None: their numbers.
    """
    *_, tokens, fams, rows = maps.token_fam.shape
    past = maps.token_past.shape[-2] * tokens
    names = [str(number) for number in range(1, tokens + 1)] if words is None else list(words)
    of_rows = [f"FAM {number}" for number in range(1, rows + 1)]
    columns = [*of_rows * fams, *["past"] * past, *names]
    for layer, axis in enumerate(axes):
        plot_matrix(matrix(maps, layer, text, block), [*names, *of_rows], columns, axis)
        axis.axhline(tokens - 0.5, color="white", linewidth=1)
        for place in {fams * rows, fams * rows + past}:
            axis.axvline(place - 0.5, color="white", linewidth=1)
        axis.tick_params(axis="x", rotation=90)
        axis.set(title=f"layer {layer + 1}", xlabel="read", ylabel="reader")


def _in_blocks(reading: Reading, places: np.ndarray) -> np.ndarray:
    """Places [b, t] by block: [b, n, c]."""
    _, _, blocks, _, size = reading.fam_block.shape
    return places.reshape(len(places), blocks, size)


@partial(jax.jit, static_argnums=0)
def _read(config: DecoderConfig, params: Any, ids: Array) -> tuple[Array, Array, Array, Array]:
    maps = attention_maps(config, params, ids)
    return maps.token_fam.mean(3).sum(-2), maps.token_past.mean(3).sum((-2, -1)), maps.fam_block.mean(3), maps.fam


@partial(jax.jit, static_argnums=0)
def _go_on(model: Decoder, variables: Any, state: StreamState, ids: Array) -> tuple[Array, StreamState]:
    """The most likely token after each [b, t], and the state after them."""
    out: Any = model.apply(variables, ids, state, aligned=True)
    return jnp.argmax(out.logits, axis=-1), out.state

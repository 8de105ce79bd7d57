"""Attention weights around the FAM, against weights worked out by hand and what the decoder itself keeps."""

import jax
import numpy as np
import pytest
from reference import (
    B,
    N,
    as_pretrained,
    assert_close,
    decoder_config,
    fam_config,
    fam_decoder,
    fam_slots,
    layers_of,
    near,
    params_of,
    project,
    quick_jit,
    runner,
    some_tokens,
)
from router_models import LAYERS

from fam_jax.attention_maps import attention_maps
from fam_jax.layer_states import layer_states
from lime_jax import DenseFormerConfig, LimeConfig

BLOCKS = 4


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def maps_of(config, tokens):
    return quick_jit(lambda params: attention_maps(config, params, tokens))(params_of(config))


def by_hand(config, w, x, fam, n, row):
    """Weights of one token, or of a FAM row if `row` is below 0, [h, keys]: the FAM's, then of the text.

    Args:
        config: The decoder's.
        w: The layer's weights.
        x: The layer's input [t, d].
        fam: FAM that entered the block [f, d].
        n: Number of the block.
        row: Place of the token in the text, or number of the FAM row less their number.
    """
    memory = config.memory
    key_slots, query_slots = fam_slots(memory, n * B, n == 0)
    q, k, _ = project(w, config, x, np.arange(len(x)))
    fam_q, fam_k, _ = project(w, config, fam, key_slots, query_slots)
    place = np.arange(len(x))
    if row < 0:
        query, seen = fam_q[row], place // B == n
    else:
        query = q[row]
        seen = (place <= row) & (place // B >= n - memory.segments) & near(w, config, row - place)
    keys = np.concatenate([fam_k, k])
    weights = np.zeros((config.num_heads, len(keys)))
    for head in range(config.num_heads):
        scores = keys[:, head // (config.num_heads // config.num_kv_heads)] @ query[head] / np.sqrt(len(query[head]))
        if config.attention_softcap:
            scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        scores[N:][~seen] = -np.inf
        weights[head] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return weights


@pytest.mark.parametrize(
    "config",
    [
        fam_config({"segments": 0}),
        fam_config({"segments": 2, "positions": "absolute", "fam_positions": "fractional", "fam_query": "old"}),
        as_pretrained(fam_config({"segments": 1}, parallel_block=True)),
    ],
    ids=["fam", "segments", "pretrained"],
)
def test_weights_are_those_worked_out_by_hand(config):
    tokens = some_tokens(2, BLOCKS * B)
    params = params_of(config)
    maps = jax.tree.map(np.asarray, maps_of(config, tokens))
    hidden = np.asarray(layer_states(config, params, tokens).hidden)
    memory = config.memory
    for b in range(2):
        history = fam_decoder(params, config, tokens[b]).fam
        for l, w in enumerate(layers_of(params, config)):
            assert_close(maps.fam[l, b], np.stack([fam[l] for fam in history]), 1e-10)
            for n in range(BLOCKS):
                own = slice(N + n * B, N + (n + 1) * B)
                for row in range(N):
                    want = by_hand(config, w, hidden[l, b], history[n][l], n, row - N)
                    assert_close(maps.fam_fam[l, b, n, :, row], want[:, :N], 1e-10)
                    assert_close(maps.fam_block[l, b, n, :, row], want[:, own], 1e-10)
                for c in range(B):
                    want = by_hand(config, w, hidden[l, b], history[n][l], n, n * B + c)
                    assert_close(maps.token_fam[l, b, n, :, c, 0], want[:, :N], 1e-10)
                    assert_close(maps.token_block[l, b, n, :, c], want[:, own], 1e-10)
                    for back in range(memory.segments):
                        got = maps.token_past[l, b, n, :, c, memory.segments - 1 - back]
                        there = want[:, N + (n - 1 - back) * B :][:, :B] if n > back else np.zeros((4, B))
                        assert_close(got, there, 1e-10)


VARIANTS = {
    "several FAMs": fam_config({"segments": 1, "fam_blocks": 3}, num_layers=LAYERS),
    "prefix": fam_config({"fam_init": "prefix", "fam_ff": False}, num_layers=LAYERS),
    "some layers": fam_config({"layers": (0, 2)}, num_layers=LAYERS, schedule="block"),
    "LIMe": fam_config(num_layers=LAYERS, mixing=LimeConfig()),
    "by the token": fam_config(num_layers=LAYERS, mixing=LimeConfig("dynamic_views")),
    "DenseFormer": fam_config(num_layers=LAYERS, mixing=DenseFormerConfig()),
}


@pytest.mark.parametrize(
    "name", [name if name == "several FAMs" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_whatever_the_model_weights_sum_to_one_and_the_fam_is_the_decoders(name):
    config = VARIANTS[name]
    tokens = some_tokens(2, BLOCKS * B)
    maps = jax.tree.map(np.asarray, maps_of(config, tokens))
    run, state = runner(config), None
    for n in range(BLOCKS):
        state = run(params_of(config), tokens[:, n * B : (n + 1) * B], state=state).state
        assert_close(maps.fam[:, :, n + 1], state.fam, 1e-12)
    read = [part.reshape(*part.shape[:5], -1).sum(-1) for part in (maps.token_fam, maps.token_past, maps.token_block)]
    np.testing.assert_allclose(sum(read), 1)
    has_fam = [config.memory.layers is None or l in config.memory.layers for l in range(LAYERS)]
    for l, has in enumerate(has_fam):
        of_rows = maps.fam_fam[l].sum(-1) + maps.fam_block[l].sum(-1)
        np.testing.assert_allclose(of_rows, 1 if has else np.nan)
        assert (maps.token_fam[l].sum() > 0) == has
    later = np.triu(np.ones((B, B), bool), 1)
    assert not maps.token_block[..., later].any()
    for n in range(BLOCKS):  # nothing from before the text
        seen = min(n, config.memory.segments)
        assert not maps.token_past[:, :, n, ..., : config.memory.segments - seen, :].any()
        if config.memory.fam_blocks > 1:
            assert not maps.token_fam[:, :, n, ..., : max(config.memory.fam_blocks - 1 - n, 0), :].any()
            assert maps.token_fam[:, :, n, ..., -1, :].all()


def test_what_has_no_fam_or_no_whole_blocks_is_refused():
    for config in (
        decoder_config(),
        decoder_config({"segments": 1}),
        decoder_config({"kind": "rmt", "fam_length": N, "segments": 0}, schedule="block"),
    ):
        with pytest.raises(ValueError, match="looks at a FAM, but this model has none"):
            maps_of(config, some_tokens(1, B))
    for time in (B - 1, B + 1, 0):
        with pytest.raises(ValueError, match=f"tokens has {time} columns, which are no whole blocks of {B}"):
            maps_of(fam_config(), some_tokens(1, time))

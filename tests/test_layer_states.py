"""States of all layers, against what the decoder itself computes and keeps."""

import jax
import numpy as np
import pytest
from reference import B, assert_close, decoder_config, params_of, runner, some_tokens
from router_models import DYNAMIC, FAM, LAYERS, STATIC, full, states_of

from lime_jax import (
    AttentionResidualsConfig,
    DenseFormerConfig,
    DepthAttentionConfig,
    HyperConnectionsConfig,
    LimeConfig,
)

MEMORIES = {
    "full": None,
    "bswa": {"segments": 1},
    "fam": FAM,
    "variants": {**FAM, "fam_init": "prefix", "fam_blocks": 2, "fam_ff": False, "layers": (1,)},
    "summary": {**FAM, "kind": "summary"},
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("mixing", "memory"),
    [
        *((None, memory) for memory in ("full", "fam", "variants")),
        *(pytest.param(None, memory, marks=pytest.mark.slow) for memory in ("bswa", "summary")),
        (DYNAMIC["dynamic_views"], "fam"),
        pytest.param(STATIC["static_kv"], "fam", marks=pytest.mark.slow),
        pytest.param(LimeConfig(backward="pull"), "fam", marks=pytest.mark.slow),
        (LimeConfig(backward="push"), "bswa"),
        (HyperConnectionsConfig(), "bswa"),
        (AttentionResidualsConfig(), "bswa"),
        (DenseFormerConfig(), "full"),
        (DepthAttentionConfig(), "full"),
        (STATIC["static_hidden"], "full"),
    ],
)
def test_states_are_those_of_the_decoder(mixing, memory):
    config = decoder_config(MEMORIES[memory], num_layers=LAYERS, mixing=mixing)
    tokens = some_tokens(2, 2 * B + 1)
    got, want = states_of(config, tokens), runner(config)(params_of(config), tokens)
    assert_close(got.logits, want.logits, 1e-12)
    if memory == "full":
        assert_close(got.mixed, want.state.open_v, 1e-12)
    if mixing is None:
        np.testing.assert_array_equal(got.mixed, got.values)
    if not isinstance(mixing, HyperConnectionsConfig):  # whose streams a layer reads by weights
        np.testing.assert_array_equal(got.hidden[0], np.asarray(params_of(config)["embed"])[tokens])


def test_memories_that_have_only_the_block_schedule_are_refused():
    config = decoder_config({"kind": "feedback"}, schedule="block")
    with pytest.raises(ValueError, match=r"the layer schedule, which memory.kind='feedback' does not have"):
        states_of(config, some_tokens(2, B))


def test_states_do_not_depend_on_padding_or_on_the_form_of_the_model():
    config = full(LimeConfig("dynamic_views"), parallel_block=True, tie_embeddings=False)
    tokens = some_tokens(2, 7)
    got = states_of(config, tokens, np.array([7, 4]))
    want = runner(config)(params_of(config), tokens).logits
    assert_close(got.logits[0], want[0], 1e-12)
    assert_close(got.logits[1, :4], want[1, :4], 1e-12)
    short = states_of(decoder_config({"segments": 1}, num_layers=LAYERS), tokens[:, : B - 1])  # less than a block
    assert short.hidden.shape == (LAYERS + 1, 2, min(B - 1, 7), config.d_model)
    fam = decoder_config(FAM, num_layers=LAYERS)
    tokens = some_tokens(2, 2 * B)
    padded = states_of(fam, tokens, np.array([2 * B, B + 1]))
    whole = states_of(fam, tokens[1:, : B + 1])
    assert_close(padded.hidden[:, 1, : B + 1], whole.hidden[:, 0], 1e-12)

"""One function, several execution orders: schedules, unrolled layers, remat; and the degenerate cases."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    B,
    N,
    as_pretrained,
    assert_close,
    assert_trees_close,
    decoder_config,
    fam_config,
    model_shapes,
    mostly_slow,
    params_of,
    quick_jit,
    random_params,
    runner,
    some_tokens,
)

from fam_jax import Decoder, RSPState, presets

T = 2 * B + 1
TOKENS = some_tokens(2, T + B + 2, seed=2)
STATE_FIELDS = ("fam", "segment_k", "segment_v", "open_k", "open_v")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def values_and_gradients(config, params_of=params_of):
    """Logits, next FAM, and gradients by the parameters and every array of a passed state."""
    params = params_of(config)
    # A state with a past of more than a block and, in each row, an open block of another length.
    first = runner(dataclasses.replace(config, schedule="layer", remat="none", scan_layers=True))
    state = first(params, TOKENS[:, : B + 2], lengths=np.array([B + 2, B - 1])).state
    training = {}
    if config.memory.rsp:
        fam = np.random.default_rng(4).standard_normal((config.num_layers, N, config.d_model))
        reset = np.array([[False, True, False], [True, False, True]])
        training = dict(key=jax.random.key(5), rsp=RSPState(fam=fam, valid=np.array(True)), reset=reset)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((2, T, config.vocab_size))
    fam_weights = rng.standard_normal(np.shape(state.fam))

    def loss(p, floats):
        before, text = state.replace(**floats), TOKENS[:, B + 2 : B + 2 + T]
        out = Decoder(config).apply({"params": p}, text, state=before, **training)
        total = jnp.sum(out.logits * weights) + jnp.sum(out.state.fam * fam_weights)
        return total, (out.logits, out.state.fam, out.rsp)

    floats = {name: getattr(state, name) for name in STATE_FIELDS}
    (_, values), gradients = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, floats)
    return {"values": values, "parameters": gradients[0], "state": gradients[1]}


CASES = {
    "fam": fam_config(),
    "fam, no segments, parallel, untied": fam_config({"segments": 0}, parallel_block=True, tie_embeddings=False),
    "fam, two segments, stopped": fam_config({"segments": 2, "stop_gradient": True}),
    "fam, absolute, pinned, old, in training": fam_config(
        {
            "positions": "absolute",
            "prompt_positions": "pinned",
            "fam_query": "old",
            "noise": 0.1,
            "rsp": 0.5,
            "rpo": True,
        }
    ),
    "bswa": decoder_config({"segments": 2, "window": 6}),
    "fam, all that pretrained models have": as_pretrained(fam_config()),
}


@mostly_slow(CASES, fast=("fam, absolute, pinned, old, in training", "bswa"))
def test_layer_and_block_schedule_agree_in_values_and_gradients(name, x64):
    config = CASES[name]
    layer = values_and_gradients(dataclasses.replace(config, schedule="layer"))
    block = values_and_gradients(dataclasses.replace(config, schedule="block"))
    assert_trees_close(layer, block, 1e-10)
    for path, leaf in jax.tree_util.tree_leaves_with_path(layer["parameters"]):
        assert np.any(leaf != 0), f"no gradient reaches {jax.tree_util.keystr(path)}"


OTHERS = {
    "fam in some layers": fam_config({"layers": (0, 2)}, num_layers=3),
    "three fams seen": fam_config({"fam_blocks": 3}),
    "prefix, clip": fam_config({"fam_init": "prefix", "clip": 0.5}),
    "static queries": fam_config({"kind": "summary"}),
    "remat": fam_config(remat="full"),
}


@mostly_slow(CASES | OTHERS, fast=("fam, absolute, pinned, old, in training",))
def test_wavefront_agrees_in_values_and_gradients(name, x64):
    config = (CASES | OTHERS)[name]
    layer = values_and_gradients(config)
    assert_trees_close(values_and_gradients(dataclasses.replace(config, schedule="wavefront")), layer, 1e-10)


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_wavefront_has_a_step_for_every_diagonal(blocks, x64):
    """More layers than blocks, and fewer; one block shares its diagonals with none."""
    config = fam_config(schedule="wavefront", num_layers=4)
    tokens = some_tokens(1, blocks * B)
    program = jax.make_jaxpr(lambda variables: Decoder(config).apply(variables, tokens, aligned=True).logits)
    loops = {int(length) for length in re.findall(r"\blength=(\d+)", str(program(model_shapes(config))))}
    # Over layers, which the prompt climbs, over the blocks that a layer sees at once, and over diagonals.
    assert loops == {4, 1, *([blocks + 3] if blocks > 1 else [])}


@functools.cache
def initial(config):
    """The parameters that training starts from; the same for both schedules."""
    if config.schedule != "layer":
        return initial(dataclasses.replace(config, schedule="layer"))
    return quick_jit(Decoder(config).init)(jax.random.key(1), TOKENS[:, :1])["params"]


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param("float32", 1e-5, marks=pytest.mark.slow), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize(
    "name", ["fam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fam, two segments, stopped", "bswa"))]
)
def test_schedules_agree_in_lower_precision(name, dtype, bound):
    """With the model's own initial weights: larger ones amplify rounding beyond what the tolerance is for."""
    config = dataclasses.replace(CASES[name], dtype=dtype, param_dtype="float32")
    layer = values_and_gradients(dataclasses.replace(config, schedule="layer"), initial)
    block = values_and_gradients(dataclasses.replace(config, schedule="block"), initial)
    assert layer["values"][0].dtype == np.float32
    assert_trees_close(layer, block, bound)


@pytest.mark.parametrize(
    ("schedule", "change"),
    [
        ("layer", {"scan_layers": False}),
        pytest.param("block", {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param("layer", {"remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=["layer-unrolled", "block-remat", "layer-remat"],
)
def test_unrolled_layers_and_remat_change_nothing(schedule, change, x64):
    config = fam_config(schedule=schedule)
    changed = dataclasses.replace(config, **change)
    assert jax.tree.map(jnp.shape, model_shapes(config)) == jax.tree.map(jnp.shape, model_shapes(changed))
    assert_trees_close(values_and_gradients(changed), values_and_gradients(config), 1e-10)


def test_full_attention_unrolled_and_remat_change_nothing(x64):
    config = decoder_config()
    params = params_of(config)
    grads = []
    for change in ({}, {"scan_layers": False}, {"remat": "full"}):
        model = Decoder(dataclasses.replace(config, **change))
        loss = quick_jit(jax.value_and_grad(lambda p, m=model: jnp.sum(m.apply({"params": p}, TOKENS).logits ** 2)))
        grads.append(loss(params))
    assert_trees_close(grads[1], grads[0], 1e-10)
    assert_trees_close(grads[2], grads[0], 1e-10)


# ------------------------------------------------------------------------------------------- degenerate cases


def test_one_block_without_segments_is_plain_causal(x64):
    params = params_of(decoder_config())
    want = runner(decoder_config())(params, TOKENS[:, :7]).logits
    got = runner(decoder_config({"block_size": 7, "segments": 0}))(params, TOKENS[:, :7]).logits
    assert_close(got, want)


def test_enough_segments_are_plain_causal(x64):
    params = params_of(decoder_config())
    want = runner(decoder_config())(params, TOKENS).logits
    for schedule in ("layer", "block"):
        got = runner(decoder_config({"segments": 3}, schedule=schedule))(params, TOKENS).logits
        assert_close(got, want, 1e-10, schedule)


def test_local_and_absolute_positions_agree(x64):
    params = params_of(fam_config())
    want = runner(fam_config())(params, TOKENS)
    got = runner(fam_config({"positions": "absolute"}))(params, TOKENS)
    assert_close(got.logits, want.logits)
    assert_close(got.state.fam, want.state.fam)


def test_gradient_stop_changes_no_value(x64):
    params = params_of(fam_config())
    want = runner(fam_config())(params, TOKENS).logits
    np.testing.assert_array_equal(runner(fam_config({"stop_gradient": True}))(params, TOKENS).logits, want)


# ------------------------------------------------------------------------------------------------- parameters


def count(config, embeddings=True):
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    leaves = jax.tree_util.tree_leaves_with_path(model_shapes(config)["params"])
    return sum(
        int(np.prod(leaf.shape)) for path, leaf in leaves if embeddings or "embed" not in jax.tree_util.keystr(path)
    )


def test_fam_adds_the_prompt_and_nothing_else():
    for parallel in (False, True):
        plain, fam = (make(parallel_block=parallel) for make in (lambda **k: decoder_config({}, **k), fam_config))
        assert count(fam) - count(plain) == N * fam.d_model


@pytest.mark.parametrize(("tied", "parallel"), [(True, False), (False, True)])
def test_parameter_tree(tied, parallel):
    config = fam_config(tie_embeddings=tied, parallel_block=parallel, dtype="float32", param_dtype="float32")
    layers, d, h, g, k, f = (
        config.num_layers,
        config.d_model,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.d_ff,
    )
    want = {
        "embed": (config.vocab_size, d),
        "fam_prompt": (N, d),
        "final_norm": (d,),
        "layers": {
            "attn_norm": (layers, d),
            "wq": (layers, d, h, k),
            "wk": (layers, d, g, k),
            "wv": (layers, d, g, k),
            "wo": (layers, h, k, d),
            "w_gate": (layers, d, f),
            "w_up": (layers, d, f),
            "w_down": (layers, f, d),
        },
    }
    if not tied:
        want["unembed"] = (d, config.vocab_size)
    if not parallel:
        want["layers"]["ff_norm"] = (layers, d)
    variables = quick_jit(Decoder(config).init)(jax.random.key(0), TOKENS)
    assert set(variables) == {"params"}
    assert jax.tree.map(jnp.shape, variables["params"]) == want
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    np.testing.assert_array_equal(variables["params"]["layers"]["attn_norm"], 1.0)
    logits = runner(config)(variables["params"], TOKENS).logits
    assert 0.01 < float(jnp.std(logits)) < 10.0, "an untrained model should neither be silent nor sure of itself"


@pytest.mark.parametrize(
    ("preset", "billions", "shape"),
    [
        ("palm_1b", 1.19, (18, 1536, 12, 12, 8 * 1536)),
        ("palm_8b", 8.59, (32, 4096, 32, 32, 4 * 4096)),
        ("palm_24b", 24.49, (56, 4096, 32, 1, 8 * 4096)),
    ],
)
def test_presets_have_the_sizes_of_the_paper(preset, billions, shape):
    config = getattr(presets, preset)()
    assert (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads, config.d_ff) == shape
    assert config.head_dim == 128
    assert (config.memory.block_size, config.memory.segments, config.memory.fam_length) == (1024, 3, 64)
    assert round(count(config, embeddings=False) / 1e9, 2) == billions


def test_tiny_preset_runs():
    config = presets.tiny()
    assert count(config) < 1_000_000
    params = random_params(config)
    out = runner(config)(params, some_tokens(1, 5, vocab=config.vocab_size))
    assert out.logits.shape == (1, 5, config.vocab_size)
    assert np.all(np.isfinite(out.logits))

"""The decoder against independent code: dense masked attention, and a loop over the paper's Algorithm 2."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    B,
    as_pretrained,
    assert_close,
    decoder_config,
    dense_decoder,
    fam_config,
    fam_decoder,
    mostly_slow,
    params_of,
    quick_jit,
    random_params,
    rms_norm,
    runner,
    some_tokens,
)

from fam_jax import Decoder
from lime_jax import LimeConfig

SCHEDULES = ("layer", "block")
T = 4 * B + 3  # an odd length: four whole blocks and an open one
TOKENS = some_tokens(2, T, seed=1)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


BLOCK = {"schedule": "block"}
PARALLEL = {"parallel_block": True}
ABSOLUTE = {"positions": "absolute"}

# Every choice under one schedule or the other; what both run is one function, and test_core_schedules compares them.
DENSE = {
    "full": decoder_config(),
    "full, multi-head, parallel, untied": decoder_config(num_kv_heads=4, tie_embeddings=False, **PARALLEL),
    "bswa 0, multi-query, base 100": decoder_config({"segments": 0}, num_kv_heads=1, rope_base=100.0, norm_eps=1e-3),
    "bswa 1": decoder_config({"segments": 1}, **BLOCK),
    "bswa 2, parallel, multi-query": decoder_config({"segments": 2}, num_kv_heads=1, **PARALLEL),
    "bswa 3, absolute": decoder_config({"segments": 3, **ABSOLUTE}, **BLOCK),
    "window B, gradient stopped": decoder_config({"window": B, "stop_gradient": True}),
    "window 2B+1 of 2": decoder_config({"segments": 2, "window": 2 * B + 1, **ABSOLUTE}, **BLOCK),
    "full, all that pretrained models have": as_pretrained(decoder_config()),
    "bswa 1, all that pretrained models have": as_pretrained(decoder_config({}, **PARALLEL, **BLOCK)),
    "blocks of one token": decoder_config({"block_size": 1, "segments": 3}),
}

FAM = {
    "default": fam_config(),
    "no segments": fam_config({"segments": 0}, **BLOCK),
    "as many rows as tokens, two segments, multi-query, parallel": fam_config(
        {"segments": 2, "fam_length": B}, num_kv_heads=1, **PARALLEL
    ),
    "old query slot, multi-head, untied": fam_config({"fam_query": "old"}, num_kv_heads=4, tie_embeddings=False),
    "old query slot, pinned": fam_config({"fam_query": "old", "prompt_positions": "pinned", **ABSOLUTE}, **BLOCK),
    "fractional": fam_config({"fam_positions": "fractional"}, **BLOCK),
    "fractional, old query slot, three rows": fam_config(
        {"fam_positions": "fractional", "fam_query": "old", "fam_length": 3, **ABSOLUTE}
    ),
    "zero": fam_config({"fam_positions": "zero", **ABSOLUTE}),
    "pinned": fam_config({"prompt_positions": "pinned", **ABSOLUTE}),
    "pinned, fractional": fam_config(
        {"prompt_positions": "pinned", "fam_positions": "fractional", **ABSOLUTE}, **BLOCK
    ),
    "first residual kept, one row, three layers": fam_config({"first_residual": "fam", "fam_length": 1}, num_layers=3),
    "first residual kept, parallel": fam_config({"first_residual": "fam"}, **PARALLEL, **BLOCK),
    "window": fam_config({"window": 3, "stop_gradient": True}),
    "all that pretrained models have": as_pretrained(fam_config()),
}


@pytest.mark.parametrize("name", DENSE)
def test_attention_without_fam_equals_dense_masked_attention(name, x64):
    config = DENSE[name]
    params = params_of(config)
    want = np.stack([dense_decoder(params, config, row) for row in TOKENS])
    assert_close(runner(config)(params, TOKENS).logits, want)


@mostly_slow(
    FAM,
    fast=set(FAM)
    - {
        "old query slot, multi-head, untied",
        "fractional, old query slot, three rows",
        "pinned, fractional",
        "first residual kept, parallel",
    },
)
def test_fam_equals_the_loop_over_algorithm_2(name, x64):
    config = FAM[name]
    params = params_of(config)
    out = runner(config)(params, TOKENS)
    want = [fam_decoder(params, config, row) for row in TOKENS]
    assert_close(out.logits, np.stack([read.logits for read in want]))
    assert_close(out.state.fam, np.stack([read.fam[-1] for read in want], axis=1))


def test_the_two_references_agree_where_both_apply():
    """Else one of them is wrong: without FAM rows the loop is BSWA."""
    for name in (
        "bswa 1",
        "bswa 2, parallel, multi-query",
        "window 2B+1 of 2",
        "blocks of one token",
    ):
        config = DENSE[name]
        with jax.enable_x64(True):
            params = params_of(config)
        assert_close(
            fam_decoder(params, config, TOKENS[0]).logits,
            dense_decoder(params, config, TOKENS[0]),
            1e-12,
            name,
        )


def test_the_state_after_every_length_is_that_of_the_loop(x64):
    """FAM, counters and freshness after 0 to 2B+1 tokens; a ragged block never updates FAM."""
    config = fam_config()
    params = params_of(config)
    length = 2 * B + 1
    rows = np.repeat(TOKENS[:1, :length], length + 1, axis=0)
    taken = np.arange(length + 1)
    for schedule in SCHEDULES:
        state = runner(dataclasses.replace(config, schedule=schedule))(params, rows, lengths=taken).state
        history = fam_decoder(params, config, rows[0]).fam
        for count in taken:
            # A fresh row reads the learned prompt, whatever its own slot of state.fam holds.
            if count >= B:
                assert_close(state.fam[:, count], history[count // B], 1e-10, f"{schedule}, after {count}")
        np.testing.assert_array_equal(state.offset, taken % B)
        np.testing.assert_array_equal(state.blocks, taken // B)
        np.testing.assert_array_equal(state.fresh, taken < B)


def test_gradients_equal_finite_differences_of_the_loop(x64):
    """A directional derivative, by central differences of independent code and by `jax.grad`."""
    config = fam_config({"segments": 1})
    params, direction = params_of(config), random_params(config, seed=5)
    tokens = TOKENS[0, : 2 * B + 2]
    weights = np.random.default_rng(6).standard_normal((len(tokens), config.vocab_size))

    def moved(step):
        return jax.tree.map(lambda p, q: np.asarray(p + step * q), params, direction)

    def loss(step):
        return float(np.sum(weights * fam_decoder(moved(step), config, tokens).logits))

    def model_loss(p):
        return (weights * Decoder(config).apply({"params": p}, tokens[None]).logits[0]).sum()

    step = 1e-5
    want = (loss(step) - loss(-step)) / (2 * step)
    gradient = quick_jit(jax.grad(model_loss))(params)
    got = sum(float(np.sum(g * q)) for g, q in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (fam_config(dtype="float32", param_dtype="float32"), 1e-5),
        pytest.param(
            fam_config(dtype="float32", param_dtype="float32", schedule="block", parallel_block=True),
            1e-5,
            marks=pytest.mark.slow,
        ),
        pytest.param(decoder_config(dtype="float32", param_dtype="float32"), 1e-5, marks=pytest.mark.slow),
        (fam_config(dtype="bfloat16", param_dtype="float32"), 2e-2),
        pytest.param(
            fam_config(dtype="bfloat16", param_dtype="float32", schedule="block"), 2e-2, marks=pytest.mark.slow
        ),
        (fam_config({"segments": 0}, dtype="bfloat16", param_dtype="bfloat16"), 2e-2),
        (fam_config(dtype="float32", param_dtype="bfloat16"), 1e-5),
    ],
    ids=["fam-f32", "fam-f32-block-parallel", "full-f32", "fam-bf16", "fam-bf16-block", "fam-all-bf16", "fam-bf16-f32"],
)
def test_lower_precisions_stay_within_their_tolerance(config, tolerance):
    """With the model's own initial weights: larger ones amplify rounding beyond what the tolerance is for."""
    params = quick_jit(Decoder(config).init)(jax.random.key(1), TOKENS)["params"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {config.param_dtype}
    with jax.default_matmul_precision("highest"):
        out = runner(config)(params, TOKENS)
    assert out.logits.dtype == np.float32
    want = [(fam_decoder if config.memory else dense_decoder)(params, config, row) for row in TOKENS]
    assert_close(out.logits, np.stack([read.logits if config.memory else read for read in want]), tolerance)


def test_gradients_of_bfloat16_parameters_in_float32():
    """Finite, of the parameters' type, and those of the same values as float32 parameters but for rounding."""
    exact = fam_config(mixing=LimeConfig(), dtype="float32", param_dtype="float32")
    half = dataclasses.replace(exact, param_dtype="bfloat16")
    params = quick_jit(Decoder(half).init)(jax.random.key(1), TOKENS)["params"]

    def gradients(config, params):
        def loss(p):
            out = Decoder(config).apply({"params": p}, TOKENS[:1, : 2 * B])
            assert out.logits.dtype == jnp.float32
            return -jnp.mean(jax.nn.log_softmax(out.logits)[..., 0]) + jnp.mean(out.state.fam**2)

        return quick_jit(jax.grad(loss))(params)

    got = gradients(half, params)
    want = gradients(exact, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.all(np.isfinite(a.astype(np.float32)))
        assert_close(a, b, 1e-2, jax.tree_util.keystr(path))


@pytest.mark.parametrize(("parallel", "schedule"), [(False, "layer"), (True, "block")])
def test_first_update_of_one_layer_by_hand(parallel, schedule, x64):
    """One layer, one block, one FAM row, everything written out: `F_1 = FF(norm(A)) + A`, no residual."""
    config = fam_config({"fam_length": 1, "segments": 0}, num_layers=1, parallel_block=parallel, num_kv_heads=4)
    params = params_of(config)
    w = {name: leaf[0] for name, leaf in params["layers"].items()}
    tokens = TOKENS[:1, :B]

    def norm(x, scale):
        return rms_norm(x, scale, config.norm_eps)

    def turn(x, position):  # head width 4: two pairs, turned by position and by position / base^(1/2)
        angles = position * np.array([1.0, config.rope_base**-0.5])
        pairs = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    prompt = params["fam_prompt"][0]
    rows = np.concatenate([params["fam_prompt"], params["embed"][tokens[0]]])
    y = norm(rows, w["attn_norm"])
    keys = np.stack([turn(np.einsum("d,dgk->gk", y[i], w["wk"]), i - 1) for i in range(B + 1)])
    values = np.einsum("nd,dgk->ngk", y, w["wv"])
    query = turn(np.einsum("d,dhk->hk", y[0], w["wq"]), B - 1)  # the last slot of the block being compressed
    weights = np.exp(np.einsum("hk,nhk->hn", query, keys) / np.sqrt(config.head_dim))
    read = np.einsum("hn,nhk->hk", weights / weights.sum(1, keepdims=True), values)
    attention = np.einsum("hk,hkd->d", read, w["wo"])
    z = norm(prompt, w["attn_norm"]) if parallel else norm(attention, w["ff_norm"])
    gate = z @ w["w_gate"]
    want = attention + ((gate / (1 + np.exp(-gate))) * (z @ w["w_up"])) @ w["w_down"]
    config = dataclasses.replace(config, schedule=schedule)
    assert_close(runner(config)(params, tokens).state.fam[0, 0, 0], want)

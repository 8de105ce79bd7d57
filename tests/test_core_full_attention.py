"""Streaming with full causal attention: a cache of a capacity, whose overflow is never silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, decoder_config, dense_decoder, params_of, quick_jit, runner, some_tokens

from fam_jax import Decoder

CONFIG = decoder_config()
T = 13
TOKENS = some_tokens(3, T, seed=12)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_splits_equal_one_call(x64):
    params, run = params_of(CONFIG), runner(CONFIG)
    want = run(params, TOKENS).logits
    for sizes in ([5, 8], [1] * 5 + [8], [8, 1, 1, 1, 1, 1]):
        state, parts, start = Decoder(CONFIG).init_state(3, max_length=T), [], 0
        for size in sizes:
            out = run(params, TOKENS[:, start : start + size], state=state)
            parts.append(out.logits)
            state, start = out.state, start + size
        assert_close(np.concatenate(parts, axis=1), want, 1e-10, str(sizes))


def test_rows_have_their_own_lengths(x64):
    params, run = params_of(CONFIG), runner(CONFIG)
    state = Decoder(CONFIG).init_state(3, max_length=T)
    taken = np.zeros(3, int)
    for lengths in ([5, 0, 2], [1, 5, 3], [4, 3, 5], [3, 5, 3]):
        chunk = np.zeros((3, 5), np.int32)
        for r, n in enumerate(lengths):
            chunk[r, :n] = TOKENS[r, taken[r] : taken[r] + n]
        out = run(params, chunk, state=state, lengths=np.array(lengths))
        for r in np.flatnonzero(lengths):
            n = lengths[r]
            want = dense_decoder(params, CONFIG, TOKENS[r, : taken[r] + n])[taken[r] :]
            assert_close(out.logits[r, :n], want, 1e-10, f"row {r} after {taken[r]}")
        state, taken = out.state, taken + lengths
    np.testing.assert_array_equal(taken, T)


def test_overflow_is_an_error_and_never_silent(x64):
    params, model = params_of(CONFIG), Decoder(CONFIG)
    run = runner(CONFIG)
    state = run(params, TOKENS[:, :6], state=model.init_state(3, max_length=8), lengths=np.array([6, 5, 6])).state
    with pytest.raises(ValueError, match="max_length"):
        model.apply({"params": params}, TOKENS[:, 6:9], state=state)
    # Compiled code cannot raise: the rows that overflow say so by NaN, the others are right.
    out = run(params, TOKENS[:, 5:8], state=state)
    assert np.all(np.isnan(out.logits[0, -1]))
    assert np.all(np.isnan(out.logits[2, -1]))
    text = np.concatenate([TOKENS[1, :5], TOKENS[1, 5:8]])
    assert_close(out.logits[1], dense_decoder(params, CONFIG, text)[5:])
    # Exactly full is no overflow.
    assert np.all(np.isfinite(run(params, TOKENS[:, :3], state=state, lengths=np.array([2, 3, 2])).logits[0, :2]))


def test_an_overflowed_row_stays_marked(x64):
    params, model = params_of(CONFIG), Decoder(CONFIG)
    run = runner(CONFIG)
    state = run(params, TOKENS[:1, :3], state=model.init_state(1, max_length=4)).state
    state = run(params, TOKENS[:1, 3:6], state=state).state
    assert np.all(np.isnan(run(params, TOKENS[:1, 6:9], state=state).logits))
    with pytest.raises(ValueError, match="max_length"):  # known before anything runs
        run(params, TOKENS[:1, :5], state=model.init_state(1, max_length=4))


def test_continuing_without_capacity_says_what_to_do():
    params, model = params_of(CONFIG), Decoder(CONFIG)
    with jax.enable_x64(True):
        state = model.apply({"params": params}, TOKENS).state
        with pytest.raises(ValueError, match="init_state") as caught:
            model.apply({"params": params}, TOKENS, state=state)
    assert "max_length" in str(caught.value)


def test_init_state_wants_a_capacity_here_and_only_here():
    with pytest.raises(ValueError, match="max_length"):
        Decoder(CONFIG).init_state(2)
    with pytest.raises(ValueError, match="max_length"):
        Decoder(CONFIG).init_state(2, max_length=0)
    with pytest.raises(ValueError, match="batch"):
        Decoder(CONFIG).init_state(0, max_length=4)


def test_gradients_flow_through_the_cache(x64):
    config = decoder_config(tie_embeddings=False)
    params, model = params_of(config), Decoder(config)
    text = np.arange(8, dtype=np.int32)[None]

    def one(p):
        return jnp.sum(model.apply({"params": p}, text).logits[0, 5:] ** 2)

    def two(p):
        state = model.apply({"params": p}, text[:, :5], state=model.init_state(1, max_length=9)).state
        return jnp.sum(model.apply({"params": p}, text[:, 5:], state=state).logits ** 2)

    whole, parts = quick_jit(lambda p: (jax.grad(one)(p), jax.grad(two)(p)))(params)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert_close(a, b)

"""Filters and penalties of sampling, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import B, decoder_config, fam_config, params_of, runner, some_tokens

from fam_jax import Decoder, generate
from fam_jax.sampling import Choice, keep_likely, penalise

F32 = dict(dtype="float32", param_dtype="float32")
SMALL = decoder_config({"segments": 0}, num_layers=1, **F32)
CONFIG = fam_config(**F32)
PROMPT = some_tokens(3, B + 2, seed=1)
LENGTHS = np.array([B + 2, 1, 4])
KEY = jax.random.key(5)


def reference_filter(logits, choice):
    """Which of the logits [v] may be sampled: top_k, then top_p, then min_p, each of what the one before has left."""
    kept = np.ones(len(logits), bool)
    order = np.argsort(-logits)
    if choice.top_k is not None:
        kept[order[choice.top_k :]] = False
    if choice.top_p is not None:
        weights = np.where(kept, np.exp(logits - logits.max()), 0)
        p = (weights / weights.sum())[order]
        kept[order[int(np.searchsorted(np.cumsum(p), choice.top_p)) + 1 :]] = False
    if choice.min_p is not None:
        weights = np.where(kept, np.exp(logits - logits.max()), 0)
        p = weights / weights.sum()
        kept &= p >= choice.min_p * p.max()
    return kept


def reference_penalty(logits, seen, penalty):
    """The logits [v] of one row; `seen` is any list of ids, repeated or not."""
    logits = logits.copy()
    for token in set(seen):
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    return logits


@pytest.mark.parametrize(
    "choice",
    [
        Choice(min_p=0.05),
        Choice(min_p=1.0),
        Choice(top_k=7, min_p=0.1),
        Choice(top_p=0.8, min_p=0.2),
        Choice(top_k=20, top_p=0.9, min_p=0.02),
    ],
)
def test_filters_keep_what_the_reference_keeps(choice):
    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * 2
    filtered = np.asarray(keep_likely(jnp.asarray(logits), choice))
    want = np.array([reference_filter(row, choice) for row in logits])
    np.testing.assert_array_equal(np.isfinite(filtered), want)
    np.testing.assert_array_equal(filtered[want], logits[want])
    assert want.any(axis=1).all()
    assert not want.all()


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_penalty_follows_the_reference(penalty):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 30)).astype(np.float32)
    rows = [rng.integers(0, 30, 9) for _ in range(4)]
    seen = np.array([np.isin(np.arange(30), row) for row in rows])
    want = [reference_penalty(row, ids, np.float32(penalty)) for row, ids in zip(logits, rows, strict=True)]
    np.testing.assert_allclose(penalise(jnp.asarray(logits), jnp.asarray(seen), penalty), want, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.5, pytest.param(0.6, marks=pytest.mark.slow)])
def test_greedy_with_a_penalty_is_the_penalised_argmax_of_one_call(penalty):
    """Of each row's own prompt, without its padding, and of what the row has got."""
    model, variables = Decoder(CONFIG), {"params": params_of(CONFIG)}
    out = generate(model, variables, PROMPT, 12, lengths=LENGTHS, repetition_penalty=penalty)
    width = max(LENGTHS) + 12
    for r, length in enumerate(LENGTHS):
        text = np.concatenate([PROMPT[r, :length], out.ids[r]])
        padded = np.pad(text, (0, width - len(text)))[None]
        logits = np.asarray(runner(CONFIG)(params_of(CONFIG), padded).logits)[0]
        for at in range(length, len(text)):
            assert text[at] == np.argmax(reference_penalty(logits[at - 1], text[:at], penalty)), (r, at)
    plain = generate(model, variables, PROMPT, 12, lengths=LENGTHS)
    assert np.any(plain.ids != out.ids)
    one = generate(model, variables, PROMPT, 12, lengths=LENGTHS, repetition_penalty=1)
    np.testing.assert_array_equal(one.ids, plain.ids)


def test_a_large_penalty_forbids_repetition():
    model, variables = Decoder(SMALL), {"params": params_of(SMALL)}
    ids = np.asarray(generate(model, variables, PROMPT[:1], 12, repetition_penalty=1e30).ids)[0]
    assert not set(ids) & set(PROMPT[0]) or len(set(ids) | set(PROMPT[0])) == SMALL.vocab_size


def test_min_p_draws_from_the_likely_only():
    model, variables = Decoder(SMALL), {"params": params_of(SMALL)}
    rows = np.repeat(PROMPT[:1, :3], 300, axis=0)
    logits = np.asarray(runner(SMALL)(params_of(SMALL), rows[:1]).logits)[0, -1] / 6
    allowed = np.flatnonzero(reference_filter(logits, Choice(min_p=0.3)))
    ids = np.asarray(generate(model, variables, rows, 1, temperature=6.0, key=KEY, min_p=0.3).ids)[:, 0]
    assert 1 < len(allowed) < SMALL.vocab_size
    assert set(ids) == set(allowed)
    alone = np.asarray(generate(model, variables, rows, 1, temperature=6.0, key=KEY, min_p=1.0).ids)[:, 0]
    assert set(alone) == {np.argmax(logits)}


@pytest.mark.parametrize(
    "bad",
    [
        {"min_p": 0.0},
        {"min_p": 1.5},
        {"min_p": "some"},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": "1.1"},
        {"repetition_penalty": None},
    ],
)
def test_impossible_settings_are_one_clear_error(bad):
    model, variables = Decoder(SMALL), {"params": params_of(SMALL)}
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed; it must be above 0"):
        generate(model, variables, PROMPT, 2, temperature=1.0, key=KEY, **bad)

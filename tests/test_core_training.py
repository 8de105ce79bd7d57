"""What happens in training only: Random State Passing, Random Position Offset, FAM noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import B, N, assert_close, fam_config, fam_decoder, params_of, quick_jit, runner, some_tokens

from fam_jax import Decoder, RSPState

SCHEDULES = ("layer", "block")
layer_schedule = pytest.mark.parametrize("schedule", ["layer", pytest.param("block", marks=pytest.mark.slow)])
TEXT = some_tokens(2, 3 * B + 1, seed=1)
KEY = jax.random.key(3)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def stored(config, seed=2, valid=True):
    shape = (config.num_layers, config.memory.fam_length, config.d_model)
    return RSPState(fam=np.random.default_rng(seed).standard_normal(shape), valid=np.array(valid))


def both(memory, **changes):
    return [fam_config(memory, schedule=schedule, **changes) for schedule in SCHEDULES]


# --------------------------------------------------------------------------------------- Random State Passing


@pytest.mark.parametrize(
    ("schedule", "parallel"), [("layer", False), pytest.param("block", True, marks=pytest.mark.slow)]
)
def test_rsp_one_starts_every_row_from_the_stored_state(schedule, parallel, x64):
    """With an ordinary residual in the first update, unlike a fresh start, and with empty segments."""
    config = fam_config({"rsp": 1.0}, schedule=schedule, parallel_block=parallel)
    params, rsp = params_of(config), stored(config)
    out = runner(config)(params, TEXT, key=KEY, rsp=rsp)
    want = [fam_decoder(params, config, row, initial=rsp.fam) for row in TEXT]
    assert_close(out.logits, np.stack([read.logits for read in want]))
    assert_close(out.state.fam, np.stack([read.fam[-1] for read in want], axis=1))
    assert_close(out.rsp.fam, want[0].fam[-1])
    assert bool(out.rsp.valid)


def test_rsp_is_never_used_at_zero_nor_in_evaluation_nor_before_there_is_one(x64):
    config, never = fam_config({"rsp": 1.0}), fam_config({"rsp": 0.0})
    params = params_of(config)
    want = runner(config)(params, TEXT).logits
    for got in (
        runner(never)(params, TEXT, key=KEY, rsp=stored(config)),
        runner(config)(params, TEXT, rsp=stored(config)),
        runner(config)(params, TEXT, key=KEY, rsp=stored(config, valid=False)),
    ):
        assert_close(got.logits, want, 1e-12)
        assert bool(got.rsp.valid)  # it is stored all the same
    assert runner(config)(params, TEXT, key=KEY).rsp is None
    zeros = RSPState.zeros(config)
    assert zeros.fam.shape == stored(config).fam.shape
    assert not bool(zeros.valid)


def test_rsp_draws_for_every_row(x64):
    """At one half, some rows start from the prompt and the others from the stored state, the same in both."""
    configs = both({"rsp": 0.5})
    params, rsp = params_of(configs[0]), stored(configs[0])
    rows = np.repeat(TEXT[:1], 24, axis=0)
    fresh = fam_decoder(params, configs[0], TEXT[0]).logits
    passed = fam_decoder(params, configs[0], TEXT[0], initial=rsp.fam).logits
    drawn = []
    for config in configs:
        logits = runner(config)(params, rows, key=KEY, rsp=rsp).logits
        used = np.array([np.allclose(row, passed, atol=1e-9) for row in logits])
        assert all(used[r] or np.allclose(logits[r], fresh, atol=1e-9) for r in range(24))
        drawn.append(used)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert 4 <= drawn[0].sum() <= 20
    other = runner(configs[0])(params, rows, key=jax.random.key(4), rsp=rsp).logits
    assert any(drawn[0] != np.array([np.allclose(row, passed, atol=1e-9) for row in other]))


@layer_schedule
def test_rsp_draws_only_where_a_document_starts(schedule, x64):
    """A row that goes on keeps its state; one that is reset, now or later in a call, takes the stored one."""
    config = fam_config({"rsp": 1.0}, schedule=schedule)
    params, rsp, run = params_of(config), stored(config), runner(config)
    past = some_tokens(3, B + 2, seed=5)
    state = run(params, past).state
    text = some_tokens(3, 2 * B, seed=6)
    reset = np.array([[False, False], [True, False], [False, True]])
    out = run(params, text, state=state, key=KEY, rsp=rsp, reset=reset)
    going_on = fam_decoder(params, config, np.concatenate([past[0], text[0]]))
    at_once = fam_decoder(params, config, text[1], initial=rsp.fam)
    assert_close(out.logits[0], going_on.logits[B + 2 :])
    assert_close(out.logits[1], at_once.logits)
    edge = B - 2  # row 2 fills its open block first
    assert_close(out.logits[2, :edge], fam_decoder(params, config, np.r_[past[2], text[2, :edge]]).logits[B + 2 :])
    assert_close(out.logits[2, edge:], fam_decoder(params, config, text[2, edge:], initial=rsp.fam).logits)


def test_no_gradient_enters_the_stored_state_and_none_reaches_an_unused_prompt(x64):
    config = fam_config({"rsp": 1.0})
    params, model = params_of(config), Decoder(config)

    def loss(p, fam, valid):
        out = model.apply({"params": p}, TEXT, key=KEY, rsp=RSPState(fam=fam, valid=valid))
        return jnp.sum(out.logits**2) + jnp.sum(out.rsp.fam**2)

    def logits_only(p, fam, valid):
        return jnp.sum(model.apply({"params": p}, TEXT, key=KEY, rsp=RSPState(fam=fam, valid=valid)).logits ** 2)

    gradients = quick_jit(lambda *args: (jax.grad(loss, (0, 1))(*args), jax.grad(logits_only)(args[0], *args[1:])))
    fam = jnp.asarray(stored(config).fam)
    (by_params, by_fam), without = gradients(params, fam, jnp.array(True))
    assert np.all(by_fam == 0)
    assert np.all(by_params["fam_prompt"] == 0)
    assert np.any(by_params["embed"] != 0)
    # What is stored for the next step is a value, not a part of this step's function.
    for a, b in zip(jax.tree.leaves(by_params), jax.tree.leaves(without), strict=True):
        assert_close(a, b, 1e-12)
    (by_params, by_fam), _ = gradients(params, fam, jnp.array(False))
    assert np.all(by_fam == 0)
    assert np.any(by_params["fam_prompt"] != 0)


@layer_schedule
def test_what_rsp_stores(schedule, x64):
    """Row 0 after its last complete block without padding; what was stored stays when there is none."""
    config = fam_config({"rsp": 0.5}, schedule=schedule)
    params, rsp, run = params_of(config), stored(config), runner(config)
    history = fam_decoder(params, config, TEXT[0]).fam  # at the start and after three blocks
    nothing = np.zeros((2, 4), bool)

    def after(lengths=None, padded=nothing, reset=nothing, tokens=TEXT):
        lengths = np.array([tokens.shape[1]] * 2 if lengths is None else lengths)
        return run(params, tokens, lengths=lengths, padded=padded, reset=reset, rsp=rsp).rsp

    assert_close(after().fam, history[3])
    assert_close(after(lengths=[2 * B + 3, 3 * B]).fam, history[2])  # the ragged block does not count
    assert_close(after(lengths=[B, 0]).fam, history[1])
    assert_close(after(lengths=[B - 1, 3 * B]).fam, rsp.fam, 0.0)
    assert_close(after(lengths=[0, 3 * B]).fam, rsp.fam, 0.0)
    third, second = nothing.copy(), nothing.copy()
    third[0, 2] = second[0, 1] = True
    other_row = nothing.copy()
    other_row[1] = True
    assert_close(after(padded=third).fam, history[2])
    assert_close(after(padded=second).fam, history[3])
    assert_close(after(padded=third | second).fam, history[1])
    assert_close(after(padded=other_row).fam, history[3])
    # The tail of a document, then a new one: its block is stored, or, if that stays open, the one before.
    new = fam_decoder(params, config, TEXT[0, 2 * B :]).fam
    assert_close(after(padded=second, reset=third).fam, new[1])
    assert_close(after(padded=second, reset=third, lengths=[2 * B + 1, 0]).fam, history[1])


def test_rsp_storage_counts_blocks_from_the_open_one(x64):
    """With a passed state, block 0 of `padded` is the block that was open."""
    config = fam_config({"rsp": 0.5})
    params, rsp, run = params_of(config), stored(config), runner(config)
    text = np.concatenate([TEXT[:, :], TEXT[:, :]], axis=1)
    history = fam_decoder(params, config, text[0]).fam
    state = run(params, text[:, : B + 3]).state
    flags = np.array([[False, False], [False, False]])
    chunk = text[:, B + 3 : 3 * B + 1]  # ends block 1, fills block 2, opens block 3 with one token
    assert_close(run(params, chunk, state=state, padded=flags, rsp=rsp).rsp.fam, history[3])
    flags = np.array([[False, True], [False, False]])
    assert_close(run(params, chunk, state=state, padded=flags, rsp=rsp).rsp.fam, history[2])
    flags = np.array([[True, True], [False, False]])
    assert_close(run(params, chunk, state=state, padded=flags, rsp=rsp).rsp.fam, rsp.fam, 0.0)


# ------------------------------------------------------------------------------------- Random Position Offset


def test_rpo_does_nothing_where_everything_moves_with_the_offset(x64):
    config = fam_config({"positions": "absolute", "rpo": True})
    params = params_of(config)
    rows = np.repeat(TEXT, 4, axis=0)
    want = runner(config)(params, rows).logits
    assert_close(runner(config)(params, rows, key=KEY).logits, want, 1e-8)


@pytest.mark.parametrize(
    "memory",
    [{"fam_positions": "zero"}, pytest.param({"prompt_positions": "pinned"}, marks=pytest.mark.slow)],
    ids=["zero", "pinned"],
)
def test_rpo_matters_where_fam_does_not_move(memory, x64):
    """About half of the rows are offset, each by an amount of its own; both schedules draw the same."""
    configs = both({"positions": "absolute", "rpo": True, **memory})
    params, rows = params_of(configs[0]), np.repeat(TEXT[:1], 24, axis=0)
    want = fam_decoder(params, configs[0], TEXT[0]).logits
    layer, block = (runner(config)(params, rows, key=KEY).logits for config in configs)
    assert_close(layer, block, 1e-8)
    moved = [row for row in np.asarray(layer) if np.max(np.abs(row - want)) > 1e-6]
    assert 4 <= len(moved) <= 20
    assert all(np.max(np.abs(a - b)) > 1e-6 for i, a in enumerate(moved) for b in moved[:i])
    assert_close(runner(configs[0])(params, rows).logits[0], want)  # evaluation has no offset


# -------------------------------------------------------------------------------------------------- FAM noise


def deviations(config, params, text, batch, key):
    """The noise of the first block and of the second, in units of the FAM's size: [L, b, N, d] each."""
    clean, noisy = (
        runner(dataclasses.replace(config, memory=dataclasses.replace(config.memory, noise=0.0))),
        runner(config),
    )
    rows = np.repeat(text[:1], batch, axis=0)

    def units(got, want):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        return (got - want) / np.sqrt(np.mean(want**2, axis=-1, keepdims=True)) / config.memory.noise

    first = noisy(params, rows[:, :B], key=key).state
    second = noisy(params, rows[:, : 2 * B], key=key).state
    # Block 2 without its own noise but on top of that of block 1.
    quiet = clean(params, rows[:, B : 2 * B], state=first).state
    return units(first.fam, clean(params, rows[:, :B]).state.fam), units(second.fam, quiet.fam)


def test_noise_has_its_relative_size_and_differs_by_layer_block_and_row(x64):
    config = fam_config({"noise": 0.1})
    first, second = deviations(config, params_of(config), TEXT, 12, KEY)
    for block in (first, second):
        assert np.mean(block) == pytest.approx(0, abs=0.12)  # 768 draws: three standard errors
        assert np.std(block) == pytest.approx(1, abs=0.1)
    draws = np.stack([first, second]).reshape(-1, N * config.d_model)  # block x layer x row
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.max(np.abs(correlation)) < 0.8
    between_fam_rows = np.corrcoef(first[:, :, 0].ravel(), first[:, :, 1].ravel())[0, 1]
    assert abs(between_fam_rows) < 0.2


def test_both_schedules_draw_the_same_noise_and_the_key_decides(x64):
    layer, block = both({"noise": 0.15, "segments": 2})
    params = params_of(layer)
    outs = [runner(config)(params, TEXT, key=KEY) for config in (layer, block)]
    assert_close(outs[0].logits, outs[1].logits)
    assert_close(outs[0].state.fam, outs[1].state.fam)
    again, other = (runner(layer)(params, TEXT, key=key).logits for key in (KEY, jax.random.key(4)))
    np.testing.assert_array_equal(outs[0].logits, again)
    assert np.max(np.abs(other - again)) > 1e-3
    # Block 1 reads the prompt, which has no noise; every later token reads it.
    clean = runner(layer)(params, TEXT).logits
    assert_close(again[:, :B], clean[:, :B], 1e-12)
    assert np.all(np.max(np.abs(again[:, B:] - clean[:, B:]), axis=-1) > 1e-6)


def test_noise_is_off_without_a_key_and_a_key_alone_changes_nothing(x64):
    quiet, noisy = fam_config(), fam_config({"noise": 0.15})
    params = params_of(quiet)
    want = runner(quiet)(params, TEXT).logits
    np.testing.assert_array_equal(runner(noisy)(params, TEXT).logits, want)
    assert_close(runner(quiet)(params, TEXT, key=KEY).logits, want, 1e-12)

"""Who can read whom: causality, reach, the edges of the FAM update, by exact-zero gradients and equal bits.

With one token id per position and separate output weights, row j of the gradient by the embedding table is
the gradient by the input at position j. An influence matrix [t, j] then says how much the logits at t depend
on the input at j; masked attention makes its zeros exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    B,
    N,
    assert_close,
    decoder_config,
    fam_config,
    mostly_slow,
    params_of,
    quick_jit,
    runner,
    some_tokens,
)

from fam_jax import Decoder

LAYERS = 3
T = 5 * B + 2
TEXT = np.arange(T, dtype=np.int32)[None]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def spread(make, memory, **changes):
    """A configuration with an embedding for every position and no way back through tied weights."""
    return make(memory, tie_embeddings=False, num_layers=LAYERS, vocab_size=T, **changes)


@functools.cache
def influence(config):
    """Max |d logits[t] . w / d input[j]| as a [T, T] array (queries down, inputs across); call under x64."""
    params, model = params_of(config), Decoder(config)
    weights = np.random.default_rng(1).standard_normal(config.vocab_size)

    def outputs(embed):
        return model.apply({"params": {**params, "embed": embed}}, TEXT).logits[0] @ weights

    gradients = quick_jit(jax.jacrev(outputs))(jnp.asarray(params["embed"]))
    assert np.all(np.isfinite(gradients))
    return np.max(np.abs(gradients), axis=-1)


def reach_of_bswa(segments, layers=LAYERS):
    """Inputs that a token can read: `layers * segments * B + offset` tokens back, its own included."""
    q, k = np.indices((T, T))
    return (k <= q) & (q - k <= layers * segments * B + q % B)


def assert_reads(matrix, expected):
    """Exactly zero where nothing may be read, non-zero everywhere else."""
    wrong = np.argwhere((matrix != 0) != expected)
    assert wrong.size == 0, f"(token, input) pairs that should {'not ' * (matrix[tuple(wrong[0])] != 0)}read: {wrong}"


CAUSAL = np.tri(T, dtype=bool)
BLOCK_DIAGONAL = reach_of_bswa(0)

BLOCK = {"schedule": "block"}
PARALLEL = {"parallel_block": True}

REACH = {
    "full attention": (spread(decoder_config, None), CAUSAL),
    "no segments": (spread(decoder_config, {"segments": 0}), BLOCK_DIAGONAL),
    "one segment": (spread(decoder_config, {"segments": 1}), reach_of_bswa(1)),
    "one segment, gradient stopped": (
        spread(decoder_config, {"stop_gradient": True}, **PARALLEL, **BLOCK),
        BLOCK_DIAGONAL,
    ),
    "fam, no segments": (spread(fam_config, {"segments": 0}, **BLOCK), CAUSAL),
    "fam, parallel": (spread(fam_config, {}, **PARALLEL), CAUSAL),
    "fam, segments stopped": (spread(fam_config, {"stop_gradient": True}), CAUSAL),
    "fam, zero positions, first residual": (
        spread(fam_config, {"positions": "absolute", "fam_positions": "zero", "first_residual": "fam"}, **BLOCK),
        CAUSAL,
    ),
}


@mostly_slow(
    REACH, fast=("full attention", "no segments", "one segment", "one segment, gradient stopped", "fam, no segments")
)
def test_every_token_reads_exactly_what_it_may(name, x64):
    """Causality (inside block 1 too) and reach: zero above the diagonal and beyond, non-zero within."""
    config, expected = REACH[name]
    assert_reads(influence(config), expected)


def test_reach_of_one_segment_is_layers_times_segments_times_block_plus_offset(x64):
    """In numbers: through 3 layers, tokens 16 (offset 0) and 19 (offset 3) read back to 4, token 20 to 8."""
    matrix = influence(REACH["one segment"][0])
    assert [int(np.flatnonzero(matrix[t])[0]) for t in (16, 17, 19, 20)] == [4, 4, 4, 8]


def test_window_reach(x64):
    """Under a window each layer reads window - 1 tokens back, and nothing older than its segments."""
    window = B + 1
    matrix = influence(spread(decoder_config, {"window": window}))
    q, k = np.indices((T, T))
    assert_reads(matrix, (k <= q) & (q - k <= LAYERS * (window - 1)))


@pytest.mark.parametrize(("schedule", "parallel"), [("layer", False), ("block", True)])
def test_changing_a_token_leaves_every_earlier_logit_bit_for_bit(schedule, parallel):
    config = fam_config(schedule=schedule, parallel_block=parallel, dtype="float32", param_dtype="float32")
    params, run = params_of(config), runner(config)
    text = some_tokens(1, T, seed=2)
    before = run(params, text).logits
    for j in range(T):
        changed = text.copy()
        changed[0, j] = (changed[0, j] + 1) % config.vocab_size
        after = run(params, changed).logits
        np.testing.assert_array_equal(after[0, :j], before[0, :j], err_msg=f"token {j}")
        assert np.any(np.asarray(after[0, j:]) != np.asarray(before[0, j:]), axis=-1).all(), f"token {j}"


def test_values_cross_stopped_segments_that_gradients_do_not(x64):
    """Stop-gradient is about learning only: the old token still changes the logits."""
    config = spread(decoder_config, {"stop_gradient": True})
    params, run = params_of(config), runner(config)
    changed = TEXT.copy()
    changed[0, B] = 0
    difference = np.max(np.abs(run(params, changed).logits - run(params, TEXT).logits)[0], axis=-1)
    np.testing.assert_array_equal(difference != 0, reach_of_bswa(1)[:, B])


def test_stop_gradient_holds_for_a_passed_state(x64):
    """The segments of a state are cached segments too; its open block and FAM are not."""
    config = fam_config({"stop_gradient": True})
    params, model = params_of(config), Decoder(config)
    before = runner(config)(params, some_tokens(1, B + 2, seed=3)).state
    floats = {name: getattr(before, name) for name in ("fam", "segment_k", "segment_v", "open_k", "open_v")}

    def loss(values):
        out = model.apply({"params": params}, some_tokens(1, B, seed=4), state=before.replace(**values))
        return jnp.sum(out.logits**2)

    gradients = quick_jit(jax.grad(loss))(floats)
    assert np.all(gradients["segment_k"] == 0)
    assert np.all(gradients["segment_v"] == 0)
    assert np.any(gradients["fam"] != 0)
    assert np.any(gradients["open_k"][:, :, :2] != 0)


# --------------------------------------------------------------------------------------------- the FAM update


def fam_jacobians(config, *wanted):
    """Derivatives of one channel mix of the third block's FAM [l, row], and of its logits, by fields of the state."""
    params, model = params_of(config), Decoder(config)
    before = runner(config)(params, TEXT[:, : 2 * B]).state
    weights = np.random.default_rng(5).standard_normal(config.d_model)

    def outputs(fields):
        out = model.apply({"params": params}, TEXT[:, 2 * B : 3 * B], state=before.replace(**fields))
        return out.state.fam[:, 0] @ weights, out.logits[0] @ np.ones(config.vocab_size)

    return quick_jit(jax.jacrev(outputs))({name: getattr(before, name) for name in wanted})


def test_fam_queries_ignore_the_segments(x64):
    """The update of layer l sees no segments; those of lower layers matter through tokens only."""
    names = ("segment_k", "segment_v")
    by_fam, by_logits = fam_jacobians(spread(fam_config, {}, **BLOCK), *names)
    for name in names:
        assert np.any(by_logits[name] != 0)  # tokens do read them
        for layer in range(LAYERS):
            for source in range(LAYERS):
                reached = np.any(by_fam[name][layer, :, source] != 0)
                assert reached == (source < layer), f"{name} {source} -> fam {layer}"


def test_fam_queries_read_every_fam_row_and_no_other_layer_directly(x64):
    """Old FAM of layer j reaches new FAM of layer l: all rows if l = j, through tokens if l > j, else not."""
    by_fam = fam_jacobians(spread(fam_config, {"segments": 0}), "fam")[0]["fam"]
    for layer in range(LAYERS):
        for source in range(LAYERS):
            for row in range(N):
                for other in range(N):
                    reached = np.any(by_fam[layer, row, source, 0, other] != 0)
                    assert reached == (source <= layer), f"row {other} of {source} -> row {row} of {layer}"


def test_fam_queries_read_the_whole_block(x64):
    """Every row of every layer's FAM reads every token of its block, the last one too, and earlier blocks."""
    config = spread(fam_config, {"segments": 0})
    params, model = params_of(config), Decoder(config)
    weights = np.random.default_rng(6).standard_normal(config.d_model)

    def outputs(embed):
        return model.apply({"params": {**params, "embed": embed}}, TEXT[:, : 2 * B + 1]).state.fam[:, 0] @ weights

    by_embed = np.asarray(quick_jit(jax.jacrev(outputs))(jnp.asarray(params["embed"])))
    reads = np.any(by_embed != 0, axis=-1)
    assert reads[:, :, : 2 * B].all()
    assert not reads[:, :, 2 * B :].any()  # nothing of the block that is still open


def test_fam_update_does_not_depend_on_the_order_of_the_block(x64):
    """Permuting the tokens of a block with their positions leaves the first layer's update unchanged.

    The model gives positions by order, so the equivalent here is a model for which positions say nothing:
    queries are zero on the pair of channels that turns, and by its large base the other pair does not turn.
    """
    config = fam_config({"segments": 0}, rope_base=1e30)
    plain = params_of(config)
    wq = plain["layers"]["wq"].copy()
    wq[..., [0, config.head_dim // 2]] = 0.0
    still = {**plain, "layers": {**plain["layers"], "wq": wq}}
    run, text = runner(config), some_tokens(1, 2 * B, seed=7)
    order = np.r_[np.arange(B), B + np.array([2, 0, 3, 1])]
    shuffled = text[:, order]
    first, second = (run(still, tokens).state.fam for tokens in (text, shuffled))
    assert_close(first[0], second[0], 1e-10)
    assert np.max(np.abs(first[1] - second[1])) > 1e-3  # tokens are causal: above, the order matters
    first, second = (run(plain, tokens).state.fam for tokens in (text, shuffled))
    assert np.max(np.abs(first[0] - second[0])) > 1e-3  # and so it does where positions speak

"""What `Decoder`, its state and `generate` say to arguments that cannot work, and what they take besides arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax import Decoder, DecoderConfig, MemoryConfig, RSPState, generate
from fam_jax.sampling import Choice

CONFIG = DecoderConfig(
    vocab_size=11,
    num_layers=2,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    d_ff=8,
    memory=MemoryConfig(block_size=4, segments=1, fam_length=2),
)
MODEL = Decoder(CONFIG)
TOKENS = jnp.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)


def test_lists_are_tokens_too(variables):
    got = MODEL.apply(variables, [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]).logits
    np.testing.assert_array_equal(got, MODEL.apply(variables, TOKENS).logits)


@pytest.mark.parametrize("bad", [11, -1])
def test_ids_outside_the_vocabulary_are_refused_where_they_are_known(variables, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 11 ids"):
        MODEL.apply(variables, jnp.array([[1, bad]]))


@pytest.mark.parametrize("tokens", [[1, 2], [[1.0, 2.0]], [["a"]]])
def test_other_tokens_are_refused(variables, tokens):
    with pytest.raises(ValueError, match="tokens must be integer ids of shape"):
        MODEL.apply(variables, tokens)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", [[1, 2], [3]]),
        ("lengths", [[1, 2], [3]]),
        ("lengths", "52"),
        ("lengths", [5, 6]),
        ("lengths", [2**32, 5]),
        ("reset", [[True, False], [True]]),
        ("padded", ["a", "b"]),
    ],
)
def test_lists_that_fit_no_call_are_named(variables, name, value):
    with pytest.raises(ValueError, match=name):
        MODEL.apply(variables, **{"tokens": TOKENS, name: value})


def test_lengths_beyond_the_columns(variables):
    """Refused where values are known; inside of jit they count as all columns or none, as the docstring says."""

    @jax.jit
    def apply(lengths):
        return MODEL.apply(variables, TOKENS, lengths=lengths)

    for wrong, meant in (([9, 5], [5, 5]), ([-2, 3], [0, 3])):
        with pytest.raises(ValueError, match=r"lengths=.* is not allowed; each must be between 0 and the 5 columns"):
            MODEL.apply(variables, TOKENS, lengths=jnp.array(wrong))
        jax.tree.map(np.testing.assert_array_equal, apply(jnp.array(wrong)), apply(jnp.array(meant)))


@pytest.mark.parametrize(
    ("rsp", "message"),
    [
        (jnp.zeros((2, 2, 8)), r"rsp is a \w+; pass RSPState\.zeros"),
        (RSPState(jnp.zeros((2, 3, 8)), jnp.array(True)), r"rsp\.fam is float32\[2, 3, 8\], .* float32\[2, 2, 8\]"),
        (RSPState(jnp.zeros((2, 2, 8)), jnp.ones(2, bool)), r"rsp\.valid is bool\[2\], .* bool\[\]"),
        (RSPState(jnp.zeros((2, 2, 8)), 1), r"rsp\.valid is int"),
        (RSPState(None, None), r"rsp\.fam is NoneType"),
        (RSPState(jnp.zeros((2, 2, 8)), None), r"rsp\.valid is NoneType"),
    ],
)
def test_what_is_no_stored_fam_of_this_model(variables, rsp, message):
    with pytest.raises(ValueError, match=message):
        MODEL.apply(variables, TOKENS, rsp=rsp)


@pytest.mark.parametrize("count", [0, -1, 4.5, 2.0, True, "3", None])
def test_counts_of_rows_and_tokens(count):
    full = Decoder(DecoderConfig(11, 1, 8, 2, 1, 4, 8))
    with pytest.raises(ValueError, match=f"batch={count!r} is not allowed; a state needs a whole number of rows"):
        MODEL.init_state(count)
    with pytest.raises(ValueError, match=f"max_length={count!r} is not allowed; with full attention"):
        full.init_state(1, count)


def test_an_output_is_no_state(variables):
    out = MODEL.apply(variables, TOKENS)
    with pytest.raises(ValueError, match="state is a DecoderOutput; pass the `state`"):
        MODEL.apply(variables, TOKENS, state=out)


@pytest.mark.parametrize("rows", [[0, 2], [-3], 0, [[0]], [0.5]])
def test_rows_that_a_state_has_not(rows):
    with pytest.raises(ValueError, match="indices="):
        MODEL.init_state(2).rows(rows)


def test_rows_may_repeat_and_be_traced():
    state = MODEL.init_state(2)
    assert state.rows([1, 1, -2]).offset.shape == (3,)
    assert jax.jit(state.rows)(jnp.array([1])).offset.shape == (1,)


def test_float64_needs_x64():
    if jax.config.read("jax_enable_x64"):
        pytest.skip("float64 is on")
    model = Decoder(DecoderConfig(11, 1, 8, 2, 1, 4, 8, dtype="float64"))
    with pytest.raises(ValueError, match="jax_enable_x64"):
        model.init(jax.random.key(0), TOKENS)


def test_a_part_of_another_module():
    """`init` of a module that goes on with the logits."""

    class Scorer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3)(Decoder(CONFIG)(tokens).logits)

    out, variables = Scorer().init_with_output(jax.random.key(0), TOKENS)
    assert out.shape == Scorer().apply(variables, TOKENS).shape == (2, 5, 3)


def test_numpy_integers_are_integers(variables):
    assert DecoderConfig(np.int64(11), 1, 8, 2, 1, 4, 8).vocab_size == 11
    assert generate(MODEL, variables, TOKENS, np.int64(2)).ids.shape == (2, 2)


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"top_k": 12}, {"top_k": 0}, {"stop_tokens": 5}])
def test_impossible_generation(variables, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate(MODEL, variables, TOKENS, **{"max_new_tokens": 1, "temperature": 0.0} | bad)


@pytest.mark.parametrize(("field", "value"), [("clip", 1.0), ("noise", 0.1), ("rsp", 0.5)])
def test_settings_of_the_fam_need_one(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*fam_length=0"):
        MemoryConfig(4, **{field: value})


def test_generate_keeps_no_logits_of_the_prompt(variables):
    """Memory of reading a prompt grows with its length, but not by a vocabulary for each token."""
    config = DecoderConfig(20_000, 1, 8, 2, 1, 4, 8, memory=MemoryConfig(8, fam_length=2))
    model = Decoder(config)
    large = jax.eval_shape(model.init, jax.random.key(0), TOKENS)

    def read(tokens):
        return generate.__globals__["_generate"].lower(
            model,
            2,
            Choice(),
            large,
            tokens,
            jnp.full(len(tokens), tokens.shape[1]),
            model.init_state(len(tokens)),
            jnp.zeros(0, jnp.int32),
            jnp.float32(0),
            jax.random.split(jax.random.key(0), len(tokens)),
        )

    used = read(jnp.ones((1, 1024), jnp.int32)).compile().memory_analysis().temp_size_in_bytes
    assert used < 1024 * 20_000 * 4 / 4

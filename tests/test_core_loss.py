"""The blocked cross entropy against one over all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax import Decoder, presets
from fam_jax.loss import VOCAB_BLOCK, TokenLosses, _blocks, token_losses


def over_all(x, table, targets, softcap=None):
    """Losses of all logits at once."""
    logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return TokenLosses(log_z - wanted, log_z, jnp.argmax(logits, axis=-1) == targets)


def example(vocab, dtype):
    rng = np.random.default_rng(vocab)
    x, table, d_nll, d_log_z = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, 8), (vocab, 8), (2, 5), (2, 5))
    )
    return x, table, jnp.asarray(rng.integers(0, vocab, (2, 5))), d_nll, d_log_z


# One block, several, a last one that is not full, blocks of one.
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("vocab", "block"), [(10, 100), (10, 10), (64, 16), (100, 7), (5, 1)])
def test_values_and_gradients(vocab, block, softcap):
    with jax.enable_x64(True):
        x, table, targets, d_nll, d_log_z = example(vocab, "float64")

        def pulled(losses):
            return jnp.sum(d_nll * losses.nll + d_log_z * losses.log_z**2)

        got = token_losses(x, table, targets, block, softcap=softcap)
        wanted = over_all(x, table, targets, softcap)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        gradient = jax.grad(lambda x, t: pulled(token_losses(x, t, targets, block, softcap=softcap)), argnums=(0, 1))(
            x, table
        )
        expected = jax.grad(lambda x, t: pulled(over_all(x, t, targets, softcap)), argnums=(0, 1))(x, table)
        for a, b in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vocab", [8193, 49_152, 50_304, 151_936, 256_000])
def test_devices_can_share_a_block(vocab):
    table = jax.eval_shape(lambda: _blocks(jnp.zeros((vocab, 1)), VOCAB_BLOCK)[0])
    size, count, _ = table.shape
    assert size % 128 == 0
    assert size <= VOCAB_BLOCK
    assert vocab <= size * count < vocab + 128 * count


def test_of_equal_logits_the_first_is_hit():
    x, table = jnp.ones((1, 6, 1)), jnp.ones((6, 1))
    targets = jnp.arange(6)[None]
    for block in (6, 4, 2, 1):
        hit = token_losses(x, table, targets, block).hit
        assert hit.tolist() == [[True, False, False, False, False, False]], block


def test_large_logits_do_not_overflow():
    x, table, targets, *_ = example(32, "float32")
    gradient = jax.grad(lambda x: jnp.sum(token_losses(x, 1e4 * table, targets, 8).nll))(x)
    assert np.isfinite(gradient).all()
    assert np.isfinite(token_losses(x, 1e4 * table, targets, 8).nll).all()


def test_bfloat16_is_near():
    x, table, targets, *_ = example(64, "float32")
    exact = over_all(x, table, targets).nll
    near = token_losses(x.astype(jnp.bfloat16), table, targets, 16).nll
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, exact, atol=2e-2 * float(jnp.max(jnp.abs(exact))))


def test_memory_is_that_of_one_block():
    def needed(vocab, loss):
        shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 256, 32), (vocab, 32))]
        step = jax.jit(jax.grad(lambda x, table: jnp.sum(loss(x, table)), argnums=(0, 1)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    targets = jnp.zeros((2, 256), int)
    blocked = [needed(vocab, lambda x, table: token_losses(x, table, targets, 512).nll) for vocab in (2048, 16384)]
    whole = [needed(vocab, lambda x, table: over_all(x, table, targets).nll) for vocab in (2048, 16384)]
    assert blocked[1] <= 1.01 * blocked[0]
    assert whole[1] > 5 * whole[0]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_decoder_gives_losses_for_targets(tied):
    config = dataclasses.replace(presets.tiny(), tie_embeddings=tied)
    model = Decoder(config)
    ids = jax.random.randint(jax.random.key(1), (2, 41), 0, 256)
    tokens, targets = ids[:, :-1], ids[:, 1:]
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
    out = model.apply(variables, tokens, targets=targets)
    assert out.logits is None
    logits = model.apply(variables, tokens).logits
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.losses.nll, nll, rtol=1e-5)
    np.testing.assert_array_equal(out.losses.hit, jnp.argmax(logits, -1) == targets)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1, 2]], r"targets is int64\[1, 2\], but tokens are int32\[1, 3\]: each needs the id after it"),
        ([[1.0, 2.0, 3.0]], r"targets is float64\[1, 3\]"),
        ([[1, 2, 256]], "targets: token id 256 is outside the vocabulary of 256 ids"),
    ],
)
def test_wrong_targets(targets, message):
    model = Decoder(presets.tiny())
    tokens = np.array([[1, 2, 3]])
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
    with pytest.raises(ValueError, match=message):
        model.apply(variables, tokens, targets=np.array(targets))

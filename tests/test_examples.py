"""The examples do what they say."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.examples import lime_in_flax
from lime_jax import LimeConfig


def test_lime_in_a_model_of_ones_own():
    """Started at zero, it is the model without LIMe; trained, its router has moved and reads no later layer."""
    tokens = jnp.arange(12)[None]
    plain, mixed = (lime_in_flax.TinyTransformer(lime) for lime in (None, LimeConfig(init="zeros")))
    params = mixed.init(jax.random.key(0), tokens)["params"]
    router = params["lime"]["layers"]["router"]
    rest = {name: leaf for name, leaf in params.items() if name != "lime"}
    want = plain.apply({"params": rest}, tokens)
    np.testing.assert_allclose(mixed.apply({"params": params}, tokens), want, atol=1e-5)
    other = {**rest, "lime": {"layers": {"router": router + 0.1}}}
    assert np.max(np.abs(mixed.apply({"params": other}, tokens) - want)) > 1e-3

    losses, params = lime_in_flax.train(LimeConfig(init="zeros"), steps=12, length=16)
    assert np.mean(losses[-3:]) < losses[0] - 0.3
    router = np.asarray(params["lime"]["layers"]["router"])
    layers = np.arange(len(router))
    later = np.broadcast_to((layers[None] > layers[:, None])[:, None, :, None], router.shape)
    assert np.all(router[later] == 0)
    off = np.broadcast_to((layers[None] < layers[:, None])[:, None, :, None], router.shape)
    assert np.all(router[off] != 0)

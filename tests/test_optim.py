"""Optimisers and schedules against numbers written out by hand and against optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_helpers import MODEL

from experiments.optim import DECAYED, UNDECAYED, OptimConfig, decay_mask, make_optimizer, make_schedule
from fam_jax import Decoder, LoraConfig


def rates(config, steps=20):
    schedule = make_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 5)])


def test_schedules():
    np.testing.assert_allclose(rates(OptimConfig(learning_rate=0.5, schedule="constant")), 0.5)
    linear = rates(OptimConfig(learning_rate=1.0, schedule="linear", warmup_steps=4, final_scale=0.2))
    np.testing.assert_allclose(linear[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(linear[4:20], 1 - 0.8 * np.arange(16) / 16, rtol=1e-6)
    np.testing.assert_allclose(linear[20:], 0.2, rtol=1e-6)
    cosine = rates(OptimConfig(learning_rate=2.0, final_scale=0.1))
    np.testing.assert_allclose(cosine[:21], 0.2 + 0.9 * (1 + np.cos(np.pi * np.arange(21) / 20)), rtol=1e-5)
    fixed = OptimConfig(decay_steps=10)
    np.testing.assert_array_equal(rates(fixed, 20)[:20], rates(fixed, 15))
    assert rates(OptimConfig(warmup_steps=1, learning_rate=1.0))[0] == 1.0
    with pytest.raises(ValueError, match="warmup_steps=20 leaves nothing of the 20 steps"):
        make_schedule(OptimConfig(warmup_steps=20), 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "sgd"),
        ("schedule", "step"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("decay_steps", 0),
        ("final_scale", 1.5),
        ("b1", 1.0),
        ("b2", 0.0),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
    ],
)
def test_bad_values(field, value):
    with pytest.raises(ValueError, match=f"OptimConfig.{field}={value!r} is not allowed; it must be"):
        OptimConfig(**{field: value})


def parameters(**changes):
    model = Decoder(dataclasses.replace(MODEL, **changes))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def test_every_parameter_is_decayed_or_not():
    names = set()
    more = {"attention_bias": True, "post_norms": True, "lora": LoraConfig(2)}
    prefix = {"memory": dataclasses.replace(MODEL.memory, fam_init="prefix")}
    for changes in ({}, {"tie_embeddings": False}, {"parallel_block": True}, {"qk_norm": True}, more, prefix):
        leaves = jax.tree_util.tree_leaves_with_path(decay_mask(parameters(**changes)))
        names |= {path[-1].key for path, _ in leaves}
        for path, decayed in leaves:
            assert decayed == path[-1].key.startswith("w")
    assert names == DECAYED | UNDECAYED
    with pytest.raises(ValueError, match="layers/router is new to the optimiser"):
        decay_mask({"layers": {"router": 0}})


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_weight_decay_shrinks_matrices_only(optimizer):
    config = OptimConfig(optimizer=optimizer, learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=None)
    tx, _ = make_optimizer(config, 10)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parameters(tie_embeddings=False))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        expected = -0.05 if path[-1].key in DECAYED else 0.0
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=str(path))


def steps_of(tx, params, count, scale=1.0):
    """Parameters after some steps on reproducible gradients."""
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(count):
        keys = jax.random.split(jax.random.key(step), len(params))
        grads = {n: scale * jax.random.normal(k, params[n].shape) for n, k in zip(params, keys, strict=True)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_adafactor_is_that_of_optax_until_its_limit():
    params = {"wq": jnp.full((2, 128, 160), 0.5), "final_norm": jnp.ones(7)}
    config = OptimConfig(optimizer="adafactor", learning_rate=1e-2, schedule="constant", clip_norm=None, b2=0.99)
    theirs = optax.adafactor(1e-2, momentum=0.9)
    ours = make_optimizer(config, 10)[0]
    for name, value in steps_of(ours, params, 5).items():
        np.testing.assert_allclose(value, steps_of(theirs, params, 5)[name], rtol=1e-5, atol=1e-7)
    # 1 - 5^-0.8 is above 0.6, so that a limit of 0.6 shows.
    limited = steps_of(make_optimizer(dataclasses.replace(config, b2=0.6), 10)[0], params, 5)
    assert not np.allclose(limited["wq"], steps_of(theirs, params, 5)["wq"], rtol=1e-4)
    # The second moment of the large matrix is kept as a row and a column.
    sizes = [leaf.size for leaf in jax.tree.leaves(ours.init(params))]
    assert sizes.count(params["wq"].size) == 1  # the momentum only


def test_adafactor_treats_each_layer_of_a_stack_as_a_parameter_of_its_own():
    """Layers of very different sizes and gradients: stacked they are updated as each would be alone."""
    config = OptimConfig(optimizer="adafactor", learning_rate=1e-2, schedule="constant", clip_norm=None)
    rng, sizes = np.random.default_rng(0), np.array([0.1, 1.0, 30.0])
    shapes = {"wq": (128, 160), "attn_norm": (7,)}
    weights = {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    start = {name: (w.T * sizes).T.astype(np.float32) for name, w in weights.items()}
    # The second step's gradients are larger, some layers' by far more than others', so that the clipping acts.
    grads = [start, {name: (w.T * sizes[::-1] ** 2).T.astype(np.float32) for name, w in weights.items()}]

    def moved(params, grads):
        tx, _ = make_optimizer(config, 10)
        update, state = jax.jit(tx.update), tx.init(params)
        for grad in grads:
            updates, state = update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    stacked = moved({"layers": start}, [{"layers": grad} for grad in grads])["layers"]
    for layer in range(3):
        alone = moved(*jax.tree.map(lambda leaf, i=layer: leaf[i], (start, grads)))
        for name in shapes:
            np.testing.assert_allclose(stacked[name][layer], alone[name], rtol=1e-5, atol=1e-7)


def test_clipping_is_by_the_global_norm():
    params = {"wq": jnp.zeros((1, 4, 4)), "embed": jnp.zeros((3, 4))}
    config = OptimConfig(clip_norm=1.0)
    # AdamW does not see the gradient's scale, but eps does: what is clipped moves as if scaled beforehand.
    tiny = dataclasses.replace(config, eps=1.0, schedule="constant", learning_rate=1.0)
    grads = {"wq": jnp.full((1, 4, 4), 3.0), "embed": jnp.full((3, 4), 4.0)}
    norm = float(optax.tree.norm(grads))
    scaled = jax.tree.map(lambda g: g / norm, grads)
    for first, second in ((grads, scaled), (jax.tree.map(lambda g: g * 100, grads), scaled)):
        tx = make_optimizer(tiny, 10)[0]
        one, _ = tx.update(first, tx.init(params), params)
        other, _ = tx.update(second, tx.init(params), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)
    free = make_optimizer(dataclasses.replace(tiny, clip_norm=None), 10)[0]
    one, _ = free.update(grads, free.init(params), params)
    assert float(jnp.abs(one["wq"]).max()) > 0.5  # unclipped

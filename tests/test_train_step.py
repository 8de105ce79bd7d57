"""The training step: losses by hand, metrics, and what is carried from step to step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_helpers import MODEL, assert_same_bits, tiny

from experiments.config import TrainConfig
from experiments.optim import OptimConfig, make_optimizer
from experiments.step import create_state, make_eval_step, make_train_step, means, token_sums
from fam_jax import Decoder

pytest_plugins = ("train_helpers",)


def test_weighted_loss_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    weights = np.array([[1.0, 0.1, 0.0], [0.0, 0.1, 1.0]], np.float32)
    nll, z2, total = 0.0, 0.0, 0.0
    for row in range(2):
        for token in range(3):
            exact = logits[row, token].astype(np.float64)
            log_z = np.log(np.sum(np.exp(exact)))
            nll += weights[row, token] * (log_z - exact[targets[row, token]])
            z2 += weights[row, token] * log_z**2
            total += weights[row, token]
    found = means(token_sums(*map(jnp.asarray, (logits, targets, weights))))
    np.testing.assert_allclose(found["loss"], nll / total, rtol=1e-6)
    np.testing.assert_allclose(found["z2"], z2 / total, rtol=1e-6)
    # A token of weight zero is in no sum, whatever its logits.
    changed = logits.copy()
    changed[0, 2] = changed[1, 0] = 1e4
    again = token_sums(*map(jnp.asarray, (changed, targets, weights)))
    assert_same_bits(token_sums(*map(jnp.asarray, (logits, targets, weights))), again)


def test_accuracy_and_exact_match():
    targets = jnp.array([[0, 1], [2, 0], [1, 1], [0, 0]])
    guess = jnp.array([[0, 1], [2, 2], [0, 1], [1, 1]])
    weights = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.1], [0.0, 0.0]])
    found = means(token_sums(jax.nn.one_hot(guess, 3), targets, weights))
    assert float(found["exact_match"]) == pytest.approx(2 / 3)  # rows 0 and 2; row 3 has nothing to match
    assert float(found["accuracy"]) == pytest.approx(3.1 / 4.1)


def test_nothing_to_learn_from():
    sums = token_sums(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), int), jnp.zeros((1, 2)))
    assert all(float(value) == 0 for value in means(sums).values())


def test_sums_of_batches_add_up():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (4, 6, 5))
    targets, weights = jax.random.randint(key, (4, 6), 0, 5), jax.random.uniform(key, (4, 6))
    whole = token_sums(logits, targets, weights)
    parts = [token_sums(logits[i], targets[i], weights[i]) for i in (slice(1), slice(1, 4))]
    for name, value in means({name: float(sum(part[name] for part in parts)) for name in whole}).items():
        np.testing.assert_allclose(value, means(whole)[name], rtol=1e-5)


class Stream(NamedTuple):
    config: TrainConfig
    model: Decoder
    create: Callable
    step: Callable
    batches: list


@pytest.fixture(scope="module")
def stream(tmp_path_factory, compile_cache):
    """A stream run's step, its state before it and two batches of whole documents' blocks."""
    config = tiny(tmp_path_factory.mktemp("step"), optim=OptimConfig(learning_rate=1e-2), z_loss=0.5)
    model, (optimizer, schedule) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    rng = np.random.default_rng(1)

    def batch(reset):
        ids = rng.integers(0, 256, (2, 33), np.int32)
        return {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "weights": rng.uniform(size=(2, 32)).astype(np.float32),
            "reset": np.array(reset),
            "padded": np.zeros((2, 4), bool),
        }

    batches = [batch([[True, False, False, False]] * 2), batch([[False] * 4, [False, False, True, False]])]
    step = make_train_step(config, model, optimizer, schedule)
    return Stream(config, model, jax.jit(lambda: create_state(config, model, optimizer)), step, batches)


def test_step_hands_on_the_memory(stream):
    model, create, step, (first, second) = stream[1:]
    before = create()
    params, key = jax.tree.map(np.asarray, before.params), jax.random.fold_in(before.key, 0)
    variables = {"params": params}
    kwargs = {"reset": first["reset"], "padded": first["padded"]}
    apply = jax.jit(functools.partial(model.apply, aligned=True))
    expected = apply(variables, first["tokens"], state=before.stream, rsp=before.rsp, key=key, **kwargs)

    after, metrics = step(before, first)
    assert int(after.step) == 1
    np.testing.assert_allclose(after.stream.fam, expected.state.fam, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.stream.blocks, [4, 4])
    np.testing.assert_allclose(after.rsp.fam, expected.rsp.fam, rtol=1e-5, atol=1e-6)
    assert bool(after.rsp.valid)

    sums = means(token_sums(expected.logits, first["targets"], first["weights"]))
    np.testing.assert_allclose(metrics["loss"], sums["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["z_loss"], 0.5 * sums["z2"], rtol=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    assert float(metrics["grad_norm/fam_prompt"]) > 0
    parts = [float(value) ** 2 for name, value in metrics.items() if name.startswith("grad_norm/")]
    assert float(metrics["grad_norm"]) == pytest.approx(sum(parts) ** 0.5, rel=1e-5)

    after, _ = step(after, second)
    np.testing.assert_array_equal(after.stream.blocks, [8, 2])  # row 1 began a document two blocks ago


def test_gradient_includes_z_loss(stream):
    """Plain gradient descent on the loss written out here moves the parameters as the step does."""
    model, create, _, (batch, _) = stream[1:]
    tx = optax.sgd(0.1)
    state = create().replace(opt_state=tx.init(create().params))
    params, stream_state, rsp = (jax.tree.map(jnp.copy, x) for x in (state.params, state.stream, state.rsp))
    key = jax.random.fold_in(state.key, 0)

    def loss(params):
        kwargs = {"reset": batch["reset"], "padded": batch["padded"], "aligned": True}
        variables = {"params": params}
        out = model.apply(variables, batch["tokens"], state=stream_state, rsp=rsp, key=key, **kwargs)
        log_p = jax.nn.log_softmax(out.logits)
        nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(out.logits, -1)
        return jnp.sum(batch["weights"] * (nll + 0.5 * log_z**2)) / jnp.sum(batch["weights"])

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.jit(jax.grad(loss))(params))
    after, _ = make_train_step(stream.config, model, tx, lambda step: 0.1)(state, batch)
    for name, one in jax.tree_util.tree_leaves_with_path(after.params):
        other = dict(jax.tree_util.tree_leaves_with_path(expected))[name]
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_evaluation_has_no_randomness(stream):
    model, create, _, (batch, _) = stream[1:]
    state = create()
    step = make_eval_step(model)
    sums, after = step(state.params, batch, state.stream)
    variables, apply = {"params": state.params}, jax.jit(functools.partial(model.apply, aligned=True))
    plain = apply(variables, batch["tokens"], state=state.stream, reset=batch["reset"])
    expected = token_sums(plain.logits, batch["targets"], batch["weights"])
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)
    np.testing.assert_allclose(after.fam, plain.state.fam, rtol=1e-5, atol=1e-6)
    packed, nothing = step(state.params, {k: batch[k] for k in ("tokens", "targets", "weights")}, None)
    assert nothing is None
    np.testing.assert_allclose(packed["nll"], sums["nll"], rtol=1e-5)  # the same rows, begun afresh


def test_state_follows_the_config(tmp_path, compile_cache):
    config = tiny(tmp_path)
    for changes, has_rsp in (({}, True), ({"rsp": 0.0}, False)):
        memory = dataclasses.replace(MODEL.memory, **changes)
        one = dataclasses.replace(config, model=dataclasses.replace(MODEL, memory=memory))
        model, (optimizer, _) = Decoder(one.model), make_optimizer(one.optim, one.steps)
        shapes = jax.eval_shape(lambda one=one, m=model, o=optimizer: create_state(one, m, o))
        assert (shapes.rsp is not None) == has_rsp
        assert shapes.stream.fam.shape == (2, 2, 2, 16)

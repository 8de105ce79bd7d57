"""The training step: losses by hand, metrics, and what is carried from step to step."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_helpers import MODEL, assert_same_bits, first_state, tiny, with_model

from experiments.optim import make_optimizer
from experiments.step import TrainState, create_state, make_eval_step, make_train_step, means, token_sums
from fam_jax import Decoder, MemoryConfig, RSPState
from fam_jax.loss import TokenLosses


def losses_of(logits, targets):
    """Losses by the definition."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    wanted = jnp.take_along_axis(jnp.asarray(logits), jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    return TokenLosses(log_z - wanted, log_z, jnp.argmax(logits, axis=-1) == targets)


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
    sums = token_sums(losses_of(logits, targets), jnp.asarray(weights))
    found = means(sums)
    np.testing.assert_allclose(found["loss"], nll / total, rtol=1e-6)
    np.testing.assert_allclose(found["z2"], z2 / total, rtol=1e-6)
    # A token of weight zero is in no sum, whatever its logits.
    logits[0, 2] = logits[1, 0] = 1e4
    assert_same_bits(sums, token_sums(losses_of(logits, targets), jnp.asarray(weights)))


def test_accuracy_and_exact_match():
    targets = jnp.array([[0, 1], [2, 0], [1, 1], [0, 0]])
    guess = jnp.array([[0, 1], [2, 2], [0, 1], [1, 1]])
    weights = jnp.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.1], [0.0, 0.0]])
    found = means(token_sums(losses_of(jax.nn.one_hot(guess, 3), targets), weights))
    assert float(found["exact_match"]) == pytest.approx(2 / 3)  # rows 0 and 2; row 3 has nothing to match
    assert float(found["accuracy"]) == pytest.approx(3.1 / 4.1)


def test_nothing_to_learn_from():
    sums = token_sums(losses_of(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), int)), jnp.zeros((1, 2)))
    assert all(float(value) == 0 for value in means(sums).values())


def test_sums_of_batches_add_up():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(4, 6, 5)).astype(np.float32), rng.integers(0, 5, (4, 6))
    weights = rng.uniform(size=(4, 6)).astype(np.float32)
    whole, *parts = (
        token_sums(losses_of(logits[rows], targets[rows]), weights[rows]) for rows in (slice(4), slice(1), slice(1, 4))
    )
    for name, value in means({name: float(sum(part[name] for part in parts)) for name in whole}).items():
        np.testing.assert_allclose(value, means(whole)[name], rtol=1e-5)


class Out(NamedTuple):
    losses: TokenLosses
    state: jax.Array | None
    rsp: jax.Array | None


class Recorder:
    """Stands for the decoder: logits are rows of a table, the states count tokens, calls are kept."""

    def __init__(self):
        self.calls = []

    def init_state(self, batch):
        return jnp.float32(0)

    def apply(self, variables, tokens, state=None, rsp=None, targets=None, **kwargs):
        self.calls.append(kwargs | {"state": state, "rsp": rsp})
        logits = variables["params"]["embed"][tokens]
        if "key" in kwargs:  # so that a test can see which key it was
            logits += jax.random.normal(kwargs["key"], ())
        count = jnp.sum(tokens)
        return Out(
            losses_of(logits, targets),
            None if state is None else state + count,
            None if rsp is None else rsp + 2 * count,
        )


def run_steps(tmp_path, mode, count, tx=None, z_loss=0.0, rsp=True):
    """Some steps of the recorder from a fixed start; returns it, the batch, the states and the metrics."""
    config, model = tiny(tmp_path, mode=mode, z_loss=z_loss), Recorder()
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 5, (2, 5), np.int32)
    weights = rng.uniform(size=(2, 4)).astype(np.float32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}
    if mode == "stream":
        batch |= {"reset": np.array([[True], [False]]), "padded": np.array([[False], [True]])}
    tx = tx or optax.sgd(0.1)
    params = {"embed": jnp.asarray(rng.normal(size=(5, 5)), jnp.float32), "fam_prompt": jnp.ones(3)}
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=tx.init(params),
        key=jax.random.key(3),
        stream=jnp.float32(0) if mode == "stream" else None,
        rsp=jnp.float32(1) if rsp else None,
    )
    step, states, metrics = make_train_step(config, model, tx, lambda step: 0.1 + step), [], []
    for _ in range(count):
        states.append(jax.tree.map(jnp.copy, state))
        state, found = step(state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    return model, batch, [*states, state], metrics


def test_memory_is_handed_on(tmp_path):
    model, batch, states, _ = run_steps(tmp_path, "stream", 3)
    (call,) = model.calls  # compiled once, whatever the step
    assert call["aligned"] is True
    assert {"state", "rsp", "reset", "padded", "key"} <= {k for k, v in call.items() if v is not None}
    count = batch["tokens"].sum()
    assert [float(state.stream) for state in states] == [0, count, 2 * count, 3 * count]
    assert [float(state.rsp) for state in states] == [1, 1 + 2 * count, 1 + 4 * count, 1 + 6 * count]
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    for state in states:
        assert_same_bits(state.key, jax.random.key(3))


def test_packed_rows_start_afresh(tmp_path):
    model, _, states, _ = run_steps(tmp_path, "packed", 1)
    assert model.calls[0].keys() == {"state", "rsp", "key"}
    assert model.calls[0]["state"] is None
    assert states[-1].stream is None
    assert float(states[-1].rsp) != 1
    assert run_steps(tmp_path, "packed", 1, rsp=False)[2][-1].rsp is None


def test_loss_and_gradient_of_a_step(tmp_path):
    _, batch, states, metrics = run_steps(tmp_path, "stream", 2, z_loss=0.5)
    for number in (0, 1):
        before, after, found = states[number], states[number + 1], metrics[number]
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(3), number), ())

        def loss(params, noise=noise):
            logits = params["embed"][batch["tokens"]] + noise
            log_p = jax.nn.log_softmax(logits)
            nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
            log_z = jax.nn.logsumexp(logits, -1)
            weights = jnp.asarray(batch["weights"])
            return jnp.sum(weights * (nll + 0.5 * log_z**2)) / jnp.sum(weights)

        grads = jax.grad(loss)(before.params)
        for name, value in after.params.items():
            np.testing.assert_allclose(value, before.params[name] - 0.1 * grads[name], rtol=1e-5, atol=1e-6)
        assert found["loss"] + found["z_loss"] == pytest.approx(float(loss(before.params)), rel=1e-5)
        assert found["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
        assert found["grad_norm/embed"] == pytest.approx(found["grad_norm"])
        assert found["grad_norm/fam_prompt"] == 0
        assert found["param_norm"] == pytest.approx(float(optax.tree.norm(after.params)), rel=1e-5)
        assert found["learning_rate"] == pytest.approx(0.1 + number)
    assert "z_loss" not in run_steps(tmp_path, "packed", 1)[3][0]


def test_evaluation_has_no_randomness():
    model = Recorder()
    step = make_eval_step(model)
    params, tokens = {"embed": jnp.eye(4)}, np.array([[1, 2]])
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((1, 2), np.float32)}
    sums, stream = step(params, batch, None)
    assert stream is None
    assert float(sums["right"]) == 2
    flags = {"reset": np.array([[True]]), "padded": np.array([[False]])}
    _, stream = step(params, batch | flags, jnp.float32(5))
    assert float(stream) == 8
    assert all(call.get("key") is None and call["rsp"] is None for call in model.calls)
    assert model.calls[1]["reset"] is not None


@pytest.mark.parametrize(
    ("mode", "rsp", "has_stream", "has_rsp"),
    [("stream", 0.5, True, True), ("stream", 0.0, True, False), ("packed", 0.5, False, True)],
)
def test_first_state(tmp_path, mode, rsp, has_stream, has_rsp):
    config = tiny(tmp_path, mode=mode)
    memory = dataclasses.replace(config.model.memory, rsp=rsp)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))
    model, (optimizer, _) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    shapes = jax.eval_shape(functools.partial(create_state, config, model, optimizer))
    assert (shapes.stream is not None, shapes.rsp is not None) == (has_stream, has_rsp)
    if has_stream:
        assert shapes.stream.fam.shape == (2, 2, 2, 16)
    if has_rsp:
        assert isinstance(shapes.rsp, RSPState)
    assert shapes.params["embed"].shape == (256, 16)


def test_noise_is_in_training_alone(tmp_path):
    """FAM noise changes the loss of a training step, and not that of the evaluation."""
    base = tiny(tmp_path, mode="packed")
    tokens = np.arange(2 * 32, dtype=np.int32).reshape(2, 32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((2, 32), np.float32)}
    base = with_model(base, memory=dataclasses.replace(base.model.memory, noise=0.0, rsp=0.0))
    optimizer, schedule = make_optimizer(base.optim, base.steps)
    start = first_state(base, Decoder(base.model), optimizer)

    def losses(noise):
        config = with_model(base, memory=dataclasses.replace(base.model.memory, noise=noise))
        model, state = Decoder(config.model), jax.tree.map(jnp.copy, start)
        sums, _ = make_eval_step(model)(state.params, batch, None)
        _, metrics = make_train_step(config, model, optimizer, schedule)(state, batch)
        return float(metrics["loss"]), float(means(sums)["loss"])

    (train, evaluation), (noisy_train, noisy_evaluation) = losses(0.0), losses(0.5)
    assert noisy_train != train
    assert noisy_evaluation == evaluation


MEMORIES = {
    "FAM": MemoryConfig(block_size=8, fam_length=2, rsp=0.5),
    "BSWA": MemoryConfig(block_size=8),
    "no segments": MemoryConfig(block_size=8, segments=0, fam_length=2),
}


@pytest.mark.parametrize(
    ("mode", "memory"),
    [
        ("stream", "FAM"),
        pytest.param("stream", "BSWA", marks=pytest.mark.slow),
        pytest.param("stream", "no segments", marks=pytest.mark.slow),
        pytest.param("packed", "FAM", marks=pytest.mark.slow),
    ],
)
def test_parts_of_a_batch_add_up_to_it(tmp_path, mode, memory):
    """Gradients, metrics and the memory that is handed on, when parts have unequal numbers of tokens."""
    rsp = MEMORIES[memory].rsp if mode == "stream" else 0.0  # packed rows draw in every step
    base = with_model(tiny(tmp_path, mode=mode), memory=dataclasses.replace(MEMORIES[memory], rsp=rsp))
    base = dataclasses.replace(base, z_loss=0.1, data=dataclasses.replace(base.data, batch_size=4))
    model, optimizer = Decoder(base.model), optax.sgd(0.1)
    start = first_state(base, model, optimizer)
    found = []
    for parts in (1, 4):
        config, state = dataclasses.replace(base, accumulate=parts), jax.tree.map(jnp.copy, start)
        step = make_train_step(config, model, optimizer, lambda step: 0.1)
        rng = np.random.default_rng(0)
        for _ in range(2):
            ids = rng.integers(0, 256, (4, 33))
            weights = (rng.random((4, 32)) < [[0.9], [0.1], [0.5], [0.0]]).astype(np.float32)
            batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}
            if mode == "stream":  # nothing is drawn where no document starts
                batch |= {"reset": np.zeros((4, 4), bool), "padded": np.zeros((4, 4), bool)}
            state, metrics = step(state, batch)
        found.append((state, metrics))
    (whole, metrics), *others = found
    for state, other in others:
        for name, value in metrics.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, err_msg=name)
        for field in ("params", "stream", "rsp"):
            wanted, got = getattr(whole, field), getattr(state, field)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_step_that_is_not_finite_is_left_out(tmp_path):
    """Parameters and moments stay; rows forget; steps and the learning rate go on."""
    config = with_model(tiny(tmp_path), memory=dataclasses.replace(MODEL.memory, rsp=0.0, noise=0.0))
    model, (optimizer, schedule) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    step = make_train_step(config, model, optimizer, schedule)
    ids = np.random.default_rng(0).integers(0, 256, (3, 2, 33))
    flags = {"reset": np.zeros((2, 4), bool), "padded": np.zeros((2, 4), bool)}
    batches = [
        {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": np.ones((2, 32), np.float32), **flags}
        for rows in ids
    ]
    state, metrics = step(first_state(config, model, optimizer), batches[0])
    assert float(metrics["skipped"]) == 0
    before = jax.tree.map(jnp.copy, state)
    state, metrics = step(state, batches[1] | {"weights": np.full((2, 32), np.nan, np.float32)})
    assert float(metrics["skipped"]) == 1
    assert np.isnan(float(metrics["loss"]))
    assert_same_bits(state.params, before.params)
    assert_same_bits(state.stream, model.init_state(2))
    moments, old = (
        [leaf for leaf in jax.tree.leaves(one.opt_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        for one in (state, before)
    )
    assert_same_bits(moments, old)

    # The next step is that of rows that have read nothing, at the learning rate that it shows.
    tokens, targets = batches[2]["tokens"], batches[2]["targets"]
    nll = jax.jit(model.apply)({"params": before.params}, tokens, targets=targets).losses.nll
    state, metrics = step(state, batches[2])
    np.testing.assert_allclose(metrics["loss"], jnp.mean(nll), rtol=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(2)))
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    assert counts
    assert all(int(count) == 3 for count in counts)

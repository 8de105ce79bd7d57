"""LoRA: what it adds to the decoder, what it changes in training, and what it must leave alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    B,
    assert_close,
    assert_trees_close,
    decoder_config,
    fam_config,
    model_shapes,
    mostly_slow,
    params_of,
    quick_jit,
    runner,
    some_tokens,
)
from train_helpers import assert_same_bits, first_state, metric_rows, restore, tiny, with_model

from experiments import flops
from experiments.checkpoint import load_model
from experiments.config import check
from experiments.optim import OptimConfig, make_optimizer
from experiments.step import make_eval_step, make_train_step, means
from experiments.train import train
from fam_jax import Decoder, DecoderConfig, LoraConfig, MemoryConfig, presets
from fam_jax.lora import effective, merge, sides, unmerge
from fam_jax.ops import WEIGHTS
from lime_jax import DenseFormerConfig, HyperConnectionsConfig, LimeConfig

RANK = 3
LORA = LoraConfig(rank=RANK, alpha=6.0)
TEXT = some_tokens(2, 3 * B + 1)
MODELS = {
    "full attention": decoder_config(),
    "BSWA, parallel": decoder_config({}, parallel_block=True),
    "FAM": fam_config(),
    "FAM, biases, norms after": fam_config(attention_bias=True, post_norms=True, activation="gelu"),
    "FAM, some targets": fam_config(lora=LoraConfig(rank=1, targets=("wo", "w_down", "wk"))),
    "FAM with LIMe": fam_config(mixing=LimeConfig()),
    "FAM with views of every head": fam_config(mixing=LimeConfig("dynamic_views")),
    "FAM with streams": fam_config(mixing=HyperConnectionsConfig()),
    "FAM with an average of depths": fam_config(mixing=DenseFormerConfig()),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def adapted(name: str, **changes) -> DecoderConfig:
    config = MODELS[name]
    return dataclasses.replace(config, **{"lora": config.lora or LORA, **changes})


# ---------------------------------------------------------------------------------------------- the decoder


def test_parameters_are_declared_beside_all_others():
    config = adapted("FAM", dtype="float32", param_dtype="float32")
    base = dataclasses.replace(config, lora=None)
    variables, without = (quick_jit(Decoder(c).init)(jax.random.key(0), TEXT)["params"] for c in (config, base))
    added = variables.pop("lora")["layers"]
    assert_same_bits(variables, without)
    assert set(added) == {f"{name}_{factor}" for name in tuple(WEIGHTS) for factor in "ab"}
    for name in tuple(WEIGHTS):
        inputs, outputs = sides(config, name)
        assert without["layers"][name].shape == (config.num_layers, *inputs, *outputs)
        assert added[f"{name}_a"].shape == (config.num_layers, *inputs, RANK)
        assert added[f"{name}_b"].shape == (config.num_layers, RANK, *outputs)
        size = float(jnp.std(added[f"{name}_a"])) * np.prod(inputs) ** 0.5
        assert 0.7 < size < 1.3
        assert not np.any(added[f"{name}_b"])


@pytest.mark.parametrize("name", ["full attention", "FAM with LIMe"])
def test_it_starts_at_the_base_model_exactly(name):
    config = adapted(name, dtype="float32", param_dtype="float32")
    params = quick_jit(Decoder(config).init)(jax.random.key(0), TEXT)["params"]
    base = {part: value for part, value in params.items() if part != "lora"}
    np.testing.assert_array_equal(
        runner(config)(params, TEXT).logits, runner(dataclasses.replace(config, lora=None))(base, TEXT).logits
    )


@mostly_slow(MODELS, fast=("full attention", "FAM", "FAM, biases, norms after", "FAM, some targets"))
def test_merged_is_unmerged(name):
    """In float32, and read in pieces."""
    config = adapted(name, dtype="float32", param_dtype="float32")
    params = params_of(config)
    plain, merged = merge(config, params)
    assert plain == dataclasses.replace(config, lora=None)
    assert "lora" not in merged
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, model_shapes(plain)["params"])
    want, got = runner(config)(params, TEXT).logits, runner(plain)(merged, TEXT).logits
    assert_close(got, want, 1e-5)
    base = runner(plain)({**merged, "layers": params["layers"]}, TEXT).logits
    assert np.max(np.abs(base - want)) > 0.01 * np.max(np.abs(want)), "the test has nothing to see"
    if name in ("BSWA, parallel", "FAM", "FAM with LIMe"):
        first = runner(plain)(merged, TEXT[:, : B + 2])
        second = runner(plain)(merged, TEXT[:, B + 2 :], state=first.state)
        assert_close(np.concatenate([first.logits, second.logits], axis=1), want, 1e-5)
    assert_trees_close(unmerge(config, merged, params["lora"]), params, 1e-5)


def test_merging_what_has_no_lora():
    config = fam_config(dtype="float32", param_dtype="float32")
    for change in (lambda: merge(config, params_of(config)), lambda: unmerge(config, {"layers": {}}, {"layers": {}})):
        with pytest.raises(ValueError, match=r"DecoderConfig.lora=None .* must be a LoraConfig"):
            change()


@functools.cache
def values_and_gradients(config):
    """Logits and the gradients of all parameters, with dropout."""
    weights = np.random.default_rng(1).standard_normal((*TEXT.shape, config.vocab_size))

    def loss(params):
        logits = Decoder(config).apply({"params": params}, TEXT, key=jax.random.key(7)).logits
        return jnp.sum(logits * weights), logits

    (_, logits), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(params_of(config))
    return {"logits": logits, "gradients": gradients}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("FAM", {"schedule": "block"}, marks=pytest.mark.slow),
        pytest.param("FAM", {"scan_layers": False}, marks=pytest.mark.slow),
        pytest.param("FAM", {"remat": "dots"}, marks=pytest.mark.slow),
        ("FAM with LIMe", {"schedule": "block", "scan_layers": False}),
        pytest.param("FAM with LIMe", {"scan_layers": False}, marks=pytest.mark.slow),
        pytest.param("FAM with views of every head", {"scan_layers": False}, marks=pytest.mark.slow),
    ],
)
def test_schedules_and_unrolled_layers_agree(name, changes, x64):
    config = adapted(name, lora=LoraConfig(rank=RANK, dropout=0.3))
    found = values_and_gradients(config)
    assert_trees_close(values_and_gradients(dataclasses.replace(config, **changes)), found, 1e-10)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found["gradients"]["lora"]):
        assert np.any(leaf != 0), f"no gradient reaches {jax.tree_util.keystr(path)}"


def test_any_split_is_one_call(x64):
    config = adapted("FAM")
    params = params_of(config)
    want, state, parts = runner(config)(params, TEXT), None, []
    for token in range(0, TEXT.shape[1]):
        out = runner(config)(params, TEXT[:, token : token + 1], **({} if state is None else {"state": state}))
        state, parts = out.state, [*parts, out.logits]
    assert_close(np.concatenate(parts, axis=1), want.logits)
    assert_close(state.fam, want.state.fam)


def test_dropout_is_in_training_alone_and_changes_no_mean():
    config = adapted("FAM", dtype="float32", param_dtype="float32")
    dropped = dataclasses.replace(config, lora=dataclasses.replace(LORA, dropout=0.4))
    params = params_of(config)
    want = runner(config)(params, TEXT).logits
    np.testing.assert_array_equal(runner(dropped)(params, TEXT).logits, want)
    np.testing.assert_array_equal(runner(config)(params, TEXT, key=jax.random.key(1)).logits, want)
    one, again, other = (runner(dropped)(params, TEXT, key=jax.random.key(number)).logits for number in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.max(np.abs(one - want)) > 1e-3
    assert np.max(np.abs(one - other)) > 1e-3


def test_what_is_dropped():
    """Inputs of A, in each layer others, the rest larger by the same share; the mean over many draws is A."""
    config = adapted("full attention", lora=LoraConfig(rank=RANK, alpha=6.0, dropout=0.4))
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    factors = params_of(config)["lora"]["layers"]
    whole = effective(config, factors, None)
    np.testing.assert_allclose(whole["wq_a"], 2 * factors["wq_a"], rtol=1e-6)
    draws = jax.vmap(lambda key: effective(config, factors, key))(jax.random.split(jax.random.key(0), 4000))
    for name in tuple(WEIGHTS):
        np.testing.assert_array_equal(draws[f"{name}_b"][0], factors[f"{name}_b"])
        drawn, a = np.asarray(draws[f"{name}_a"]), np.asarray(whole[f"{name}_a"])
        kept = drawn != 0
        np.testing.assert_array_equal(kept, np.broadcast_to(kept[..., :1], kept.shape))  # whole inputs
        np.testing.assert_allclose(drawn, np.where(kept, a / 0.6, 0), rtol=1e-5)
        np.testing.assert_allclose(kept.mean(), 0.6, atol=0.01)
        np.testing.assert_allclose(drawn.mean(axis=0), a, atol=0.06 * np.abs(a).max())
        assert np.any(kept[0, 0] != kept[0, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, r"LoraConfig.rank=0 is not allowed; it must be an integer of at least 1"),
        ({"rank": 2.0}, r"LoraConfig.rank=2.0 is not allowed"),
        ({"alpha": 0.0}, r"LoraConfig.alpha=0.0 is not allowed"),
        ({"alpha": float("nan")}, r"LoraConfig.alpha=nan is not allowed"),
        ({"targets": ()}, r"LoraConfig.targets=\(\) is not allowed; it must be a tuple of some of 'wq', "),
        ({"targets": ("wq", "embed")}, r"LoraConfig.targets=\('wq', 'embed'\) is not allowed"),
        ({"targets": ("wq", "wq")}, r"'wq'\) is not allowed; .* each once"),
        ({"targets": "wq"}, r"LoraConfig.targets='wq' is not allowed"),
        ({"dropout": 1.0}, r"LoraConfig.dropout=1.0 is not allowed; it must be below 1"),
        ({"dropout": -0.1}, r"LoraConfig.dropout=-0.1 is not allowed"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 4, **values})


def test_defaults_are_the_papers_where_it_gives_them():
    assert LoraConfig(64).targets == tuple(WEIGHTS)
    assert LoraConfig(64).scale == 1.0
    assert LoraConfig(4, alpha=8).scale == 2.0
    assert hash(LoraConfig(4)) == hash(LoraConfig(4))


# ------------------------------------------------------------------------------------------------- training


def lora_run(tmp_path, name="run", **changes):
    """A tiny run with FAM and LoRA, which stops once on the way in tests of resuming."""
    model = {"lora": LoraConfig(rank=2, dropout=0.2), **changes.pop("model", {})}
    settings = {"optim": OptimConfig(learning_rate=1e-2, weight_decay=0.1, schedule="constant"), "steps": 6}
    return with_model(tiny(tmp_path, name, **{**settings, "checkpoint_every": 3, **changes}), **model)


def batches(config, count):
    rng = np.random.default_rng(0)
    rows, length = config.data.batch_size, config.data.length
    for _ in range(count):
        ids = rng.integers(0, 256, (rows, length + 1))
        yield {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((rows, length), np.float32)}


@pytest.mark.parametrize(
    ("optimizer", "model", "settings", "trained"),
    [
        pytest.param("adamw", {}, {}, {"lora", "fam_prompt"}, marks=pytest.mark.slow),
        pytest.param(
            "adafactor",
            {"memory": MemoryConfig(block_size=8)},
            {"accumulate": 2},
            {"lora"},
            marks=pytest.mark.slow,
        ),
        pytest.param("adamw", {"mixing": LimeConfig()}, {}, {"lora", "fam_prompt"}, marks=pytest.mark.slow),
        ("adafactor", {"mixing": LimeConfig()}, {"train_mixing": True}, {"lora", "fam_prompt", "mixing"}),
    ],
    ids=["FAM", "BSWA in parts", "FAM with LIMe", "FAM with LIMe that trains"],
)
def test_only_what_shall_be_is_trained(tmp_path, optimizer, model, settings, trained):
    optim = OptimConfig(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.1, schedule="constant")
    config = lora_run(tmp_path, mode="packed", model=model, optim=optim, **settings)
    decoder, (optimiser, schedule) = Decoder(config.model), make_optimizer(config.optim, config.steps)
    state = first_state(config, decoder, optimiser)
    # The optimiser knows of nothing else.
    known = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state):
        known |= set([part.key for part in path if getattr(part, "key", None) in state.params][:1])
    assert known == trained
    before = jax.tree.map(np.array, state.params)
    step = make_train_step(config, decoder, optimiser, schedule)
    for batch in batches(config, 3):
        state, metrics = step(state, batch)
    assert {name for name in metrics if name.startswith("grad_norm/")} == {f"grad_norm/{name}" for name in trained}
    assert float(metrics["param_norm"]) == pytest.approx(float(optax.tree.norm(state.params)), rel=1e-5)
    for name, part in before.items():
        if name not in trained:
            assert_same_bits(state.params[name], part)
            continue
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(part), jax.tree.leaves(state.params[name]), strict=True
        ):
            assert np.any(old != np.asarray(new)), f"{name}{jax.tree_util.keystr(path)} has not moved"


def test_dropout_is_in_training_steps_alone(tmp_path):
    base = lora_run(tmp_path, mode="packed", model={"memory": MemoryConfig(block_size=8)})
    (batch,) = batches(base, 1)
    losses = []
    for dropout in (0.0, 0.5):
        config = with_model(base, lora=LoraConfig(rank=2, dropout=dropout))
        model, (optimizer, schedule) = Decoder(config.model), make_optimizer(config.optim, config.steps)
        state = first_state(config, model, optimizer)
        state = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf + 0.1, state.params))
        sums, _ = make_eval_step(model)(state.params, batch, None)
        _, metrics = make_train_step(config, model, optimizer, schedule)(state, batch)
        losses.append((float(metrics["loss"]), float(means(sums)["loss"])))
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] == losses[1][1]


@pytest.mark.usefixtures("compile_cache")
def test_a_model_is_given_fam_and_goes_on_bit_for_bit(tmp_path, capsys):
    bswa = with_model(tiny(tmp_path, "bswa", steps=0, seed=1), memory=MemoryConfig(block_size=8))
    before = train(bswa, progress=False).state.params
    straight, parts = (lora_run(tmp_path, name, init_from=str(tmp_path / "bswa")) for name in ("straight", "parts"))
    done = train(straight)
    said = capsys.readouterr().out
    assert "new: fam_prompt, lora.layers.w_down_a, lora.layers.w_down_b," in said
    for name, part in before.items():
        assert_same_bits(done.state.params[name], part)
    train(dataclasses.replace(parts, steps=3), progress=False)
    train(parts, progress=False)
    one, other = restore(straight), restore(parts)
    assert one.step == other.step == 6
    assert_same_bits((one.params, one.rest), (other.params, other.rest))
    assert metric_rows(straight) == metric_rows(parts)
    # Who reads the checkpoint has the merged model.
    model, variables, run = load_model(straight.directory)
    assert (model.config, run) == (dataclasses.replace(straight.model, lora=None), straight)
    assert "lora" not in variables["params"]
    text = some_tokens(1, 20)
    want = runner(straight.model)(done.state.params, text).logits
    assert_close(runner(model.config)(variables["params"], text).logits, want, 1e-5)


def test_mixing_trains_with_lora_only(tmp_path):
    config = lora_run(tmp_path, train_mixing=True, model={"mixing": LimeConfig()})
    check(config)
    for change in ({"mixing": None}, {"lora": None}):
        with pytest.raises(ValueError, match=r"train_mixing=True is not allowed without both model.lora and"):
            check(with_model(config, **change))


@pytest.mark.parametrize("targets", [tuple(WEIGHTS), ("wk", "w_down")])
def test_operations(targets):
    """The formula is the count of the forward pass, and that of a step without gradients of the weights."""
    config = dataclasses.replace(presets.tiny(), lora=LoraConfig(rank=4, targets=targets))
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def loss(trained, params, tokens):
        return jnp.sum(model.apply({"params": {**params, **trained}}, tokens).logits)

    trained = {name: params[name] for name in ("lora", "fam_prompt")}
    forward = flops.count(loss, trained, params, tokens)
    assert forward == flops.forward_flops(config, 2, 64)
    short = flops.count(loss, trained, params, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    assert short == flops.forward_flops(config, 2, 3)
    counted = flops.count(jax.grad(loss), trained, params, tokens)
    assert counted == pytest.approx(flops.train_flops(config, 2, 64), rel=0.01)
    assert counted < 2.4 * forward
    assert flops.step_flops(config, False, 2, 64) == flops.train_flops(config, 2, 64, useful=True)

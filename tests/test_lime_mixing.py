"""Every mixer in the decoder: against independent code, and that schedules, splits and types change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lime_reference
import numpy as np
import optax
import pytest
from reference import (
    SIZES,
    B,
    N,
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

from experiments.optim import OptimConfig, make_optimizer
from fam_jax import Decoder, generate
from lime_jax import (
    AttentionResidualsConfig,
    DenseFormerConfig,
    DepthAttentionConfig,
    HyperConnectionsConfig,
    LimeConfig,
    ValueResidualConfig,
)

LAYERS = 3
MIXERS = {
    "static_kv": LimeConfig(),
    "average": LimeConfig("average"),
    "dynamic_kv": LimeConfig("dynamic_kv"),
    "static_hidden": LimeConfig("static_hidden"),
    "dynamic_hidden": LimeConfig("dynamic_hidden"),
    "dynamic_views": LimeConfig("dynamic_views"),
    "DenseFormer": DenseFormerConfig(),
    "Hyper-Connections": HyperConnectionsConfig(),
    "Value Residual": ValueResidualConfig(),
    "Depth-Attention": DepthAttentionConfig(),
    "Attention Residuals": AttentionResidualsConfig(),
}
VARIANTS = {
    "same head": LimeConfig(same_head=True),
    "separate": LimeConfig(separate_kv=True),
    "separate, same head, first": LimeConfig(separate_kv=True, same_head=True, sources="first:1"),
    "last": LimeConfig(sources="last:2"),
    "dynamic, separate, first": LimeConfig("dynamic_kv", separate_kv=True, sources="first:1"),
    "average, last": LimeConfig("average", sources="last:2"),
    "hidden, first": LimeConfig("static_hidden", sources="first:1"),
    "dynamic hidden, last": LimeConfig("dynamic_hidden", sources="last:2"),
    "views, relu": LimeConfig("dynamic_views", activation="relu"),
    "views, last": LimeConfig("dynamic_views", sources="last:1"),
    "streams": HyperConnectionsConfig(streams=2),
}
TOKENS = some_tokens(2, 3 * B + 1, seed=2)
everywhere = pytest.mark.parametrize("name", MIXERS)
# Of keys and values, what layers read, their outputs, and streams one is always tested, the others are slow.
ONE_OF_EACH = ("static_kv", "dynamic_views", "Attention Residuals", "Hyper-Connections")


def one_of_each(*what, names=MIXERS):
    """Parameters of a test, one set for each name."""
    return [pytest.param(*what, name, marks=[] if name in ONE_OF_EACH else pytest.mark.slow) for name in names]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def full(mixing, **changes):
    return decoder_config(num_layers=LAYERS + 1, mixing=mixing, **changes)


def fam(mixing, **changes):
    return fam_config(num_layers=LAYERS, mixing=mixing, **changes)


def initial_params(config):
    return quick_jit(Decoder(config).init)(jax.random.key(0), TOKENS[:, :1])["params"]


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *(("serial", name) for name in {**MIXERS, **VARIANTS}),
        *one_of_each("parallel, QK-norm", names={**MIXERS, **VARIANTS}),
    ],
)
def test_against_plain_loops(name, shape, x64):
    changes = {"parallel_block": True, "qk_norm": True, "tie_embeddings": False} if shape != "serial" else {}
    config = full({**MIXERS, **VARIANTS}[name], **changes)
    tokens = some_tokens(1, 7)
    got = runner(config)(params_of(config), tokens).logits[0]
    want = lime_reference.forward(config, params_of(config), tokens[0])
    assert_close(got, want, 1e-10)


@functools.cache
def values_and_gradients(config):
    weights = np.random.default_rng(3).standard_normal((*TOKENS.shape, config.vocab_size))

    def loss(params):
        out = Decoder(config).apply({"params": params}, TOKENS)
        return jnp.sum(out.logits * weights) + jnp.sum(out.state.fam**2), out.logits

    return quick_jit(jax.value_and_grad(loss, has_aux=True))(params_of(config))


@mostly_slow(MIXERS, fast=("static_kv",))
def test_orders_agree_in_values_and_gradients(name, x64):
    """The layer schedule with scanned layers, the block schedule with unrolled ones, on one parameter tree."""
    config = fam(MIXERS[name])
    one = values_and_gradients(config)
    two = values_and_gradients(dataclasses.replace(config, schedule="block", scan_layers=False))
    assert_trees_close(two, one, 1e-10)


@mostly_slow(MIXERS, fast=("static_kv",))
def test_wavefront_agrees_in_values_and_gradients(name, x64):
    config = fam(MIXERS[name])
    two = values_and_gradients(dataclasses.replace(config, schedule="wavefront"))
    assert_trees_close(two, values_and_gradients(config), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic_kv", "dynamic_views", "Attention Residuals", "Hyper-Connections"])
def test_orders_agree_in_parallel_blocks(name, x64):
    config = fam(MIXERS[name], parallel_block=True, schedule="block")
    one = values_and_gradients(config)
    two = values_and_gradients(dataclasses.replace(config, schedule="layer", scan_layers=False))
    assert_trees_close(two, one, 1e-10)


@pytest.mark.parametrize(
    ("backward", "remat"),
    [
        ("push", "none"),
        ("rebuild", "none"),
        ("pull", "none"),
        pytest.param("push", "full", marks=pytest.mark.slow),
        pytest.param("pull", "full", marks=pytest.mark.slow),
        pytest.param("rebuild", "full", marks=pytest.mark.slow),
    ],
)
def test_ways_to_the_gradient_agree(backward, remat, x64):
    config = fam(LimeConfig(), remat=remat)
    other = dataclasses.replace(config, mixing=LimeConfig(backward=backward))
    assert_trees_close(values_and_gradients(other), values_and_gradients(config), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["same head", "separate", "separate, same head, first", "average, last", "last"])
def test_what_is_pulled_is_what_is_read(name, x64):
    config = fam(VARIANTS[name], num_kv_heads=2)
    other = dataclasses.replace(config, mixing=dataclasses.replace(VARIANTS[name], backward="pull"))
    assert_trees_close(values_and_gradients(other), values_and_gradients(config), 1e-10)


@pytest.mark.slow
def test_pulled_in_the_block_schedule(x64):
    config = fam(LimeConfig())
    other = dataclasses.replace(config, mixing=LimeConfig(backward="pull"), schedule="block", remat="full")
    assert_trees_close(values_and_gradients(other), values_and_gradients(config), 1e-10)


def test_pulled_in_half_precision():
    """The gradient is as near to that of full precision as by the other way."""

    def error(mixing):
        config = full(mixing, remat="full", dtype="float32", param_dtype="float32")
        exact, half = (
            jax.tree.leaves(values_and_gradients(dataclasses.replace(config, dtype=dtype))[1])
            for dtype in ("float32", "bfloat16")
        )
        squares = [(jnp.sum((a - b) ** 2), jnp.sum(b**2)) for a, b in zip(half, exact, strict=True)]
        return np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))

    assert error(LimeConfig(backward="pull")) < 1.2 * error(LimeConfig())


# The others have no weights for layers that may not be read.
WITH_DEAD_WEIGHTS = ("static_kv", "dynamic_kv", "static_hidden", "dynamic_hidden", "dynamic_views", "DenseFormer")


def dead_weights(mixing):
    """Where a router's parameters belong to slots that the layer may not read: booleans by name."""
    layers = np.arange(LAYERS)
    later = layers[None] > layers[:, None]
    own = np.arange(2 * LAYERS)[None] > 2 * layers[:, None]  # attention reads up to its own input
    feed_forward = np.arange(2 * LAYERS)[None] > 2 * layers[:, None] + 1
    where = {
        "router": (later | (layers == 0)[:, None])[:, None, :, None],
        "token": (later | (layers == 0)[:, None])[:, None, None],
        "logits": later[:, None],
        "project": later[:, None, None],
        "attention_weight": own[:, None, None],
        "attention_bias": own[:, None],
        "ff_weight": feed_forward[:, None, None],
        "ff_bias": feed_forward[:, None],
        "weights": np.arange(LAYERS + 1)[None] > layers[:, None] + 1,  # DenseFormer's, the embeddings first
    }
    wanted = {name: leaf for name, leaf in mixing.items() if name in where and (name != "weights" or leaf.shape[1] > 2)}
    return {name: np.broadcast_to(where[name], leaf.shape) for name, leaf in wanted.items()}


@mostly_slow(WITH_DEAD_WEIGHTS, fast=("static_kv",))
def test_what_no_layer_reads_is_zero(name):
    """Initial parameters, gradients and optimiser moments of weights for later layers, in the padded layout."""
    config = dataclasses.replace(fam(MIXERS[name]), dtype="float32", param_dtype="float32")
    params = initial_params(config)
    mixing = params.get("mixing", {}).get("layers", {})
    dead = dead_weights(mixing)
    optimizer, _ = make_optimizer(OptimConfig(learning_rate=1e-2), steps=10)

    @quick_jit
    def step(params, state):
        loss = lambda p: jnp.sum(Decoder(config).apply({"params": p}, TOKENS).logits ** 2)  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(2):
        params, state = step(params, state)
    for path, where in dead.items():
        assert not np.any(np.asarray(params["mixing"]["layers"][path])[where]), path
    moments = [leaf for leaf in jax.tree_util.tree_leaves_with_path(state) if "mixing" in jax.tree_util.keystr(leaf[0])]
    assert moments
    for path, leaf in moments:
        name = path[-1].key
        if name in dead:
            assert not np.any(np.asarray(leaf)[dead[name]]), jax.tree_util.keystr(path)


@mostly_slow(WITH_DEAD_WEIGHTS, fast=("static_kv", "dynamic_views"))
def test_later_layers_are_not_read(name, x64):
    """Garbage where no weight belongs changes nothing."""
    config = fam(MIXERS[name])
    params = params_of(config)
    mixing = params["mixing"]["layers"]
    clean = {**mixing, **{path: np.where(dead, 0.0, mixing[path]) for path, dead in dead_weights(mixing).items()}}
    assert any(np.any(clean[path] != mixing[path]) for path in mixing)
    want = runner(config)({**params, "mixing": {**params["mixing"], "layers": clean}}, TOKENS).logits
    np.testing.assert_array_equal(runner(config)(params, TOKENS).logits, want)


@pytest.mark.parametrize(("kind", "name"), [*one_of_each("fam"), *one_of_each("bswa"), *one_of_each("full")])
def test_no_token_reads_a_later_one(name, kind, x64):
    config = {"fam": fam, "bswa": lambda m: decoder_config({"segments": 1}, num_layers=LAYERS, mixing=m), "full": full}
    config = config[kind](MIXERS[name])
    run, params = runner(config), params_of(config)
    want = np.asarray(run(params, TOKENS).logits)
    for place in (0, B - 1, B, B + 1, 2 * B - 1, 3 * B):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % config.vocab_size
        got = np.asarray(run(params, changed).logits)
        np.testing.assert_array_equal(got[:, :place], want[:, :place])
        assert np.any(got[:, place] != want[:, place])


FORMS = {form: LimeConfig(backward=form) for form in ("push", "pull", "rebuild")}


@mostly_slow({**MIXERS, **FORMS}, fast=("static_kv", "Hyper-Connections"))
def test_splits_equal_one_call(name, x64):
    config = fam({**MIXERS, **FORMS}[name])
    want = runner(config)(params_of(config), TOKENS)
    state, got = None, []
    run = runner(config)
    for start, stop in ((0, 1), (1, 2), (2, B + 3), (B + 3, B + 4), (B + 4, 3 * B + 1)):
        out = run(params_of(config), TOKENS[:, start:stop], state=state)
        state = out.state
        got.append(out.logits)
    assert_close(np.concatenate(got, axis=1), want.logits, 1e-10)
    assert_trees_close(state, want.state, 1e-10)


@mostly_slow(MIXERS, fast=("dynamic_views",))
def test_generation_reads_what_was_generated(name):
    config = dataclasses.replace(fam(MIXERS[name]), dtype="float32", param_dtype="float32")
    variables = {"params": jax.tree.map(jnp.asarray, params_of(config))}
    out = generate(Decoder(config), variables, TOKENS, 6)
    whole = np.concatenate([TOKENS, out.ids], axis=1)
    logits = runner(config)(variables["params"], whole).logits
    np.testing.assert_array_equal(np.argmax(logits[:, TOKENS.shape[1] - 1 : -1], axis=-1), out.ids)


@everywhere
@pytest.mark.parametrize("memory", [None, {"segments": 1, "fam_length": N}])
def test_the_state_is_as_large_as_without(name, memory, x64):
    """Decoding keeps mixed keys and values, so the cache does not grow by a byte."""
    plain, mixed = (decoder_config(memory, num_layers=LAYERS, mixing=m) for m in (None, MIXERS[name]))
    length = 9 if memory is None else None
    one, two = (jax.eval_shape(lambda c=c: Decoder(c).init_state(2, length)) for c in (plain, mixed))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(lambda x: (x.shape, x.dtype), two)


@mostly_slow(MIXERS, fast=("static_kv",))
def test_bfloat16_is_near(name):
    exact = fam(MIXERS[name], tie_embeddings=False)
    exact = dataclasses.replace(exact, dtype="float32", param_dtype="float32")
    params = jax.tree.map(lambda x: 0.5 * x if np.ndim(x) > 2 else x, params_of(exact))
    want = runner(exact)(params, TOKENS[:, :B]).logits
    got = runner(dataclasses.replace(exact, dtype="bfloat16"))(params, TOKENS[:, :B]).logits
    assert_close(got, want, 2e-2 * 2)


@everywhere
def test_other_weights_keep_their_paths(name, x64):
    plain = model_shapes(fam(None))["params"]
    mixed = dict(model_shapes(fam(MIXERS[name]))["params"])
    mixed.pop("mixing", None)
    assert jax.tree.map(jnp.shape, mixed) == jax.tree.map(jnp.shape, plain)


@pytest.mark.parametrize(
    ("router", "dtype", "tolerance"),
    [("static_kv", "float32", 1e-6), pytest.param("dynamic_kv", "float64", 1e-12, marks=pytest.mark.slow)],
)
def test_identity_router_is_the_model_without_mixing(router, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        types = {"dtype": dtype, "param_dtype": dtype}
        plain, mixed = fam(None, **types), fam(LimeConfig(router, init="zeros"), **types)
        params = params_of(plain)
        start = initial_params(mixed)["mixing"]
        want = runner(plain)(params, TOKENS).logits
        got = runner(mixed)({**params, "mixing": start}, TOKENS).logits
        assert_close(got, want, tolerance)


def test_last_one_is_no_mixing(x64):
    params = params_of(fam(None))
    mixed = fam(LimeConfig(sources="last:1", init="zeros"))
    start = initial_params(mixed)["mixing"]
    assert_close(runner(mixed)({**params, "mixing": start}, TOKENS).logits, runner(fam(None))(params, TOKENS).logits)


def test_wrong_mixing():
    with pytest.raises(ValueError, match=r"mixing='lime' is not allowed; give a config of lime_jax"):
        dataclasses.replace(decoder_config(), mixing="lime")
    assert SIZES

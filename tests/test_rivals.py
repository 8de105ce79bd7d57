"""FAM's variants and rivals against independent code, in every way of reading a text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    B,
    N,
    assert_close,
    assert_trees_close,
    decoder_config,
    fam_config,
    mostly_slow,
    params_of,
    quick_jit,
    random_params,
    runner,
    some_tokens,
)
from reference import fam_decoder as fam_reference
from rival_models import ALL, KINDS, VARIANTS, readable, rival
from rival_reference import block_decoder, rival_decoder

from experiments import flops
from fam_jax import Decoder, generate
from lime_jax import DenseFormerConfig, LimeConfig

T = 4 * B + 3
TOKENS = some_tokens(2, T, seed=1)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def carried(state):
    """What takes the past along in place of the FAM, [b, ...]."""
    return np.moveaxis(state.fam, 1, 0) if state.summaries is None else np.asarray(state.summaries)


@mostly_slow(
    ALL,
    fast=(
        "no feed-forward",
        "prefix",
        "three FAM",
        "one layer of three",
        "two FAM, no segments, absolute, fractional",
        "summary",
        "summary, all that pretrained models have",
        "feedback",
        "rmt",
        "rmt, a segment, absolute, parallel",
        "autocompressor",
    ),
)
def test_equals_the_loop(name):
    config = ALL[name]
    params = params_of(config)
    out = runner(config)(params, TOKENS)
    want = [rival_decoder(params, config, row) for row in TOKENS]
    assert_close(out.logits, np.stack([read.logits for read in want]))
    if want[0].memory is not None:
        assert_close(carried(out.state), np.stack([read.memory for read in want]))


def test_the_references_agree_where_both_apply():
    """Else one of them is wrong."""
    config = fam_config({"segments": 2})
    params = params_of(config)
    assert_close(
        block_decoder(params, config, TOKENS[0]).logits, fam_reference(params, config, TOKENS[0]).logits, 1e-12
    )


@mostly_slow(KINDS, fast=("feedback",))
def test_splits_equal_one_call(name):
    """Token by token, and by calls shorter and longer than a block that end in an open block: logits and state."""
    config = KINDS[name]
    params, run, length = params_of(config), runner(config), 4 * B + 1
    whole = run(params, TOKENS[:, :length])
    for sizes in ([1] * length, [2, B + 2, 1, B + 2, 2]):
        state, parts, start = None, [], 0
        for size in sizes:
            out = run(params, TOKENS[:, start : start + size], state=state)
            parts.append(out.logits)
            state, start = out.state, start + size
        assert_close(np.concatenate(parts, axis=1), whole.logits, 1e-10, str(sizes))
        assert_trees_close(readable(state), readable(whole.state), 1e-10)
        shapes = jax.tree.map(jnp.shape, Decoder(config).init_state(2))
        assert jax.tree.map(jnp.shape, state) == shapes


@mostly_slow(KINDS, fast=("summary", "feedback", "rmt", "autocompressor"))
def test_ragged_rows_and_document_starts(name):
    """Rows of other lengths, a document that starts inside of a call, and one that drops an open block."""
    config = KINDS[name]
    params, run = params_of(config), runner(config)
    first = run(params, TOKENS[:, : 2 * B + 1], lengths=np.array([2 * B + 1, B - 1]))
    for r, count in enumerate((2 * B + 1, B - 1)):
        assert_close(first.logits[r, :count], rival_decoder(params, config, TOKENS[r, :count]).logits)
    # Row 0 drops a token and begins anew; row 1 goes on, and begins anew at the block after its open one.
    text = some_tokens(2, 3 * B, seed=2)
    reset = np.array([[True, False, False], [False, True, False]])
    second = run(params, text, state=first.state, reset=reset)
    assert_close(second.logits[0], rival_decoder(params, config, text[0]).logits)
    joined = np.concatenate([TOKENS[1, : B - 1], text[1, :1]])
    assert_close(second.logits[1, :1], rival_decoder(params, config, joined).logits[-1:])
    assert_close(second.logits[1, 1:], rival_decoder(params, config, text[1, 1:]).logits)
    np.testing.assert_array_equal(second.state.blocks, [3, 2])


@mostly_slow(KINDS, fast=("prefix", "rmt"))
def test_gradients_equal_finite_differences_of_the_loop(name):
    config = KINDS[name]
    params, direction = params_of(config), random_params(config, seed=5)
    tokens = TOKENS[0, : 3 * B + 1]
    weights = np.random.default_rng(6).standard_normal((len(tokens), config.vocab_size))

    def loss(step):
        moved = jax.tree.map(lambda p, q: np.asarray(p + step * q), params, direction)
        return float(np.sum(weights * rival_decoder(moved, config, tokens).logits))

    def model_loss(p):
        return (weights * Decoder(config).apply({"params": p}, tokens[None]).logits[0]).sum()

    step = 1e-5
    want = (loss(step) - loss(-step)) / (2 * step)
    gradient = quick_jit(jax.grad(model_loss))(params)
    got = sum(float(np.sum(g * q)) for g, q in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert got == pytest.approx(want, rel=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(leaf != 0), f"no gradient reaches {jax.tree_util.keystr(path)}"


@mostly_slow(["no feed-forward", "prefix", "three FAM", "one layer of three", "summary"], fast=("no feed-forward",))
def test_both_schedules_agree_in_values_and_gradients(name):
    """With a state passed, and the randomness of training."""
    config = dataclasses.replace(KINDS[name], memory=dataclasses.replace(KINDS[name].memory, noise=0.1, clip=2.0))
    params = params_of(KINDS[name])
    state = runner(config)(params, TOKENS[:, : B + 2], lengths=np.array([B + 2, B - 1])).state
    floats = {name: leaf for name, leaf in state.__dict__.items() if np.ndim(leaf) > 1}
    weights = np.random.default_rng(3).standard_normal((2, T - B - 2, config.vocab_size))

    def results(**change):
        model = Decoder(dataclasses.replace(config, **change))

        def loss(p, floats):
            text = TOKENS[:, B + 2 :]
            out = model.apply({"params": p}, text, state=state.replace(**floats), key=jax.random.key(1))
            return jnp.sum(out.logits * weights) + jnp.sum(out.state.fam**2)

        return quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, floats)

    want = results(schedule="layer")
    assert_trees_close(results(schedule="block"), want, 1e-10)
    if name in ("three FAM", "summary"):
        assert_trees_close(results(schedule="layer", remat="full", scan_layers=False), want, 1e-10)


@mostly_slow(["feedback", "rmt"], fast=("feedback",))
def test_unrolled_layers_and_remat_change_nothing(name):
    config = KINDS[name]
    params = params_of(config)
    weights = np.random.default_rng(3).standard_normal((2, T, config.vocab_size))

    def results(**change):
        model = Decoder(dataclasses.replace(config, **change))
        loss = jax.value_and_grad(lambda p: jnp.sum(model.apply({"params": p}, TOKENS).logits * weights))
        return quick_jit(loss)(params)

    want = results()
    assert_trees_close(results(remat="full"), want, 1e-10)
    assert_trees_close(results(scan_layers=False), want, 1e-10)


@pytest.mark.parametrize("kind", ["rmt", "autocompressor"])
def test_token_by_token_with_more_rows_than_layers(kind):
    """Else the rows of a prompt could pass for layers."""
    config = rival(kind)
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, fam_length=config.num_layers + 1))
    params, run = params_of(config), runner(config)
    state, parts = None, []
    for start in range(B + 1):
        out = run(params, TOKENS[:, start : start + 1], state=state)
        parts, state = [*parts, out.logits], out.state
    assert_close(np.concatenate(parts, axis=1), run(params, TOKENS[:, : B + 1]).logits)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        pytest.param("three FAM", B + 2, marks=pytest.mark.slow),
        ("feedback", B - 1),
        pytest.param("three FAM", B - 1, marks=pytest.mark.slow),
        pytest.param("rmt", 2 * B, marks=pytest.mark.slow),
    ],
)
def test_gradients_flow_through_a_passed_state(name, split):
    """The gradient of two calls, split inside a block or at its edge, is the gradient of one."""
    params, model = params_of(KINDS[name]), Decoder(KINDS[name])
    text = TOKENS[:1, : 3 * B]
    weights = np.random.default_rng(11).standard_normal((3 * B - split, KINDS[name].vocab_size))

    def one(p):
        return jnp.sum(model.apply({"params": p}, text).logits[0, split:] * weights)

    def two(p):
        state = model.apply({"params": p}, text[:, :split]).state
        if split < B:  # this short call ends a block
            out = model.apply({"params": p}, text[:, split : B + 1], state=state)
            rest = model.apply({"params": p}, text[:, B + 1 :], state=out.state).logits
            return jnp.sum(jnp.concatenate([out.logits, rest], axis=1)[0] * weights)
        return jnp.sum(model.apply({"params": p}, text[:, split:], state=state).logits[0] * weights)

    whole, parts = quick_jit(lambda p: (jax.grad(one)(p), jax.grad(two)(p)))(params)
    assert_trees_close(parts, whole, 1e-10)


# --------------------------------------------------------------------------------------------------- who reads whom

REACH = {name: dataclasses.replace(config, tie_embeddings=False, vocab_size=T) for name, config in KINDS.items()}


@mostly_slow(KINDS, fast=("feedback", "autocompressor"))
def test_every_token_reads_all_of_its_past_and_nothing_else(name):
    """Exactly zero gradients above the diagonal, and none below it."""
    config = REACH[name]
    text = np.arange(T, dtype=np.int32)[None]
    params, model = params_of(config), Decoder(config)
    weights = np.random.default_rng(1).standard_normal(config.vocab_size)

    def outputs(embed):
        return model.apply({"params": {**params, "embed": embed}}, text).logits[0] @ weights

    gradients = np.asarray(quick_jit(jax.jacrev(outputs))(jnp.asarray(params["embed"])))
    assert np.all(np.isfinite(gradients))
    reads, expected = np.any(gradients != 0, axis=-1), np.tri(T, dtype=bool)
    if name == "autocompressor":
        # Summaries read only earlier ones that are kept: two, each of which has read two more.
        assert not np.any(reads & ~expected)
        assert reads[np.tri(T, dtype=bool) & ~np.tri(T, k=-3 * B, dtype=bool)].all()
    else:
        np.testing.assert_array_equal(reads, expected)


@mostly_slow(KINDS, fast=("summary", "rmt"))
def test_changing_a_token_leaves_every_earlier_logit_bit_for_bit(name):
    config = KINDS[name]
    params, run = params_of(config), runner(config)
    before = run(params, TOKENS[:1]).logits
    for j in range(0, T, 3):
        changed = TOKENS[:1].copy()
        changed[0, j] = (changed[0, j] + 1) % config.vocab_size
        after = run(params, changed).logits
        np.testing.assert_array_equal(after[0, :j], before[0, :j], err_msg=f"token {j}")
        assert np.any(np.asarray(after[0, j]) != np.asarray(before[0, j]))


def test_bounded_summaries_forget_the_oldest():
    """Two are kept: the first block reaches the fourth only through summaries that have read it."""
    config = rival("autocompressor", {"segments": 0, "summaries": 1})
    params, run = params_of(config), runner(config)
    state = run(params, TOKENS[:, : 2 * B]).state
    assert state.summaries.shape == (2, 1, N, config.d_model)
    more = dataclasses.replace(config, memory=dataclasses.replace(config.memory, summaries=8))
    assert Decoder(more).init_state(1).summaries.shape[1] == 8
    default = dataclasses.replace(config, memory=dataclasses.replace(config.memory, summaries=None))
    assert Decoder(default).init_state(1).summaries.shape[1] == 260


def test_a_text_pays_only_for_summaries_that_it_can_have():
    """Three of nine, without a state; with one, which may have them, all."""
    config = rival("autocompressor", {"segments": 0, "summaries": 9})
    params, run = params_of(config), runner(config)
    found = run(params, TOKENS[:, : 3 * B])
    given = run(params, TOKENS[:, : 3 * B], state=Decoder(config).init_state(2))
    assert_trees_close(found, given, 1e-12)
    few = dataclasses.replace(config, memory=dataclasses.replace(config.memory, summaries=3))
    tokens = TOKENS[:, : 3 * B]
    costs = [flops.count(lambda c=c: Decoder(c).apply({"params": params}, tokens).logits) for c in (config, few)]
    assert costs[0] == costs[1]


# ------------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize(
    ("kind", "mixing"),
    [
        ("rmt", LimeConfig("dynamic_views")),
        pytest.param("rmt", DenseFormerConfig(), marks=pytest.mark.slow),
        pytest.param("autocompressor", LimeConfig(), marks=pytest.mark.slow),
        ("prefix", LimeConfig()),
    ],
    ids=["rmt-dynamic-views", "rmt-denseformer", "autocompressor-lime", "prefix-lime"],
)
def test_mixing_layers_in_any_split(kind, mixing):
    """Rows of memory climb through mixers as tokens do: causal, the same in any split and unrolled."""
    config = fam_config({"fam_init": "prefix", "fam_blocks": 2}, mixing=mixing)
    config = config if kind == "prefix" else rival(kind, mixing=mixing)
    params, run, length = params_of(config), runner(config), 2 * B + 2
    whole = run(params, TOKENS[:, :length])
    state, parts = None, []
    for size in (1, 1, B + 1, B - 1):
        start = sum(part.shape[1] for part in parts)
        out = run(params, TOKENS[:, start : start + size], state=state)
        parts, state = [*parts, out.logits], out.state
    assert_close(np.concatenate(parts, axis=1), whole.logits)
    unrolled = runner(dataclasses.replace(config, scan_layers=False))(params, TOKENS[:, :length])
    assert_close(unrolled.logits, whole.logits)
    changed = TOKENS[:, :length].copy()
    changed[:, -1] = (changed[:, -1] + 1) % config.vocab_size
    np.testing.assert_array_equal(run(params, changed).logits[:, :-1], whole.logits[:, :-1])


@mostly_slow(["three FAM", "summary", "feedback", "autocompressor"], fast=("three FAM", "autocompressor"))
def test_rows_and_generation(name):
    """A state's rows can be taken apart, and text goes on from it as from its tokens."""
    config = KINDS[name]
    params = params_of(config)
    model = Decoder(config)
    state = runner(config)(params, TOKENS[:, : 2 * B + 1]).state
    twice = state.rows([1, 1])
    prompt = TOKENS[1:, 2 * B + 1 : 2 * B + 3].repeat(2, axis=0)
    out = generate(model, {"params": params}, prompt, 3, state=twice)
    text = TOKENS[1, : 2 * B + 3]
    for token in np.asarray(out.ids[1]):
        assert token == np.argmax(rival_decoder(params, config, text).logits[-1])
        text = np.append(text, token)


def parameters(config):
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 3), jnp.int32))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def test_parameters_are_those_of_bswa_and_the_start():
    plain, d = parameters(decoder_config({})), decoder_config({}).d_model
    assert parameters(rival("feedback")) == plain
    for kind in ("summary", "rmt", "autocompressor"):
        assert parameters(rival(kind)) == plain | {"['params']['fam_prompt']": (N, d)}
    assert parameters(VARIANTS["prefix"]) == plain | {"['params']['fam_prefix']": (2, N, d)}
    for name in ("no feed-forward", "three FAM"):
        assert parameters(VARIANTS[name]) == parameters(fam_config())


def test_only_the_layers_that_are_named_have_a_fam():
    """Where a layer has no FAM, its FAM stays zero; with all layers named it is the model that names none."""
    config = fam_config({"layers": (1,)})
    params = params_of(config)
    state = runner(config)(params, TOKENS).state
    assert np.all(np.asarray(state.fam[0]) == 0)
    assert np.any(np.asarray(state.fam[1]) != 0)
    everywhere = dataclasses.replace(config, memory=dataclasses.replace(config.memory, layers=(0, 1)))
    assert_close(runner(everywhere)(params, TOKENS).logits, runner(fam_config())(params, TOKENS).logits)


@mostly_slow(["summary", "feedback", "rmt", "autocompressor"], fast=("summary", "rmt"))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param("float32", 1e-5, marks=pytest.mark.slow), ("bfloat16", 2e-2)]
)
def test_lower_precisions_stay_within_their_tolerance(name, dtype, tolerance):
    """With the model's own initial weights: larger ones amplify rounding beyond what the tolerance is for."""
    config = dataclasses.replace(KINDS[name], dtype=dtype, param_dtype="float32")
    with jax.enable_x64(False):
        params = quick_jit(Decoder(config).init)(jax.random.key(1), TOKENS)["params"]
        out = runner(config)(params, TOKENS)
    assert out.logits.dtype == np.float32
    assert all(leaf.dtype != np.float32 for leaf in jax.tree.leaves(out.state.layers)) or dtype == "float32"
    want = np.stack([rival_decoder(params, config, row).logits for row in TOKENS])
    assert_close(out.logits, want, tolerance)


def test_a_state_of_another_memory_is_refused():
    model = Decoder(KINDS["rmt"])
    params = params_of(KINDS["rmt"])
    with pytest.raises(ValueError, match=r"state.summaries is NoneType, but this model"):
        model.apply({"params": params}, TOKENS, state=model.init_state(2).replace(summaries=None))
    with pytest.raises(ValueError, match=r"state.output_k is .*, but this model's memory has none"):
        model.apply({"params": params}, TOKENS, state=model.init_state(2).replace(output_k=jnp.zeros(3)))


def test_forgetting_zeroes_what_is_carried():
    for name in ("three FAM", "rmt", "autocompressor"):
        config = KINDS[name]
        params, run = params_of(config), runner(config)
        state = run(params, TOKENS[:, : 2 * B]).state
        for part in ("fam", "fam_k", "fam_v", "summaries"):
            leaf = getattr(state.forget(), part)
            assert leaf is None or not np.any(np.asarray(leaf))
        np.testing.assert_array_equal(state.forget().segment_k, state.segment_k)

"""Operations counted on jaxprs of known size, and the closed formula against the count of the decoder."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from experiments import flops
from experiments.step import make_eval_step
from fam_jax import Decoder, DecoderConfig, MemoryConfig, presets
from lime_jax import DenseFormerConfig, LimeConfig

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
STACK = jax.ShapeDtypeStruct((5, 8, 8), jnp.float32)
ONE = 2 * 4 * 8 * 8  # of X @ SQUARE


def layers(x, stack, wrap=lambda f: f):
    def step(x, w):
        return jnp.tanh(x @ w), None

    return jnp.sum(jax.lax.scan(wrap(step), x, stack)[0])


def remat_layers(x, stack):
    return layers(x, stack, jax.checkpoint)


def unrolled_loop(x, w):
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x)


def branches(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


@jax.custom_vjp
def own_gradient(x, w):
    return x @ w


def own_gradient_forward(x, w):
    return x @ w, (x, w)


def own_gradient_backward(saved, y):
    x, w = saved
    return y @ w.T, (x.T @ y) @ (w @ w)


own_gradient.defvjp(own_gradient_forward, own_gradient_backward)


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (jnp.matmul, (X, SQUARE), ONE),
        (lambda x, w: jnp.einsum("bik,bkj->bij", x, w), (STACK, STACK), 5 * 2 * 8**3),
        (lambda x: jnp.sum(jnp.exp(x)), (X,), 0),
        (layers, (X, STACK), 5 * ONE),
        (jax.grad(layers, argnums=(0, 1)), (X, STACK), 3 * 5 * ONE),
        # Only the gradient of the weights of the first layer is wanted, but a scan has one body.
        (jax.grad(layers, argnums=1), (X, STACK), 3 * 5 * ONE),
        (jax.grad(remat_layers, argnums=(0, 1)), (X, STACK), 4 * 5 * ONE),
        (jax.jit(jax.vmap(layers, in_axes=(None, 0))), (X, jax.ShapeDtypeStruct((3, 5, 8, 8), jnp.float32)), 15 * ONE),
        (unrolled_loop, (X, SQUARE), 3 * ONE),
        (branches, (X, SQUARE), 2 * ONE),
        (own_gradient, (X, SQUARE), ONE),
        (
            lambda x, w: jax.vjp(own_gradient, x, w)[1](x),
            (X, SQUARE),
            3 * ONE + 2 * 2 * 8**3,
        ),
        (lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 3, lambda x: x + 1, x), (X,), 0),
    ],
)
def test_count(fn, args, expected):
    assert flops.count(fn, *args) == expected


def test_a_manual_region_counts_on_all_its_devices():
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=2 * (AxisType.Auto,))
    region = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    # Two halves of the rows; the axis that splits nothing repeats the work.
    assert flops.count(region, X, SQUARE) == 2 * ONE


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda w: jax.lax.while_loop(lambda w: w[0, 0] < 3, lambda w: w @ w, w), "no known length"),
        (jnp.linalg.cholesky, "operations of cholesky cannot be read"),
        (lambda w: jnp.linalg.solve(w, w), "operations of lu cannot be read"),
        (
            lambda w: pallas.pallas_call(lambda i, o: o.__setitem__(..., i[...] @ i[...]), out_shape=w)(w),
            "operations of pallas_call",
        ),
    ],
)
def test_what_cannot_be_counted_is_an_error(fn, message):
    with pytest.raises(ValueError, match=message):
        flops.count(fn, SQUARE)


def counted(config: DecoderConfig, batch: int, length: int) -> int:
    model = Decoder(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return flops.count(lambda variables, tokens: model.apply(variables, tokens).logits, variables, tokens)


MEMORIES = {
    "full": None,
    "BSWA": MemoryConfig(block_size=16, segments=2),
    "FAM": MemoryConfig(block_size=16, segments=1, fam_length=4),
    "FAM, no segments": MemoryConfig(block_size=16, segments=0, fam_length=16),
    "window": MemoryConfig(block_size=16, segments=3, fam_length=4, window=20),
    "FAM without feed-forward, from a prefix, three seen": MemoryConfig(
        block_size=16, fam_length=4, fam_ff=False, fam_init="prefix", fam_blocks=3
    ),
}
MIXINGS = {
    "static_kv": LimeConfig(),
    "same_head": LimeConfig(same_head=True),
    "separate_kv": LimeConfig(separate_kv=True),
    "push": LimeConfig(backward="push"),
    "pull": LimeConfig(backward="pull"),
    "average": LimeConfig("average"),
    "dynamic_kv": LimeConfig("dynamic_kv"),
    "static_hidden": LimeConfig("static_hidden"),
    "dynamic_hidden": LimeConfig("dynamic_hidden"),
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("parallel_block", "num_kv_heads"), [(False, 1), (True, 2), (False, 4)])
def test_formula_is_the_count_of_the_decoder(memory, parallel_block, num_kv_heads):
    config = dataclasses.replace(
        presets.tiny(), memory=MEMORIES[memory], parallel_block=parallel_block, num_kv_heads=num_kv_heads
    )
    for scan_layers, schedule, length in ((True, "layer", 64), (False, "block", 50), (True, "block", 5)):
        config = dataclasses.replace(config, scan_layers=scan_layers, schedule=schedule)
        assert counted(config, 3, length) == flops.forward_flops(config, 3, length)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_formula_with_mixing(mixing, scan_layers):
    config = dataclasses.replace(
        presets.tiny(), num_layers=3, num_kv_heads=2, mixing=MIXINGS[mixing], scan_layers=scan_layers
    )
    for length in (48, 5):
        assert counted(config, 2, length) == flops.forward_flops(config, 2, length)


@pytest.mark.parametrize("preset", [presets.palm_1b, presets.palm_8b, presets.palm_24b])
def test_paper_shapes(preset):
    """In seconds and without memory; the agreement is exact, one percent is what is asked for."""
    config = preset()
    formula = flops.forward_flops(config, 128, 8192)
    assert counted(config, 128, 8192) == pytest.approx(formula, rel=0.01)
    window = flops.forward_flops(
        dataclasses.replace(config, memory=MemoryConfig(block_size=1024, segments=3)), 128, 8192
    )
    assert 1.04 < formula / window <= 1.06
    assert 0.95 < flops.forward_flops(config, 128, 8192, useful=True) / formula < 1


def test_useful_operations_by_hand():
    """Two blocks of 4 and a token, m = 1, N = 2: a token sees its block up to itself, the block before, and the FAM."""
    memory = MemoryConfig(block_size=4, segments=1, fam_length=2)
    config = DecoderConfig(
        vocab_size=7, num_layers=1, d_model=6, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=5, memory=memory
    )
    weights = 6 * 2 * 4 * 2 + 6 * 4 * 2 + 3 * 6 * 5
    rows = 9 + 2 * 2 + 2  # tokens, two updates of the FAM, the prompt
    pairs = (1 + 2 + 3 + 4) + (5 + 6 + 7 + 8) + 5 + 9 * 2 + 2 * 2 * (2 + 4) + 2 * 2
    expected = 2 * weights * rows + 4 * 2 * 4 * pairs + 2 * 6 * 7 * 9
    assert flops.forward_flops(config, 1, 9, useful=True) == expected
    assert flops.train_flops(config, 1, 9, useful=True) == 3 * expected
    full = dataclasses.replace(config, memory=None)
    assert flops.forward_flops(full, 2, 9, useful=True) == 2 * (2 * weights * 9 + 32 * 45 + 84 * 9)


def test_rows_that_go_on_see_all_segments():
    """The same document in one call and in two, but for the prompt, which every call takes through the layers."""
    config = presets.tiny()
    prompt = flops.forward_flops(config, 1, 0, useful=True)
    once = flops.forward_flops(config, 2, 64, useful=True) - prompt
    parts = [flops.forward_flops(config, 2, 32, useful=True, read=read) - prompt for read in (0, 32)]
    assert sum(parts) == once
    assert parts[0] < parts[1]
    assert flops.step_flops(config, False, 2, 64) == flops.train_flops(config, 2, 64, useful=True)
    assert flops.step_flops(config, True, 2, 32) == 3 * (parts[1] + prompt)
    assert flops.step_flops(dataclasses.replace(config, mixing=DenseFormerConfig()), True, 2, 32) is None


@pytest.mark.parametrize("mixing", [None, LimeConfig()])
def test_formula_is_the_count_of_the_trainers_forward_pass(mixing):
    """With its blocked cross entropy, rows that go on and weights."""
    config = dataclasses.replace(presets.tiny(), mixing=mixing)
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens, blocks = jnp.zeros((2, 64), jnp.int32), jnp.zeros((2, 4), bool)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones((2, 64)), "reset": blocks, "padded": blocks}
    counted = flops.count(make_eval_step(model), params, batch, model.init_state(2))
    assert counted == pytest.approx(flops.forward_flops(config, 2, 64), rel=0.01)


def test_useful_mixing_counts_what_a_router_may_read():
    config = dataclasses.replace(presets.tiny(), num_layers=4, num_kv_heads=2, memory=None)
    plain = flops.forward_flops(config, 1, 10, useful=True)
    for sources, pairs in (("all", 2 + 3 + 4), ("last:1", 3), ("last:2", 6), ("first:1", 2 + 3 + 3)):
        mixed = dataclasses.replace(config, mixing=LimeConfig(sources=sources))
        assert flops.forward_flops(mixed, 1, 10, useful=True) - plain == 10 * pairs * 4 * 2 * 2 * 16


@pytest.mark.parametrize("mixing", [LimeConfig("dynamic_views"), DenseFormerConfig()])
def test_mixing_without_a_formula(mixing):
    with pytest.raises(ValueError, match=r"dynamic_views|DenseFormerConfig"):
        flops.forward_flops(dataclasses.replace(presets.tiny(), mixing=mixing), 1, 16)


@pytest.mark.parametrize("kind", ["feedback", "summary", "rmt", "autocompressor"])
def test_memory_without_a_formula(kind):
    memory = MemoryConfig(block_size=16, kind=kind, fam_length=0 if kind == "feedback" else 4)
    config = dataclasses.replace(presets.tiny(), memory=memory, schedule="layer" if kind == "summary" else "block")
    with pytest.raises(ValueError, match=f"memory.kind='{kind}' has no formula"):
        flops.forward_flops(config, 1, 16)
    assert flops.step_flops(config, True, 2, 64) is None
    assert counted(config, 1, 32) > 0


def test_useful_operations_of_variants_by_hand():
    """Two blocks of 4 and a token: tokens see 1, 2 and 2 FAM; one layer of two has one; no feed-forward, no prompt."""
    memory = MemoryConfig(
        block_size=4, segments=0, fam_length=2, fam_blocks=2, layers=(1,), fam_ff=False, fam_init="prefix"
    )
    config = DecoderConfig(
        vocab_size=7, num_layers=2, d_model=6, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=5, memory=memory
    )
    attention, ff = 6 * 2 * 4 * 2 + 6 * 4 * 2, 3 * 6 * 5
    tokens = 2 * (2 * (attention + ff) * 9 + 32 * (10 + 10 + 1))
    fam = 2 * attention * 2 * 2 + 32 * (2 * (4 * 1 + 4 * 2 + 1 * 2) + 2 * 2 * (2 + 4))
    assert flops.forward_flops(config, 1, 9, useful=True) == tokens + fam + 2 * 6 * 7 * 9


def test_remat_and_gradient_of_the_decoder():
    """A step is three times the formula, and less than four times it with everything computed again."""
    for remat, low, high in (("none", 2.9, 3.01), ("dots", 3.0, 3.2), ("attention", 3.1, 3.9), ("full", 3.2, 4.01)):
        config = dataclasses.replace(presets.tiny(), remat=remat)
        model = Decoder(config)
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

        def loss(variables, tokens, model=model):
            return jnp.sum(model.apply(variables, tokens).logits)

        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        ratio = flops.count(jax.grad(loss), variables, tokens) / flops.forward_flops(config, 2, 64)
        assert low < ratio < high


def test_idle_share_by_hand():
    """The FAM of four blocks costs 4 x (2 rows x 2 x 576 weights + 2 x 6 pairs x 4 x 8)."""
    config = DecoderConfig(
        vocab_size=16,
        num_layers=1,
        d_model=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        d_ff=16,
        memory=MemoryConfig(block_size=4, segments=0, fam_length=2),
    )
    fam, whole = 4 * (2304 + 384), flops.forward_flops(config, 1, 16)
    assert flops.idle_share(config, 16, 1) == 0
    works, takes = whole / 4, (whole - fam) / 4 + fam
    assert flops.idle_share(config, 16, 4) == pytest.approx((takes - works) / takes)
    assert flops.idle_share(dataclasses.replace(config, memory=MemoryConfig(block_size=4)), 16, 4) == 0


def test_mfu():
    assert flops.mfu(197e12, 2.0, "TPU v5 lite", 1) == 0.5
    assert math.isclose(flops.mfu(459e12, 1.0, "TPU v5", 4), 0.25)
    assert flops.mfu(1e12, 1.0, "cpu", 1) is None

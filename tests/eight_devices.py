"""Sharded against one device; `test_sharding.py` runs it in a process of its own, which has eight devices.

XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/eight_devices.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.step import create_state, make_train_step, shard, shard_batch
from fam_jax import (
    Decoder,
    DecoderConfig,
    LoraConfig,
    MemoryConfig,
    MeshConfig,
    RSPState,
    embedding,
    make_mesh,
    tree_shardings,
)
from fam_jax.sharding import PRESETS
from lime_jax import HyperConnectionsConfig, LimeConfig

STEPS = 5
BLOCKS = 8
MEMORY = MemoryConfig(block_size=8, segments=1, fam_length=2, rsp=0.8)
PLAIN = DecoderConfig(
    vocab_size=64,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=64,
    memory=MemoryConfig(block_size=8, segments=1),
)
MODELS = {
    "full": dataclasses.replace(PLAIN, memory=None),
    "BSWA": PLAIN,
    "FAM": dataclasses.replace(PLAIN, memory=MEMORY),
    "FAM, many segments": dataclasses.replace(
        PLAIN,
        memory=dataclasses.replace(MEMORY, segments=3, positions="absolute", noise=0.1, rpo=True),
        qk_norm=True,
        remat="dots",
    ),
    "FAM, one key head": dataclasses.replace(PLAIN, memory=MEMORY, num_kv_heads=1, remat="full"),
    "LIMe": dataclasses.replace(PLAIN, mixing=LimeConfig(backward="pull")),
    "FAM with LIMe": dataclasses.replace(PLAIN, memory=MEMORY, mixing=LimeConfig(), remat="full"),
    "FAM, one key head, block schedule": dataclasses.replace(PLAIN, memory=MEMORY, num_kv_heads=1, schedule="block"),
    "FAM with LIMe, wavefront": dataclasses.replace(PLAIN, memory=MEMORY, mixing=LimeConfig(), schedule="wavefront"),
    "FAM, splash": dataclasses.replace(PLAIN, memory=MEMORY, attention="splash"),
    "FAM, one key head, wavefront, splash": dataclasses.replace(
        PLAIN, memory=MEMORY, num_kv_heads=1, attention="splash", schedule="wavefront"
    ),
    "FAM with LoRA": dataclasses.replace(
        PLAIN, memory=MEMORY, mixing=LimeConfig("dynamic_views"), lora=LoraConfig(rank=4, alpha=8, dropout=0.2)
    ),
    "FAM with streams": dataclasses.replace(PLAIN, memory=MEMORY, mixing=HyperConnectionsConfig()),
    "static summaries, three seen": dataclasses.replace(
        PLAIN, memory=dataclasses.replace(MEMORY, kind="summary", fam_blocks=3), remat="full"
    ),
    "one layer with a FAM from a prefix": dataclasses.replace(
        PLAIN, memory=dataclasses.replace(MEMORY, layers=(1,), fam_init="prefix", fam_ff=False)
    ),
    "Feedback Memory": dataclasses.replace(
        PLAIN, memory=MemoryConfig(block_size=8, segments=2, kind="feedback"), schedule="block"
    ),
    "AutoCompressors": dataclasses.replace(
        PLAIN,
        memory=MemoryConfig(block_size=8, fam_length=2, kind="autocompressor", summaries=3),
        schedule="block",
        remat="full",
    ),
}
MESHES = {
    "dp": ("dp", MeshConfig(data=8, fsdp=1)),
    "fsdp": ("fsdp", MeshConfig()),
    "fsdp_tp": ("fsdp_tp", MeshConfig(tensor=2)),
    "dp x fsdp_tp": ("fsdp_tp", MeshConfig(data=2, fsdp=2, tensor=2)),
    "tensor 4": ("fsdp_tp", MeshConfig(tensor=4)),
    "sequence": ("fsdp_tp", MeshConfig(fsdp=1, sequence=8)),
    "dp x sequence": ("dp", MeshConfig(data=2, fsdp=1, sequence=4)),
    "fsdp x sequence": ("fsdp", MeshConfig(sequence=2)),
    "fsdp_tp x sequence": ("fsdp_tp", MeshConfig(tensor=2, sequence=2)),
}


def run(config, mesh=None):
    """Gradients of the first step, the losses of five SGD steps, the last parameters and stream."""
    model = Decoder(config)
    rng = np.random.default_rng(0)
    batches = rng.integers(0, config.vocab_size, (STEPS, 8, 8 * BLOCKS + 1))
    reset = rng.random((STEPS, 8, BLOCKS)) < 0.3
    optimizer = optax.sgd(0.1)

    def create():
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        stream = model.init_state(8) if config.memory else None
        return params, stream, RSPState.zeros(config) if config.fam_length else None

    def loss(params, stream, rsp, tokens, reset, key):
        kwargs = {"state": stream, "reset": reset, "rsp": rsp, "key": key, "aligned": True} if stream else {}
        out = model.apply({"params": params}, tokens[:, :-1], targets=tokens[:, 1:], **kwargs)
        return out.losses.nll.mean(), (out.state if stream else None, out.rsp)

    def step(params, stream, rsp, tokens, reset, key):
        (value, (stream, rsp)), grads = jax.value_and_grad(loss, has_aux=True)(params, stream, rsp, tokens, reset, key)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return optax.apply_updates(params, updates), stream, rsp, value, grads

    shardings = None
    if mesh is not None:
        shapes = jax.eval_shape(create)
        shardings = tree_shardings(config.sharding, mesh, shapes, shapes[0])
        step = jax.jit(step, out_shardings=(*shardings, None, shardings[0]))
    else:
        step = jax.jit(step)
    state = jax.jit(create, out_shardings=shardings)()
    losses, first = [], None
    for number in range(STEPS):
        *state, value, grads = step(*state, batches[number], reset[number], jax.random.key(number))
        losses.append(float(value))
        first = grads if first is None else first
    return state, losses, first


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """The vocabulary of 64 in four blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "VOCAB_BLOCK", 16)
        yield


@pytest.fixture(scope="module")
def alone():
    """Results on one device, worked out once."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = run(MODELS[name])
        return found[name]

    return get


def assert_close(got, wanted):
    """Within 1e-5 of the largest element, array by array."""
    got, wanted = jax.device_get(got), jax.device_get(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference = np.max(np.abs(a - b), initial=0) / (np.max(np.abs(b), initial=0) or 1)
        assert difference <= 1e-5, f"{jax.tree_util.keystr(path)}: {difference:.2g}"


FAST = {
    ("FAM with LIMe", "fsdp_tp x sequence"),
    ("FAM, many segments", "sequence"),
}


# Those that are not here are on all meshes; the others on those that they could upset.
OTHERS = {
    "full": ["fsdp_tp"],
    "BSWA": ["dp", "fsdp_tp", "sequence"],
    "LIMe": ["fsdp", "dp x fsdp_tp", "fsdp_tp x sequence"],
    "FAM with LIMe": ["fsdp", "dp x fsdp_tp", "sequence", "dp x sequence", "fsdp_tp x sequence"],
    "FAM, many segments": ["fsdp_tp", "sequence"],
    "FAM, one key head": ["tensor 4", "fsdp_tp x sequence"],
    "FAM, one key head, block schedule": ["fsdp_tp", "tensor 4"],
    "FAM with LIMe, wavefront": ["fsdp_tp"],
    "FAM, splash": ["fsdp_tp", "fsdp_tp x sequence"],
    "FAM, one key head, wavefront, splash": ["tensor 4"],
    "FAM with LoRA": ["fsdp_tp", "fsdp_tp x sequence"],
    "FAM with streams": ["fsdp_tp", "fsdp_tp x sequence"],
    "static summaries, three seen": ["sequence", "fsdp_tp x sequence"],
    "one layer with a FAM from a prefix": ["fsdp_tp x sequence"],
    "Feedback Memory": ["fsdp_tp"],
    "AutoCompressors": ["fsdp_tp"],
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in FAST else pytest.mark.slow)
        for name in MODELS
        for layout in OTHERS.get(name, [layout for layout in MESHES if layout != "tensor 4"])
    ],
)
def test_sharded_is_single(name, layout, alone):
    assert jax.device_count() == 8
    rules, shape = MESHES[layout]
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        state, losses, grads = run(dataclasses.replace(MODELS[name], sharding=PRESETS[rules]), mesh)
    wanted_state, wanted_losses, wanted_grads = alone(name)
    assert_close(grads, wanted_grads)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    assert_close(state, wanted_state)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("FAM with LIMe", "fsdp"),
        *(
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name, layout in [
                ("FAM, many segments", "dp"),
                ("FAM, many segments", "tensor 4"),
                ("FAM with LIMe", "dp x fsdp_tp"),
                ("static summaries, three seen", "fsdp_tp"),
                ("one layer with a FAM from a prefix", "dp"),
                ("Feedback Memory", "fsdp_tp"),
                ("AutoCompressors", "fsdp_tp"),
            ]
        ),
    ],
)
def test_short_calls_that_end_blocks(name, layout):
    """Logits and state after calls of less than a block, in which some rows end theirs and others do not."""
    model = MODELS[name]
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (8, 20))

    def go(config):
        decoder = Decoder(config)
        variables = jax.jit(decoder.init)(jax.random.key(0), tokens[:, :1])
        read = jax.jit(lambda state, tokens, lengths: decoder.apply(variables, tokens, state, lengths=lengths))
        out = read(decoder.init_state(8), tokens[:, :5], 5 - np.arange(8) % 2)
        after = []
        for start in range(5, 20, 5):
            out = read(out.state, tokens[:, start : start + 5], None)
            after.append((out.logits, out.state))
        return after

    wanted = go(model)
    rules, shape = MESHES[layout]
    with jax.set_mesh(make_mesh(shape)):
        assert_close(go(dataclasses.replace(model, sharding=PRESETS[rules])), wanted)


@pytest.mark.parametrize(
    ("name", "layout"), [("BSWA", "fsdp"), pytest.param("FAM", "dp x fsdp_tp", marks=pytest.mark.slow)]
)
def test_parts_of_a_batch_on_several_devices(name, layout):
    """Metrics, the stream and the moments of two steps in parts, against one device and the whole batch."""
    data = TextData(mode="stream", batch_size=16, length=32, block_size=8)
    rules, shape = MESHES[layout]
    model = dataclasses.replace(MODELS[name], vocab_size=256, sharding=PRESETS[rules])
    found = []
    for mesh, parts in ((make_mesh(MeshConfig(), jax.devices()[:1]), 1), (make_mesh(shape), 2)):
        config = TrainConfig("parts", model, data, steps=2, accumulate=parts)
        decoder, optimizer = Decoder(model), optax.adam(1e-2)
        create = functools.partial(create_state, config, decoder, optimizer)
        rng = np.random.default_rng(0)
        with jax.set_mesh(mesh):
            places = jax.tree.map(lambda leaf: leaf.sharding, shard(config, mesh, jax.eval_shape(create)))
            state = jax.jit(create, out_shardings=places)()
            step = make_train_step(config, decoder, optimizer, lambda step: 0.1, places)
            for _ in range(2):
                ids = rng.integers(0, 256, (16, 33))
                weights = rng.random((16, 32)).astype(np.float32)
                batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}
                batch |= {"reset": np.zeros((16, 4), bool), "padded": np.zeros((16, 4), bool)}
                state, metrics = step(state, shard_batch(config, mesh, batch))
        found.append((metrics, (state.stream, state.opt_state)))
    (metrics, memory), (other_metrics, other_memory) = found
    assert_close(other_metrics, metrics)
    for a, b in zip(jax.tree.leaves(other_memory), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

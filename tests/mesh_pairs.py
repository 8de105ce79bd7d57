"""Checkpoints saved on one mesh and restored on another; `test_restore.py` runs it in a process with eight devices.

XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/mesh_pairs.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from train_helpers import assert_same_bits

from experiments.checkpoint import Checkpoints
from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.optim import OptimConfig, make_optimizer
from experiments.step import create_state, shard
from fam_jax import Decoder, DecoderConfig, MemoryConfig, MeshConfig, make_mesh
from fam_jax.sharding import PRESETS
from lime_jax import LimeConfig

MODEL = DecoderConfig(
    vocab_size=64,
    num_layers=2,
    d_model=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    d_ff=64,
    memory=MemoryConfig(block_size=8, segments=1, fam_length=2, rsp=0.8),
    mixing=LimeConfig(),
)
MESHES = {
    "one device": ("fsdp", MeshConfig(), 1),
    "data 8": ("dp", MeshConfig(data=8, fsdp=1), 8),
    "fsdp 8": ("fsdp", MeshConfig(), 8),
    "fsdp 4, tensor 2": ("fsdp_tp", MeshConfig(tensor=2), 8),
    "data 2, fsdp 2, tensor 2": ("fsdp_tp", MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "fsdp 2, tensor 2, sequence 2": ("fsdp_tp", MeshConfig(tensor=2, sequence=2), 8),
}


def config_of(layout):
    rules, mesh, _ = MESHES[layout]
    data = TextData(mode="stream", batch_size=8, length=32, block_size=8)
    model = dataclasses.replace(MODEL, sharding=PRESETS[rules])
    return TrainConfig("pairs", model, data, steps=2, optim=OptimConfig(warmup_steps=1), mesh=mesh)


def shapes_of(layout):
    """The mesh of a layout, and the state's shapes and places there."""
    config = config_of(layout)
    mesh = make_mesh(config.mesh, jax.devices()[: MESHES[layout][2]])
    optimizer, _ = make_optimizer(config.optim, config.steps)
    create = functools.partial(create_state, config, Decoder(config.model), optimizer)
    with jax.set_mesh(mesh):
        return mesh, shard(config, mesh, jax.eval_shape(create))


def rest_of(state):
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}


def random_state(shapes):
    """A state in which every array says which it is, as after many steps."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(5)
        if leaf.dtype == bool:
            return rng.random(leaf.shape) < 0.5
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(8, 12, leaf.shape).astype(leaf.dtype)
        return (rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def logits_of(layout):
    """The jitted decoder on a mesh: (params, tokens, stream) -> logits."""
    model = Decoder(config_of(layout).model)

    def logits(params, tokens, stream):
        return model.apply({"params": params}, tokens, state=stream, aligned=True).logits

    return jax.jit(logits)


def save(folder, layout):
    """Saves that state from the mesh of a layout."""
    mesh, shapes = shapes_of(layout)
    state = random_state(shapes)
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda: state, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))()
        Checkpoints(folder, keep=1).save(1, placed.params, rest_of(placed), config_of(layout), {})


def restore(folder, layout):
    """The state in a folder, on the mesh of a layout, and logits of it."""
    mesh, shapes = shapes_of(layout)
    tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, (8, 32))
    with jax.set_mesh(mesh):
        found = Checkpoints(folder, keep=1).restore(shapes.params, rest_of(shapes), config_of(layout))
        state = dataclasses.replace(shapes, params=found.params, **found.rest)
        # Not `==`: P() and P(None) are the same place.
        placed = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim), state, shapes)
        assert all(jax.tree.leaves(placed)), placed
        return state, logits_of(layout)(state.params, tokens, state.stream)


def gathered(state):
    """On the host, keys as numbers."""

    def get(leaf):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(multihost_utils.process_allgather(jax.random.key_data(leaf) if key else leaf, tiled=True))

    return jax.tree.map(get, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The state, gathered; and for each mesh a folder in which it was saved from there."""
    assert jax.device_count() == 8
    state, folders = random_state(shapes_of("one device")[1]), {}
    for number, layout in enumerate(MESHES):
        folders[layout] = tmp_path_factory.mktemp(f"mesh-{number}")
        save(folders[layout], layout)
    return gathered(state), folders


@pytest.mark.parametrize("after", MESHES)
def test_every_mesh_restores_what_every_other_has_saved(saved, after):
    state, folders = saved
    wanted = None
    for folder in folders.values():
        found, logits = restore(folder, after)
        assert_same_bits(gathered(found), state)
        if wanted is None:
            wanted = np.asarray(restore(folder, "one device")[1])
        difference = np.max(np.abs(np.asarray(logits) - wanted)) / np.max(np.abs(wanted))
        assert difference <= 1e-5, folder

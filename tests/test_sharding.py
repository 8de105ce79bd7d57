"""Meshes and sharding rules; and, in processes of their own, eight devices against one."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from train_helpers import ROOT

from fam_jax import Decoder, MeshConfig, RSPState, ShardingRules, make_mesh, presets, tree_shardings
from fam_jax.sharding import MESH_AXES, PRESETS, constrain, fit
from lime_jax import LimeConfig

FILES = ["eight_devices.py", "eight_devices_sequence.py"]


def eight_devices(*arguments, files=FILES):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments]
    done = subprocess.run(
        command, cwd=ROOT / "tests", env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_eight_devices_are_as_one():
    eight_devices("-m", "not slow")


@pytest.mark.slow
def test_eight_devices_are_as_one_whatever_the_model_and_the_mesh():
    eight_devices("-m", "slow")


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 8, (1, 8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
        (MeshConfig(data=2, fsdp=1, tensor=1, sequence=3), 6, (2, 1, 1, 3)),
    ],
)
def test_shape_of_a_mesh(config, devices, shape):
    assert config.shape(devices) == shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(data=-1), "only one axis can be -1"),
        (lambda: MeshConfig(tensor=0), r"MeshConfig.tensor=0 is not allowed; it must be at least 1, or -1"),
        (lambda: MeshConfig(tensor=True), r"MeshConfig.tensor=True is not allowed"),
        (lambda: MeshConfig(tensor=3).shape(8), r"tensor=3.* does not fit 8 devices: the product of its axes"),
        (lambda: make_mesh(MeshConfig(fsdp=2, tensor=3)), "does not fit 1 devices"),
        (
            lambda: ShardingRules(embed=("rows",)),
            r"ShardingRules.embed=\('rows',\) is not allowed; .*data, fsdp, tensor",
        ),
        (lambda: ShardingRules(embed="fsdp"), r"ShardingRules.embed='fsdp' is not allowed; it must be a tuple"),
        (
            lambda: ShardingRules(mlp=("fsdp",)),
            r"\('embed', 'mlp'\) over 'fsdp' of the mesh more than once; give embed or mlp",
        ),
        (lambda: ShardingRules(vocab=("data",), embed=()), r"'vocab'\) over 'data' of the mesh more than once"),
        (
            lambda: ShardingRules().spec("batch", "layers"),
            r"logical axis 'layers' is not known; there are batch, block",
        ),
        (
            lambda: fit(PartitionSpec("fsdp"), (8,), AbstractMesh((2,), ("rows",))),
            "the mesh has the axes rows, but not 'fsdp', which the model's sharding rules name",
        ),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = AbstractMesh((2, 4, 2, 1), MESH_AXES)
    rules = ShardingRules()
    assert fit(rules.spec("batch", "kv_heads"), (8, 2), mesh) == PartitionSpec(("data", "fsdp"), "tensor")
    assert fit(rules.spec("batch", "kv_heads"), (6, 1), mesh) == PartitionSpec("data", None)


def test_without_a_mesh_nothing_is_done():
    x = jnp.ones((2, 3))
    assert constrain(ShardingRules(), x, "batch", "embed") is x


def test_every_part_of_a_training_state_has_a_place():
    config = presets.palm_1b()
    config = type(config)(**{**vars(config), "mixing": LimeConfig()})
    model = Decoder(config)
    mesh = AbstractMesh((1, 4, 2, 1), MESH_AXES)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rules = PRESETS["fsdp_tp"]

    def specs(tree):
        return jax.tree.map(lambda place: place.spec, tree_shardings(rules, mesh, tree, params))

    of_params = specs(params)
    assert of_params["layers"]["wq"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert of_params["embed"] == PartitionSpec("tensor", "fsdp")
    assert of_params["mixing"]["layers"]["router"] == PartitionSpec(None, None, None, None)

    adam = jax.eval_shape(optax.adamw(1e-3).init, params)
    assert specs(adam)[0].mu == of_params
    assert specs(adam)[0].count == PartitionSpec()
    # Factored second moments lack one axis of the parameter; it is the largest that `v_row` is a mean over.
    factored = specs(jax.eval_shape(optax.scale_by_factored_rms().init, params))
    assert factored.v_row["layers"]["w_gate"] == PartitionSpec(None, "fsdp")
    assert factored.v_col["layers"]["w_gate"] == PartitionSpec(None, "tensor")

    stream = specs(jax.eval_shape(lambda: model.init_state(8)))
    assert stream.segment_k == PartitionSpec(None, "fsdp", None, None, "tensor", None)
    assert stream.fam == PartitionSpec(None, "fsdp", None, None)
    assert specs(jax.eval_shape(lambda: RSPState.zeros(config))).fam == PartitionSpec(None, None, "fsdp")


def test_a_new_parameter_must_have_axes():
    tree = {"layers": {"bias": np.zeros((2, 3))}}
    with pytest.raises(ValueError, match=r"parameter layers/bias has no logical axes; add them to PARAMETERS"):
        tree_shardings(ShardingRules(), make_mesh(), tree, tree)


def test_a_sharded_state_is_computed_where_it_shall_be():
    config = presets.tiny()
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        model = Decoder(config)
        tokens = jnp.zeros((2, 20), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
        places = tree_shardings(config.sharding, mesh, shapes, shapes)
        variables = jax.jit(model.init, out_shardings=places)(jax.random.key(0), tokens)
        assert jax.tree.map(lambda leaf: leaf.sharding, variables) == places

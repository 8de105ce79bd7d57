"""The text spread over devices; `test_sharding.py` runs it in a process of its own, which has eight of them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import MODELS, assert_close
from jax.sharding import AxisType

from fam_jax import Decoder, MeshConfig, RSPState, ShardingRules, fam, make_mesh, tree_shardings
from lime_jax import LimeConfig

SHAPE = MeshConfig(data=2, fsdp=1, sequence=4)
FAM = dataclasses.replace(MODELS["FAM, many segments"], mixing=LimeConfig(), remat="full")


def read(config, mesh, lengths):
    """Two calls, the second with rows that end early; gradients go through the state between them."""
    model = Decoder(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, 2, 65))
    reset = rng.random((2, 8)) < 0.3

    def loss(params, rsp):
        first = model.apply({"params": params}, tokens[0, :, :-1], targets=tokens[0, :, 1:])
        key = jax.random.key(1)
        kwargs = {"rsp": rsp, "key": key} if rsp is not None else {}
        second = model.apply(
            {"params": params},
            tokens[1, :, :-1],
            first.state,
            lengths=jnp.asarray(lengths),
            reset=reset,
            targets=tokens[1, :, 1:],
            aligned=True,
            **kwargs,
        )
        real = jnp.arange(64) < jnp.asarray(lengths)[:, None]
        memory = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(second.state.layers))
        return first.losses.nll.mean() + (second.losses.nll * real).mean() + 1e-3 * memory, (second.state, second.rsp)

    def create():
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return params, RSPState.zeros(config) if config.fam_length else None

    shardings = None
    if mesh is not None:
        shapes = jax.eval_shape(create)
        shardings = tree_shardings(config.sharding, mesh, shapes, shapes[0])
    params, rsp = jax.jit(create, out_shardings=shardings)()
    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rsp))


@pytest.mark.parametrize(
    "name", ["FAM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("BSWA", "FAM with LIMe"))]
)
def test_states_and_rows_that_end_early(name):
    config = FAM if name == "FAM with LIMe" else MODELS[name]
    mesh = make_mesh(SHAPE)
    wanted = read(config, None, [13, 40])
    with jax.set_mesh(mesh):
        assert_close(read(config, mesh, [13, 40]), wanted)


def test_each_update_is_computed_once(monkeypatch):
    """The FAM of a layer and block by one device alone, and by the others not at all."""
    rules = ShardingRules(batch=(), embed=("fsdp",), heads=(), kv_heads=(), mlp=(), vocab=())
    config = dataclasses.replace(MODELS["FAM"], sharding=rules)
    seen = []

    def update(*args, original=fam.update):
        jax.debug.callback(lambda: seen.append(1))
        return original(*args)

    monkeypatch.setattr(fam, "update", update)
    mesh = jax.make_mesh((1, 8), ("fsdp", "sequence"), (AxisType.Auto,) * 2)  # callbacks allow one axis beside
    with jax.set_mesh(mesh):
        model = Decoder(config)
        tokens = jnp.zeros((2, 64), jnp.int32)
        variables = jax.jit(model.init)(jax.random.key(0), tokens)
        jax.block_until_ready(jax.jit(model.apply)(variables, tokens).logits)
        jax.effects_barrier()
    assert len(seen) == config.num_layers * 8


@pytest.mark.parametrize(("name", "loops"), [("FAM", 2), ("FAM with LIMe", 3)])
def test_turns_are_not_taken_again(name, loops):
    """Once forwards and once backwards, though layers are computed again; but where they are written once."""
    model = Decoder(dataclasses.replace(MODELS[name], remat="full"))
    with jax.set_mesh(make_mesh(SHAPE)):

        def loss(params, tokens):
            return model.apply({"params": params}, tokens[:, :-1], targets=tokens[:, 1:]).losses.nll.mean()

        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        program = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((2, 65), "int32")).as_text()
    assert len(re.findall(r"collective_permute.*tensor<2x2x32xf32>", program)) == loops


def test_few_tokens_are_read_by_all_devices():
    """Decoding goes on from a state that several devices have read."""
    config = MODELS["FAM"]
    model = Decoder(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 67))

    def go(apply):
        variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
        out = apply(variables, tokens[:, :64])
        return apply(variables, tokens[:, 64:], out.state).logits

    wanted = go(jax.jit(model.apply))
    with jax.set_mesh(make_mesh(SHAPE)):
        assert_close(go(jax.jit(model.apply)), wanted)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        (
            "BSWA",
            40,
            r"40 tokens, which touch 5 blocks of 8, cannot be spread over .*sequence=4: .* 4 x 8 = 32",
        ),
        ("full", 32, r"sequence=4, but full attention \(memory=None\) has no blocks"),
        (
            "FAM, one key head, block schedule",
            32,
            r"schedule='block' cannot be spread over the mesh's sequence=4, .*; set schedule",
        ),
    ],
)
def test_what_cannot_be_spread(name, length, message):
    model = Decoder(MODELS[name])
    tokens = jnp.zeros((2, length), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])
    with jax.set_mesh(make_mesh(SHAPE)), pytest.raises(ValueError, match=message):
        jax.jit(model.apply)(variables, tokens)


def test_a_call_that_is_not_aligned_cannot_be_spread():
    model = Decoder(MODELS["BSWA"])
    tokens = jnp.zeros((2, 32), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    state = model.init_state(2)
    with jax.set_mesh(make_mesh(SHAPE)):
        jax.eval_shape(functools.partial(model.apply, aligned=True), variables, tokens, state)
        with pytest.raises(ValueError, match=r"from the start of a block on \(aligned=True\)"):
            jax.eval_shape(model.apply, variables, tokens, state)

"""Routers by themselves: configs, counts, what they start as, and what they do to plain arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import assert_close, decoder_config, params_of

from experiments.optim import OptimConfig, make_optimizer, parameter_groups
from fam_jax.ops import rotate
from lime_jax import Depth, HyperConnectionsConfig, LimeConfig, Shape, make_mixer, num_router_weights
from lime_jax.config import source_mask

SHAPE = Shape(num_layers=6, d_model=8, num_heads=4, num_kv_heads=4, head_dim=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "static"}, "LimeConfig.router='static' is not known; allowed: 'static_kv'"),
        ({"sources": "first"}, "LimeConfig.sources='first' is not known; give 'all', 'first:k' or 'last:k'"),
        ({"sources": "last:0"}, "LimeConfig.sources='last:0'"),
        ({"router": "dynamic_views", "same_head": True}, "LimeConfig.same_head=True has no meaning for"),
        ({"router": "static_hidden", "init": "zeros"}, "LimeConfig.init='zeros' has no meaning for"),
        ({"router": "average", "separate_kv": True}, "LimeConfig.separate_kv=True has no meaning for"),
        ({"activation": "relu"}, "LimeConfig.activation='relu' has no meaning for"),
        ({"same_head": 1}, "LimeConfig.same_head=1 is not allowed; it must be True or False"),
        ({"router": "dynamic_kv", "backward": "push"}, "LimeConfig.backward='push' is not possible"),
        ({"router": "static_hidden", "backward": "pull"}, "LimeConfig.backward='pull' is not possible"),
        ({"backward": "twice"}, "LimeConfig.backward='twice' is not known"),
    ],
)
def test_wrong_config(change, message):
    with pytest.raises(ValueError, match=message):
        LimeConfig(**change)


def test_wrong_mixer():
    with pytest.raises(ValueError, match="streams=0 is not allowed"):
        HyperConnectionsConfig(0)
    with pytest.raises(ValueError, match=r"mixing=3 is not allowed; give one of LimeConfig, DenseFormerConfig"):
        make_mixer(3, SHAPE)


def test_sources():
    assert source_mask("all", 3).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert source_mask("last:1", 3).tolist() == np.eye(3).tolist()
    assert source_mask("last:2", 4)[3].tolist() == [0, 0, 1, 1]
    assert source_mask("first:1", 5)[4].tolist() == [1, 0, 0, 1, 1]
    assert source_mask("first:2", 5)[4].tolist() == [1, 1, 0, 1, 1]
    for sources in ("all", "first:1", "last:3"):
        assert source_mask(sources, 5).diagonal().all()
        assert not np.triu(source_mask(sources, 5), 1).any()


def test_number_of_router_weights():
    """138,240 in the paper's model of 16 layers and 32 heads (table 8)."""
    paper = decoder_config(num_layers=16, num_heads=32, num_kv_heads=32, mixing=LimeConfig())
    assert num_router_weights(paper) == 138_240
    # It is what is not zero in the parameters, in every variant.
    for change in ({}, {"same_head": True}, {"separate_kv": True}, {"sources": "first:2"}, {"sources": "last:3"}):
        mixing = LimeConfig(**change)
        router = make_mixer(mixing, SHAPE).init(jax.random.key(0), "float32")["layers"]["router"]
        config = decoder_config(num_layers=6, num_heads=4, num_kv_heads=4, mixing=mixing)
        zeros_of_identities = 0 if mixing.same_head else 5 * (16 - 4) * (2 if mixing.separate_kv else 1)
        assert np.count_nonzero(router) + zeros_of_identities == num_router_weights(config)
    with pytest.raises(ValueError, match="has no router over heads"):
        num_router_weights(decoder_config(mixing=LimeConfig("dynamic_views")))


@pytest.mark.parametrize(
    "change", [{}, {"same_head": True}, {"separate_kv": True}, {"sources": "last:3"}, {"init": "all_random"}]
)
def test_start_of_the_router(change):
    """The own layer's block is the identity, others are uniform of variance 1 / (sources * heads)."""
    shape = SHAPE._replace(num_kv_heads=32, num_layers=8)
    config = LimeConfig(**change)
    router = np.asarray(make_mixer(config, shape).init(jax.random.key(1), "float32")["layers"]["router"])
    if config.same_head:
        router = np.einsum("lhj,hg->lhjg", router, np.eye(32))
    router = router if config.separate_kv else router[:, None]
    mask = source_mask(config.sources, 8)
    assert not router[0].any()
    for layer in range(1, 8):
        for j in range(8):
            block = router[layer][:, :, j]
            if j == layer and config.init != "all_random":
                np.testing.assert_array_equal(block, np.broadcast_to(np.eye(32), block.shape))
            elif not mask[layer, j]:
                assert not block.any()
            else:
                bound = np.sqrt(3 / (mask[layer].sum() * (1 if config.same_head else 32)))
                values = block[..., np.eye(32, dtype=bool)] if config.same_head else block
                assert 0.8 * bound < np.abs(values).max() <= bound
                if not config.same_head:
                    assert abs(values.var() / (bound**2 / 3) - 1) < 0.15
                    assert abs(values.mean()) < 0.1 * bound


def test_rotation_commutes_with_mixing():
    """Rotating before or after mixing is the same, because all layers rotate alike."""
    mixer = make_mixer(LimeConfig(), SHAPE)
    rng = np.random.default_rng(0)
    router = mixer.effective({"router": jnp.asarray(rng.standard_normal((6, 4, 6, 4)), jnp.float32)})
    router = {"router": router["router"][5]}
    bank = jnp.asarray(rng.standard_normal((6, 7, 2, 4, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((7, 4, 4)), jnp.float32) for _ in range(2))
    positions = jnp.arange(7)

    def turn(x):
        return rotate(x, positions, 10_000.0 ** (-np.arange(2) / 2))

    plain = mixer.keys_values(router, None, None, k, v, Depth(bank, 5, 5))
    turned = bank.at[:, :, 0].set(jax.vmap(turn)(bank[:, :, 0]))
    other = mixer.keys_values(router, None, None, turn(k), v, Depth(turned, 5, 5))
    assert_close(turn(plain[0]), other[0], 1e-5)
    assert_close(plain[1], other[1], 1e-6)


def test_a_layer_reads_only_live_slots():
    """What stands in the bank for later layers has no influence, and gets no gradient."""
    mixer = make_mixer(LimeConfig("dynamic_views"), SHAPE)
    params = mixer.effective(mixer.init(jax.random.key(0), "float32")["layers"])
    params = jax.tree.map(lambda x: x[2], params)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)

    def read(bank):
        return mixer.attention_inputs(params, x, lambda y: y, Depth(bank, 4, 2))[0]

    bank = jnp.asarray(np.random.default_rng(1).standard_normal((12, 3, 8)), jnp.float32)
    np.testing.assert_array_equal(read(bank), read(bank.at[4:].set(1e6)))
    gradient = jax.grad(lambda b: jnp.sum(read(b) ** 2))(bank)
    assert np.all(gradient[4:] == 0)
    assert np.all(np.any(gradient[:4] != 0, axis=(1, 2)))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_routers_learn_faster_and_decay_only_if_told(optimizer):
    config = decoder_config(mixing=LimeConfig("dynamic_kv"), dtype="float32", param_dtype="float32")
    params = jax.tree.map(jnp.asarray, params_of(config))
    groups = parameter_groups(params)
    assert groups["mixing"]["layers"] == {"router": "router", "token": "router"}
    assert set(jax.tree.leaves({**groups, "mixing": None})) == {"other"}
    settings = OptimConfig(optimizer, 1e-2, schedule="constant", weight_decay=0.1, b1=0.0, clip_norm=None)
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(settings):
        transform, _ = make_optimizer(settings, 10)
        return transform.update(grads, transform.init(params), params)[0]

    plain = updates(dataclasses.replace(settings, router_scale=1.0))
    fast = updates(settings)
    undecayed = updates(dataclasses.replace(settings, weight_decay=0.0))
    for name in ("router", "token"):
        a, b, c = (u["mixing"]["layers"][name] for u in (fast, plain, undecayed))
        assert_close(a, 10 * b, 1e-5)
        np.testing.assert_array_equal(a, c)
    decayed = updates(dataclasses.replace(settings, router_decay=0.1))
    for name in ("router", "token"):
        lost = np.asarray(decayed["mixing"]["layers"][name] - fast["mixing"]["layers"][name])
        np.testing.assert_allclose(lost, -0.1 * 0.1 * params["mixing"]["layers"][name], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(decayed["layers"]["wq"], fast["layers"]["wq"])
    np.testing.assert_array_equal(fast["layers"]["wq"], plain["layers"]["wq"])
    assert np.any(np.asarray(fast["layers"]["wq"] != undecayed["layers"]["wq"]))
    assert np.isfinite(float(optax.tree.norm(fast)))

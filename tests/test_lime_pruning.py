"""Pruning of routers: the rule against a plain loop, what it does to models, and the report of what was cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lime_reference import reads
from reference import params_of, runner, some_tokens
from router_models import LAYERS, STATIC, full, mixer_of, router_of

from lime_jax import DenseFormerConfig, LimeConfig, Shape, analysis, make_mixer, num_router_weights, prune_router
from lime_jax.pruning import top_p


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def kept_by_loop(weights, p):
    """The rule of the first version's code: sorted, until the sum passes p, the element that crosses included."""
    keep, total = np.zeros(len(weights), bool), 0.0
    for place in np.argsort(-weights):
        if total >= p * weights.sum():
            break
        keep[place] = True
        total += weights[place]
    return keep


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_a_plain_loop(p):
    rows = np.abs(np.random.default_rng(0).standard_normal((5, 4, 12)))
    keep = top_p(rows, p)
    for index in np.ndindex(5, 4):
        np.testing.assert_array_equal(keep[index], kept_by_loop(rows[index], p))
    assert top_p(np.array([0.5, 0.3, 0.2]), 0.5).tolist() == [True, False, False]
    assert top_p(np.array([0.2, 0.3, 0.5]), 0.51).tolist() == [False, True, True]
    assert top_p(np.array([1.0, 1e-30, 0.0]), 1).all()


@pytest.mark.parametrize("name", STATIC)
def test_pruning_at_one_changes_nothing_and_near_zero_keeps_the_largest(name):
    config = dataclasses.replace(full(STATIC[name]), dtype="float32", param_dtype="float32")
    mixer, params, router = mixer_of(config), params_of(config), router_of(config)
    tokens = some_tokens(2, 9)

    def logits(layers):
        return np.asarray(runner(config)({**params, "mixing": {"layers": layers}}, tokens).logits)

    same, report = prune_router(mixer, router, 1)
    np.testing.assert_array_equal(logits(same), logits(router))
    assert (report.share, report.connections[0]) == (0, 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), same) == jax.tree.map(lambda x: (x.shape, x.dtype), router)
    least, report = prune_router(mixer, router, 1e-9)
    assert np.isfinite(logits(least)).all()
    assert np.abs(logits(least) - logits(router)).max() > 1e-3
    before, after = (analysis.router_weights(mixer, layers) for layers in (router, least))
    for layer in range(1, LAYERS):
        for v, h in np.ndindex(before.size.shape[1:3]):
            old, new = before.mean[layer, v, h].ravel(), after.mean[layer, v, h].ravel()
            largest = np.argmax(np.abs(old))
            assert np.flatnonzero(new).tolist() == [largest]
            assert new[largest] == pytest.approx(1.0 if name == "static_hidden" else old[largest], rel=1e-6)
    np.testing.assert_array_equal(after.mean[0], before.mean[0])
    assert report.cut.shape == before.mean.shape or STATIC[name].same_head


@pytest.mark.parametrize("name", STATIC)
def test_report_of_what_was_cut(name):
    config = full(STATIC[name])
    mixer, router = mixer_of(config), router_of(config)
    if name != "static_hidden":
        total = num_router_weights(config)
    else:  # the layer itself and, of those before, the first and the previous one
        total = config.num_kv_heads * sum(len(reads("first:1", layer)) for layer in range(1, LAYERS))
    shares = []
    for p in (0.2, 0.5, 0.8, 0.95):
        pruned, report = prune_router(mixer, router, p)
        assert report.live.sum() == total
        assert not (report.cut & ~report.live).any()
        leaf = "logits" if name == "static_hidden" else "router"
        changed = np.asarray(pruned[leaf]) != np.asarray(router[leaf])
        assert changed.sum() == report.cut.sum()
        assert report.share == report.cut.sum() / total
        shares.append(report.share)
        layers = report.layers
        assert np.isnan(layers[0]).all()
        assert np.isnan(layers[1, 2])
        assert 0 <= np.nanmin(layers) <= np.nanmax(layers) <= 1
        assert report.connections == (int(np.nansum(layers == 1)), int((~np.isnan(layers)).sum()))
        assert str(report).startswith(f"p={p:g}: {report.cut.sum():,} of {total:,} weights cut")
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_softmax_weights_are_renormalised():
    shape = Shape(num_layers=3, d_model=4, num_heads=1, num_kv_heads=1, head_dim=4)
    mixer = make_mixer(LimeConfig("static_hidden"), shape)
    logits = jnp.log(jnp.array([[[1.0, 1, 1]], [[0.7, 0.3, 1]], [[0.5, 0.1, 0.4]]]))
    pruned, report = prune_router(mixer, {"logits": logits, "norm": jnp.ones((3, 4))}, 0.8)
    weights = analysis.router_weights(mixer, pruned).mean[:, 0, 0, :, 0]
    np.testing.assert_allclose(weights, [[1, 0, 0], [0.7, 0.3, 0], [5 / 9, 0, 4 / 9]], atol=1e-6)
    assert str(report) == "p=0.8: 1 of 5 weights cut (20.0%), 1 of 5 connections between layers gone"
    assert report.layers[2].tolist() == [0, 1, 0]


def test_pruning_that_cannot_be():
    config = full(LimeConfig())
    for p in (0, 1.01, -1, float("nan")):
        with pytest.raises(ValueError, match="is not allowed; it must be above 0 and at most 1"):
            prune_router(mixer_of(config), router_of(config), p)
    for mixing in (LimeConfig("dynamic_hidden"), LimeConfig("dynamic_kv"), DenseFormerConfig(), None):
        with pytest.raises(ValueError, match="has no weights of its own to prune"):
            prune_router(mixer_of(full(mixing)), {}, 0.5)


def test_pruning_curve_measures_the_pruned_parameters():
    config = full(LimeConfig())
    mixer, router = mixer_of(config), router_of(config)
    curve = analysis.pruning_curve(mixer, router, lambda pruned: np.count_nonzero(pruned["router"][1:]), (0.5, 1.0))
    dead = np.asarray(~prune_router(mixer, router, 1)[1].live[1:]).sum()
    live = num_router_weights(config)
    assert curve.value[1] == live + dead
    assert curve.value[0] == live + dead - curve.reports[0].cut.sum()
    np.testing.assert_allclose(curve.cut, [report.share for report in curve.reports])

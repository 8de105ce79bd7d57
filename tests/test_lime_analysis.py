"""Analyses of layers and routers: against explicit formulas, hand-made routers, and what the decoder computes."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lime_reference import reads, softmax, unit
from matplotlib.figure import Figure
from reference import assert_close, params_of, rms_norm, some_tokens
from router_models import DYNAMIC, LAYERS, STATIC, full, mixer_of, router_of, states_of

from lime_jax import DenseFormerConfig, LimeConfig, Shape, analysis, make_mixer


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# ---- entropy


@pytest.mark.parametrize("order", [0.5, 0.99, 1, 2])
def test_entropy_of_known_spectra(order):
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.standard_normal((9, 9)))[0][:6]
    assert analysis.renyi_entropy(3.0 * rows, order) == pytest.approx(np.log(6))
    assert analysis.renyi_entropy(rows.T, order) == pytest.approx(np.log(6))
    one = np.outer(rng.standard_normal(5), rng.standard_normal(7))
    assert analysis.renyi_entropy(one, order) == pytest.approx(0.0, abs=1e-12)
    # Two directions, 9 times as much in one as in the other.
    p = np.array([0.9, 0.1])
    want = -np.sum(p * np.log(p)) if order == 1 else np.log(np.sum(p**order)) / (1 - order)
    assert analysis.renyi_entropy(np.stack([3 * rows[0], rows[1]]), order) == pytest.approx(want)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (1, 3)])
def test_entropy_is_that_of_explicit_eigenvalues(shape):
    z = np.random.default_rng(1).standard_normal(shape)
    p = np.linalg.eigvals(z @ z.T).real
    p = np.clip(p / np.trace(z @ z.T), 1e-300, None)
    assert analysis.renyi_entropy(z, 0.99) == pytest.approx(np.log(np.sum(p**0.99)) / 0.01, abs=1e-9)
    shannon, near = analysis.renyi_entropy(z, 1), analysis.renyi_entropy(z, 1 + 1e-6)
    assert near == pytest.approx(shannon, abs=1e-5)
    assert shannon <= np.log(min(shape)) + 1e-12


def test_layer_entropy_standardises_over_all_tokens_and_leaves_out_padding():
    rng = np.random.default_rng(2)
    states = rng.standard_normal((2, 3, 6, 2, 4)) * 5 + 3
    lengths = [6, 2, 4]
    got = analysis.layer_entropy(states, lengths, 0.9)
    for layer in range(2):
        rows = [states[layer, b, :n].reshape(n, 8) for b, n in enumerate(lengths)]
        pool = np.concatenate(rows)
        each = [analysis.renyi_entropy((r - pool.mean(0)) / (pool.std(0) + 1e-5), 0.9) for r in rows]
        assert got.mean[layer] == pytest.approx(np.mean(each))
        assert got.std[layer] == pytest.approx(np.std(each))
    states[:, 1, 2:] = 1e6
    np.testing.assert_array_equal(analysis.layer_entropy(states, lengths, 0.9).mean, got.mean)
    assert analysis.layer_entropy(states[:, :, :1]).mean.shape == (2,)


def test_entropy_without_meaning():
    assert np.isnan(analysis.renyi_entropy(np.zeros((3, 2))))
    with pytest.raises(ValueError, match=r"states has shape \[3\]; it must be \[t, d\]"):
        analysis.renyi_entropy(np.ones(3))
    with pytest.raises(ValueError, match="order=0 is not allowed"):
        analysis.renyi_entropy(np.ones((3, 2)), 0)


# ---- probes


def test_probes_tell_separable_classes_apart_and_no_others():
    rng = np.random.default_rng(0)
    labels = np.repeat([7, 3, 5, 9], 100)
    centres = np.eye(10)[labels]
    near = centres + 0.1 * rng.standard_normal((400, 10))
    noise = rng.standard_normal((400, 10))
    got = analysis.separability(np.stack([near, noise]).reshape(2, 400, 2, 5), labels, seed=1)
    assert got.folds.shape == (2, 5)
    np.testing.assert_array_equal(got.folds[0], 1.0)
    assert abs(got.mean[1] - 0.25) < 0.08
    assert got.chance == 0.25
    assert got.std[0] == 0


def test_probes_are_judged_by_what_they_were_not_fitted_to():
    """With more dimensions than examples, random labels fit perfectly; held out, they are at chance."""
    rng = np.random.default_rng(0)
    accuracy = analysis.probe_accuracy(rng.standard_normal((300, 400)), rng.integers(0, 2, 300), folds=3)
    assert abs(accuracy.mean() - 0.5) < 0.12


def test_probe_is_the_least_squares_solution():
    """Against a solver of the same problem written as a larger system, on scales that differ a lot."""
    rng = np.random.default_rng(3)
    labels = np.arange(120) % 3
    x = rng.standard_normal((120, 6)) * 10.0 ** np.arange(-2, 4) + 5
    x[:, 2] += labels
    scores = []
    got = analysis.probe_accuracy(x, labels, folds=4, seed=2)
    fold = np.empty(120, int)
    order = np.random.default_rng(2).permutation(120)
    fold[np.concatenate([order[labels[order] == c] for c in range(3)])] = np.arange(120) % 4
    for number in range(4):
        train, test = fold != number, fold == number
        mean, scale = x[train].mean(0), x[train].std(0) + 1e-5
        a = (x[train] - mean) / scale
        y = np.eye(3)[labels[train]]
        penalty = np.sqrt(1e-2 * len(a)) * np.eye(6)
        weights = np.linalg.lstsq(np.concatenate([a, penalty]), np.concatenate([y - y.mean(0), np.zeros((6, 3))]))[0]
        predicted = np.argmax((x[test] - mean) / scale @ weights + y.mean(0), axis=1)
        scores.append(np.mean(predicted == labels[test]))
        assert np.bincount(labels[test]).tolist() == [10, 10, 10]
    np.testing.assert_allclose(got, scores)
    assert 0.33 < np.mean(scores) < 1


@pytest.mark.parametrize(
    ("n", "labels", "folds", "message"),
    [
        (4, [0, 1, 0], 2, r"features has shape \[4, 2\] and labels \[3\]"),
        (4, [1, 1, 1, 1], 2, "labels has 1 classes of at least 4 examples"),
        (5, [0, 1, 1, 1, 1], 2, "with at least 2 examples each"),
        (4, [0, 1, 0, 1], 1, "folds=1 is not allowed"),
    ],
)
def test_probes_that_cannot_be(n, labels, folds, message):
    with pytest.raises(ValueError, match=message):
        analysis.probe_accuracy(np.ones((n, 2)), labels, folds=folds)


# ---- router weights and heat maps


def table_of(config, layer):
    """Weights [v, h, j, g] of a static router, by its definition."""
    mixing, w, heads = config.mixing, router_of(config), config.num_kv_heads
    views = 2 if mixing.separate_kv else 1
    table = np.zeros((views, heads, LAYERS, 1 if mixing.router == "static_hidden" else heads))
    for j in reads(mixing.sources, layer):
        for h in range(heads):
            if mixing.router == "static_hidden":
                allowed = reads(mixing.sources, layer)
                table[0, h, j, 0] = softmax(w["logits"][layer][h, allowed])[allowed.index(j)]
                continue
            for v in range(views):
                router = w["router"][layer][v] if mixing.separate_kv else w["router"][layer]
                if layer == 0:
                    table[v, h, j, h] = 1
                elif mixing.same_head:
                    table[v, h, j, h] = router[h, j]
                else:
                    table[v, h, j] = router[h, j]
    return table


@pytest.mark.parametrize("name", STATIC)
def test_weights_of_static_routers(name):
    config = full(STATIC[name])
    mixer = mixer_of(config)
    weights = analysis.router_weights(mixer, router_of(config))
    tables = np.stack([table_of(config, layer) for layer in range(LAYERS)])
    assert_close(weights.mean, tables, 1e-12)
    assert_close(weights.size, np.abs(tables), 1e-12)
    heat = analysis.heat_map(mixer, weights)
    for layer in range(LAYERS):
        row = np.abs(tables[layer]).mean((0, 1, 3))
        assert_close(heat.layers[layer], row / row.sum(), 1e-12)
    per_head = np.abs(tables).mean(-1).reshape(LAYERS, -1, LAYERS)
    assert_close(heat.heads, per_head / per_head.sum(-1, keepdims=True), 1e-12)
    assert len(heat.names) == per_head.shape[1]
    assert heat.names[-1] == ("values, head 2" if STATIC[name].separate_kv else "head 2")


def test_heat_map_of_a_hand_made_router():
    shape = Shape(num_layers=3, d_model=4, num_heads=2, num_kv_heads=2, head_dim=2)
    router = np.zeros((3, 2, 3, 2))
    router[1] = [[[-1, 0], [3, 0], [9, 9]], [[0, 0], [0, 2], [9, 9]]]  # the last source is in the future
    router[2, :, 1] = -5
    mixer = make_mixer(LimeConfig(), shape)
    heat = analysis.heat_map(mixer, analysis.router_weights(mixer, {"router": jnp.asarray(router)}))
    np.testing.assert_allclose(heat.layers, [[1, 0, 0], [1 / 6, 5 / 6, 0], [0, 1, 0]])
    np.testing.assert_allclose(heat.heads[1], [[1 / 4, 3 / 4, 0], [0, 1, 0]])
    average = make_mixer(LimeConfig("average", sources="last:2"), shape)
    heat = analysis.heat_map(average, analysis.router_weights(average, {}))
    np.testing.assert_allclose(heat.layers, [[1, 0, 0], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]])


def weights_at(config, states, place):
    """Router weights at one token, which is its own mean."""
    ff = None if states.ff_inputs is None else states.ff_inputs[:, 0, place][:, None]
    norm = params_of(config)["layers"]["attn_norm"]
    inputs = states.hidden[:-1, 0, place][:, None]
    return analysis.router_weights(mixer_of(config), router_of(config), inputs, norm=norm, ff_inputs=ff)


@pytest.mark.parametrize("name", {**STATIC, **DYNAMIC})
def test_weights_make_the_mixed_values_of_the_decoder(name):
    """Whatever the router: its weights times what it mixes is what the decoder's attention reads."""
    config = full({**STATIC, **DYNAMIC}[name])
    params, w = params_of(config), router_of(config)
    states = states_of(config, some_tokens(1, 5))
    place = 3
    if name in STATIC:
        weights = analysis.router_weights(mixer_of(config), w)
    else:
        weights = weights_at(config, states, place)
    hidden = np.asarray(states.hidden)[:, 0, place]
    for layer in range(LAYERS):
        table = weights.mean[layer]
        wv, scale = params["layers"]["wv"][layer], params["layers"]["attn_norm"][layer]
        if name.endswith("hidden"):
            z = np.einsum("hj,jd->hd", table[0, :, :, 0], unit(hidden[:-1], config.norm_eps)) * w["norm"][layer]
            want = np.einsum("hd,dhk->hk", z, wv)
        elif name.startswith("dynamic_views"):
            slots = np.stack([hidden[:-1], np.asarray(states.ff_inputs)[:, 0, place]], axis=1).reshape(2 * LAYERS, -1)
            want = np.einsum("d,dgk->gk", rms_norm(table[2, 0, :, 0] @ slots, scale, config.norm_eps), wv)
        else:
            want = np.einsum("hjg,jgk->hk", table[-1], np.asarray(states.values)[:, 0, place])
        assert_close(states.mixed[layer, 0, place], want, 1e-10)


@pytest.mark.parametrize("name", ["dynamic_kv", "dynamic_hidden", "dynamic_views"])
def test_weights_that_depend_on_the_token_are_averaged(name, monkeypatch):
    monkeypatch.setattr(analysis.weights, "_ROWS", 2)
    config = full(DYNAMIC[name])
    states = states_of(config, some_tokens(1, 5))
    each = [weights_at(config, states, place) for place in range(5)]
    ff = None if states.ff_inputs is None else states.ff_inputs[:, 0]
    norm = params_of(config)["layers"]["attn_norm"]
    got = analysis.router_weights(mixer_of(config), router_of(config), states.hidden[:-1, 0], norm=norm, ff_inputs=ff)
    assert_close(got.mean, np.mean([one.mean for one in each], axis=0), 1e-12)
    assert_close(got.size, np.mean([np.abs(one.mean) for one in each], axis=0), 1e-12)
    heat = analysis.heat_map(mixer_of(config), got)
    np.testing.assert_allclose(heat.layers.sum(1), 1)
    assert not np.triu(heat.layers, 1).any()
    assert heat.layers.shape == (LAYERS, LAYERS)


def test_models_without_a_router():
    config = full(DenseFormerConfig())
    with pytest.raises(ValueError, match=r"DenseFormerConfig\(\) has no router"):
        analysis.router_weights(mixer_of(config), router_of(config))
    with pytest.raises(ValueError, match="mixing=None has no router"):
        analysis.router_weights(mixer_of(full(None)), {})
    dynamic = full(DYNAMIC["dynamic_hidden"])
    with pytest.raises(ValueError, match="weighs by the token; give the layers' inputs"):
        analysis.router_weights(mixer_of(dynamic), router_of(dynamic))


# ---- circuits


def test_depth_circuits_of_a_hand_made_heat_map():
    heads = np.array([[[1.0, 0, 0], [1, 0, 0]], [[0.5, 0.5, 0], [0, 1, 0]], [[0.2, 0.3, 0.5], [0.9, 0, 0.1]]])
    heat = analysis.HeatMap(heads.mean(1), heads, ("head 1", "head 2"))
    found = analysis.depth_circuits(heat, edges=3)
    np.testing.assert_allclose(found.own, [1, 0.75, 0.3])
    np.testing.assert_allclose(found.previous, [0, 0.25, 0.15])
    np.testing.assert_allclose(found.earlier, [0, 0, 0.55])
    np.testing.assert_allclose(found.distance, [0, 0.25, 0.15 + 2 * 0.55])
    np.testing.assert_allclose(found.retrieved, [(0.25 + 0.55) / 2, 0.15, np.nan])
    assert found.edges == (
        analysis.Edge(3, "head 2", 1, 0.9),
        analysis.Edge(2, "head 1", 1, 0.5),
        analysis.Edge(3, "head 1", 2, 0.3),
    )
    assert len(analysis.depth_circuits(heat, edges=50).edges) == 4  # those that exist


@pytest.mark.parametrize("router", ["dynamic_hidden", "dynamic_kv", "dynamic_views"])
def test_semantic_circuits_find_the_words_that_a_router_listens_to(router):
    """Word i is direction i; head 2 of layer 3 turns to layer 1 at word 5, less so at word 4."""
    words = 8
    shape = Shape(num_layers=3, d_model=words, num_heads=2, num_kv_heads=2, head_dim=2)
    mixer = make_mixer(LimeConfig(router), shape)
    params = jax.tree.map(jnp.zeros_like, mixer.init(jax.random.key(0), "float32")["layers"])
    name = {"dynamic_hidden": "project", "dynamic_kv": "token", "dynamic_views": "attention_weight"}[router]
    params = {key: jnp.ones_like(leaf) if key.endswith("norm") else leaf for key, leaf in params.items()}
    params[name] = params[name].at[2, 5, 1, 0].set(3.0).at[2, 4, 1, 0].set(1.0)
    found = analysis.semantic_circuits(mixer, params, jnp.eye(words), norm=jnp.ones((3, words)), top=3, rows=4)
    index = (2, 1, 0)
    assert found.strongest(1) == [index]
    assert found.tokens[index][:2].tolist() == [5, 4]
    assert found.name(*index) == f"layer 3, {'keys' if router == 'dynamic_views' else 'head 2'} <- layer 1"
    weight = found.weights[index]
    assert weight[0] > weight[1] > weight[2]
    if router == "dynamic_kv":
        np.testing.assert_allclose(weight, [3 * 8**0.5, 8**0.5, 0], rtol=1e-5)
        assert found.mean[index] == pytest.approx(4 * 8**0.5 / 8, rel=1e-5)
        assert found.strongest(9) == [index]  # no other hears any difference
    if router == "dynamic_hidden":
        want = [np.exp(x * 8**0.5) / (np.exp(x * 8**0.5) + 2) for x in (3, 1, 0)]
        np.testing.assert_allclose(weight, want, rtol=1e-5)
    again = analysis.semantic_circuits(mixer, params, jnp.eye(words), norm=jnp.ones((3, words)), top=3)
    np.testing.assert_array_equal(again.tokens, found.tokens)
    np.testing.assert_allclose(again.mean, found.mean, rtol=1e-5)
    assert found.tokens.shape == (3, 4 if router == "dynamic_views" else 2, mixer.slots, 3)


def test_semantic_circuits_need_a_router_that_reads():
    config = full(LimeConfig())
    with pytest.raises(ValueError, match="router='static_kv' weighs all alike; semantic circuits need"):
        analysis.semantic_circuits(mixer_of(config), router_of(config), jnp.eye(config.d_model))
    with pytest.raises(ValueError, match="mixing=None has no router"):
        analysis.semantic_circuits(mixer_of(full(None)), {}, jnp.eye(config.d_model))


# ---- plots and imports


def drawn(axes):
    return len(axes.lines) + len(axes.images) + len(axes.collections)


def test_every_result_has_a_plot(tmp_path):
    figure = Figure(figsize=(12, 8))
    axes = figure.subplots(2, 4).ravel()
    analysis.plot_entropy({"values": analysis.Entropy(np.arange(3.0), np.ones(3))}, axes[0])
    analysis.plot_separability({"values": analysis.Separability(np.full((3, 2), 0.5), 0.25)}, axes[1])
    config = full(LimeConfig())
    weights = analysis.router_weights(mixer_of(config), router_of(config))
    heat = analysis.heat_map(mixer_of(config), weights)
    assert analysis.plot_heat_map(heat, axes[2]).get_array().mask.sum() == 3  # what cannot be read is blank
    analysis.plot_heat_map(heat, axes[3], circuit=1)
    assert axes[3].get_title() == "head 2"
    analysis.plot_depth_circuits(analysis.depth_circuits(heat), axes[4])
    dynamic = full(LimeConfig("dynamic_hidden"))
    words = np.random.default_rng(0).standard_normal((9, dynamic.d_model))
    semantic = analysis.semantic_circuits(mixer_of(dynamic), router_of(dynamic), words, top=4)
    analysis.plot_semantic_circuits(semantic, axes[5], word=lambda token: f"$w_{token}", count=5)
    assert len(axes[5].texts) == 5 * 4
    curve = analysis.pruning_curve(mixer_of(config), router_of(config), lambda _: 1.0, (0.5, 1.0))
    analysis.plot_pruning(curve, axes[6])
    analysis.plot_matrix([[1.0, np.nan]], ["row"], ["a", "b"], axes[7], [["one", "none"]])
    assert all(map(drawn, axes))
    figure.savefig(tmp_path / "all.png")


def test_imports_are_light():
    code = (
        "import sys, lime_jax; assert 'lime_jax.analysis' not in sys.modules; import lime_jax.analysis\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}"
        " & {'matplotlib', 'scipy', 'sklearn', 'optax', 'fam_jax', 'experiments'}))"
    )
    plain = "import sys, jax; print(sorted({n.split('.')[0] for n in sys.modules} & {'scipy'}))"
    root = Path(__file__).resolve().parent.parent
    got, base = (
        subprocess.run([sys.executable, "-c", c], cwd=root, capture_output=True, text=True, check=True).stdout
        for c in (code, plain)
    )
    assert got == base  # jax itself imports scipy

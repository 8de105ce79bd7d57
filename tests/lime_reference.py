"""Layer mixing written a second time, for reading: NumPy float64, full causal attention, one row, plain loops.

Reads the parameter tree of the decoder and nothing else of `lime_jax`.
"""

from typing import Any

import numpy as np
from reference import Array, attend, feed_forward, rms_norm, rotate

from lime_jax import (
    AttentionResidualsConfig,
    DenseFormerConfig,
    DepthAttentionConfig,
    HyperConnectionsConfig,
    LimeConfig,
    ValueResidualConfig,
)


def softmax(x: Array) -> Array:
    weights = np.exp(x - np.max(x))
    return weights / weights.sum()


def unit(x: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def reads(sources: str, layer: int) -> list[int]:
    """Layers that a layer reads, its own the last."""
    kind, _, count = sources.partition(":")
    if kind == "last":
        return [j for j in range(layer + 1) if j > layer - int(count)]
    if kind == "first":
        return [j for j in range(layer + 1) if j < int(count) or j >= layer - 1]
    return list(range(layer + 1))


def mix_heads(config: Any, w: dict[str, Array], layer: int, normed: Array, raw: list[tuple[Array, Array]]):
    """Keys and values [t, g, k] of a layer from the raw ones of all layers up to it."""
    mixing, groups = config.mixing, config.num_kv_heads
    k, v = (np.zeros_like(x) for x in raw[layer])
    if layer == 0:
        return raw[0]
    for j in reads(mixing.sources, layer):
        for out in range(groups):
            if mixing.router == "average":
                share = 1 / len(reads(mixing.sources, layer))
                k[:, out] += share * raw[j][0][:, out]
                v[:, out] += share * raw[j][1][:, out]
                continue
            for source in range(groups):
                for number, (into, values) in enumerate(((k, raw[j][0]), (v, raw[j][1]))):
                    router = w["router"][layer]
                    if mixing.separate_kv:
                        router = router[number]
                    if mixing.same_head:
                        weight = router[out, j] if source == out else 0.0
                    else:
                        weight = router[out, j, source]
                    into[:, out] += weight * values[:, source]
                    if mixing.router == "dynamic_kv" and source == out:
                        into[:, out] += (normed @ w["token"][layer][:, out, j])[:, None] * values[:, source]
    return k, v


def forward(config: Any, params: Any, tokens: Array) -> Array:
    """Logits [t, v] of one row of tokens [t]."""
    mixing, eps = config.mixing, config.norm_eps
    params = {name: value for name, value in params.items()}
    own = params.get("mixing", {})
    w, final = own.get("layers", {}), own.get("final", {})
    x = np.asarray(params["embed"])[tokens]
    time, positions = len(tokens), np.arange(len(tokens))
    raw: list[tuple[Array, Array]] = []
    states: list[Array] = []  # inputs of layers, or of sub-layers
    outputs = [x]  # of layers, or of sub-layers, after the embeddings
    streams = [x] * (mixing.streams if isinstance(mixing, HyperConnectionsConfig) else 1)
    views = isinstance(mixing, LimeConfig) and mixing.router == "dynamic_views"
    hidden = isinstance(mixing, LimeConfig) and mixing.router in ("static_hidden", "dynamic_hidden")
    heads = isinstance(mixing, LimeConfig) and not views and not hidden

    def enter(layer: int, site: int) -> tuple[Array, Any]:
        nonlocal streams
        if isinstance(mixing, AttentionResidualsConfig):
            query = w["query"][layer][site]
            got = np.zeros_like(x)
            for t in range(time):
                scores = np.array([query @ unit(y[t], eps) for y in outputs])
                got[t] = sum(a * y[t] for a, y in zip(softmax(scores), outputs, strict=True))
            return got, lambda y: outputs.append(y)
        if isinstance(mixing, HyperConnectionsConfig):
            p = {name: value[layer][site] for name, value in w.items()}
            n = len(streams)
            normed = [unit(h, eps) for h in streams]
            alpha = [np.tanh(h @ p["alpha"]) * p["alpha_scale"] + p["static_alpha"][i] for i, h in enumerate(normed)]
            beta = [np.tanh(h @ p["beta"]) * p["beta_scale"] + p["static_beta"][i] for i, h in enumerate(normed)]
            mixed = [sum(alpha[i][:, o, None] * streams[i] for i in range(n)) for o in range(n + 1)]

            def write(y):
                nonlocal streams
                streams = [mixed[1 + i] + beta[i][:, None] * y for i in range(n)]

            return mixed[0], write

        def add(y):
            nonlocal streams
            streams = [streams[0] + y]

        return streams[0], add

    def view(layer: int, site: str, number: int, x: Array) -> Array:
        normed = unit(x, eps) * w[f"{site}_norm"][layer]
        allowed = [
            j for j in range(len(states)) if j // (1 if config.parallel_block else 2) in reads(mixing.sources, layer)
        ]
        got = np.zeros_like(x)
        for t in range(time):
            scores = normed[t] @ w[f"{site}_weight"][layer][:, number, allowed]
            scores = scores + w[f"{site}_bias"][layer][number, allowed]
            weights = softmax(scores) if mixing.activation == "softmax" else np.maximum(scores, 0)
            got[t] = sum(a * states[j][t] for a, j in zip(weights, allowed, strict=True))
        return got

    for layer in range(config.num_layers):
        one = {name: np.asarray(value)[layer] for name, value in params["layers"].items() if value is not None}
        x, add = enter(layer, 0)
        normed = rms_norm(x, one["attn_norm"], eps)
        q = np.einsum("td,dhk->thk", normed, one["wq"])
        k = np.einsum("td,dgk->tgk", normed, one["wk"])
        v = np.einsum("td,dgk->tgk", normed, one["wv"])
        if views:
            states.append(x)
            for_q, for_k, for_v = (rms_norm(view(layer, "attention", i, x), one["attn_norm"], eps) for i in range(3))
            q = np.einsum("td,dhk->thk", for_q, one["wq"])
            k, v = np.einsum("td,dgk->tgk", for_k, one["wk"]), np.einsum("td,dgk->tgk", for_v, one["wv"])
        if hidden:
            states.append(unit(x, eps))
            allowed = reads(mixing.sources, layer)
            for g in range(config.num_kv_heads):
                for t in range(time):
                    if mixing.router == "static_hidden":
                        scores = w["logits"][layer][g, allowed]
                    else:
                        scores = (states[layer][t] * w["norm"][layer]) @ w["project"][layer][:, g, allowed]
                    z = sum(a * states[j][t] for a, j in zip(softmax(scores), allowed, strict=True))
                    z = z * w["norm"][layer]
                    k[t, g], v[t, g] = z @ one["wk"][:, g], z @ one["wv"][:, g]
        raw.append((k, v))
        if heads:
            k, v = mix_heads(config, w, layer, normed, raw)
        if isinstance(mixing, ValueResidualConfig) and layer > 0:
            v = w["weights"][layer][0] * raw[0][1] + w["weights"][layer][1] * v
        if isinstance(mixing, DepthAttentionConfig):
            per = config.num_heads // config.num_kv_heads
            mixed = np.zeros_like(v)
            for t in range(time):
                for g in range(config.num_kv_heads):
                    asks = q[t, g * per : (g + 1) * per].mean(0) / np.sqrt(config.head_dim)
                    weights = softmax(np.array([asks @ raw[j][0][t, g] for j in range(layer + 1)]))
                    mixed[t, g] = sum(a * raw[j][1][t, g] for j, a in enumerate(weights))
            v = mixed
        if config.qk_norm:
            q, k = rms_norm(q, one["q_norm"], eps), rms_norm(k, one["k_norm"], eps)
        q, k = rotate(q, positions, config.rope_base), rotate(k, positions, config.rope_base)
        out = np.stack([attend(q[t], k[: t + 1], v[: t + 1]) for t in range(time)])
        y = np.einsum("thk,hkd->td", out, one["wo"])
        if config.parallel_block:
            ff_in = rms_norm(view(layer, "ff", 0, x) if views else x, one["attn_norm"], eps)
            add(y + feed_forward(one, ff_in))
        else:
            add(y)
            x, add = enter(layer, 1)
            if views:
                states.append(x)
                x = view(layer, "ff", 0, x)
            add(feed_forward(one, rms_norm(x, one["ff_norm"], eps)))
        if isinstance(mixing, DenseFormerConfig):
            outputs.append(streams[0])
            streams = [sum(w["weights"][layer][j] * y for j, y in enumerate(outputs))]
    x = sum(streams)
    if isinstance(mixing, AttentionResidualsConfig):
        got = np.zeros_like(x)
        for t in range(time):
            weights = softmax(np.array([final["query"] @ unit(y[t], eps) for y in outputs]))
            got[t] = sum(a * y[t] for a, y in zip(weights, outputs, strict=True))
        x = got
    x = rms_norm(x, np.asarray(params["final_norm"]), eps)
    unembed = np.asarray(params["embed"]).T if config.tie_embeddings else np.asarray(params["unembed"])
    return x @ unembed

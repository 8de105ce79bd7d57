"""The decoder written a second time, for reading: NumPy float64, one row, one token and one head at a time.

`dense_decoder` is an ordinary Transformer with an explicit [t, t] mask; it covers full causal attention, BSWA
and windows. `fam_decoder` is Algorithm 2 of arXiv 2404.09173 as a plain loop over blocks,
layers and tokens. Both work with absolute positions only: block-local positions must give the same numbers,
because rotary attention reads differences. They read the parameter tree of `fam_jax` and nothing else of it.
The end of the file builds models for the tests.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax import Decoder, DecoderConfig, MemoryConfig
from fam_jax.rope import RopeScaling

Array = np.ndarray

# ----------------------------------------------------------------------------------------------------- pieces


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x: Array, positions: Array, base: float, scaling: RopeScaling | None = None) -> Array:
    """Rotary embedding of x [t, heads, k] in the rotate-half convention."""
    half = x.shape[-1] // 2
    frequency = base ** (-2.0 * np.arange(half) / x.shape[-1])
    for i, plain in enumerate(frequency if scaling else ()):
        wavelength = 2 * np.pi / plain
        slow = plain / scaling.factor
        if scaling.kind == "linear" or wavelength > scaling.original / scaling.low:
            frequency[i] = slow
        elif wavelength > scaling.original / scaling.high:
            smooth = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
            frequency[i] = (1 - smooth) * slow + smooth * plain
    angle = np.asarray(positions, np.float64)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query: Array, keys: Array, values: Array, softcap: float | None = None) -> Array:
    """One query [h, k] over keys and values [n, g, k]; returns [h, k]."""
    heads, kv_heads = query.shape[0], keys.shape[1]
    out = np.zeros_like(query)
    for h in range(heads):
        g = h // (heads // kv_heads)
        scores = keys[:, g] @ query[h] / np.sqrt(query.shape[1])
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[h] = weights @ values[:, g] / weights.sum()
    return out


def feed_forward(w: dict[str, Array], x: Array, activation: str = "silu") -> Array:
    gate = x @ w["w_gate"]
    if activation == "gelu":
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = gate / (1.0 + np.exp(-gate))
    return (gate * (x @ w["w_up"])) @ w["w_down"]


def project(w: dict[str, Array], config: Any, x: Array, key_pos: Array, query_pos: Array | None = None):
    """Projections of normed x [t, d]: rotated queries [t, h, k], rotated keys and plain values [t, g, k]."""
    y = rms_norm(x, w["attn_norm"], config.norm_eps)
    q, k, v = (np.einsum("td,dhk->thk", y, w["w" + name]) + w.get("b" + name, 0) for name in "qkv")
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config.norm_eps), rms_norm(k, w["k_norm"], config.norm_eps)
    query_pos = key_pos if query_pos is None else query_pos
    rope = (config.rope_base, config.rope_scaling)
    if w["local"] and config.local_rope_base:
        rope = (config.local_rope_base, None)
    return rotate(q, query_pos, *rope), rotate(k, key_pos, *rope), v


def finish(w: dict[str, Array], config: Any, x: Array, attended: Array, residual: Array) -> Array:
    """The rest of a layer whose input was x [t, d], after attention gave [t, h, k]."""

    def after(y: Array, name: str) -> Array:
        return rms_norm(y, w[name], config.norm_eps) if config.post_norms else y

    attention = after(np.einsum("thk,hkd->td", attended, w["wo"]), "attn_post_norm")
    middle = attention + residual
    fed = rms_norm(x, w["attn_norm"], config.norm_eps)
    if not config.parallel_block:
        fed = rms_norm(middle, w["ff_norm"], config.norm_eps)
    return middle + after(feed_forward(w, fed, config.activation), "ff_post_norm")


def layers_of(params: dict[str, Any], config: Any) -> list[dict[str, Array]]:
    stacks = {name: np.asarray(w, np.float64) for name, w in params["layers"].items()}
    return [
        {name: stack[l] for name, stack in stacks.items()} | {"local": config.is_local[l]}
        for l in range(config.num_layers)
    ]


def logits_of(params: dict[str, Any], config: Any, x: Array) -> Array:
    table = np.asarray(params["embed"].T if config.tie_embeddings else params["unembed"], np.float64)
    logits = rms_norm(x, np.asarray(params["final_norm"], np.float64), config.norm_eps) @ table
    return config.logit_softcap * np.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


# ------------------------------------------------------------------------------------- dense masked attention


def near(w: dict[str, Array], config: Any, distance: Array) -> Array:
    """Whether the windows let a layer's tokens see keys so many tokens back."""
    windows = [config.memory.window if config.memory else None, config.local_window if w["local"] else None]
    return np.all([distance < window for window in windows if window] or [distance == distance], axis=0)


def visible(memory: Any, length: int) -> Array:
    """Which key (column) every query (row) may read, bool [t, t]: full causal, BSWA."""
    q, k = np.indices((length, length))
    mask = k <= q
    if memory is not None:
        mask &= q // memory.block_size - k // memory.block_size <= memory.segments
    return mask


def dense_decoder(params: dict[str, Any], config: Any, tokens: Array) -> Array:
    """Logits [t, v] of tokens [t] by attention over the whole sequence under an explicit mask."""
    where, cap = np.arange(len(tokens)), config.attention_softcap
    x = np.asarray(params["embed"], np.float64)[tokens]
    for w in layers_of(params, config):
        mask = visible(config.memory, len(tokens)) & near(w, config, where[:, None] - where)
        q, k, v = project(w, config, x, where)
        attended = np.stack([attend(q[t], k[mask[t]], v[mask[t]], cap) for t in where])
        x = finish(w, config, x, attended, x)
    return logits_of(params, config, x)


# ------------------------------------------------------------------------------------------------ Algorithm 2


def fam_slots(memory: Any, start: float, prompt: bool) -> tuple[Array, Array]:
    """Rotary positions of the FAM rows as keys and as queries, in the block whose first token is at `start`.

    The learned prompt takes the slots of a FAM that has compressed a block before the first, or is pinned.
    """
    rows = np.arange(memory.fam_length)

    def after(end: float) -> Array:  # the rows that have compressed the block whose last token is at `end`
        if memory.fam_positions == "fractional":
            return end + (rows + 1) / (memory.fam_length + 1)
        return end + 1 - memory.fam_length + rows

    if memory.fam_positions == "zero":
        return np.zeros(memory.fam_length), np.zeros(memory.fam_length)
    keys = rows if prompt and memory.prompt_positions == "pinned" else after(start - 1)
    return keys, after(start + memory.block_size - 1) if memory.fam_query == "new" else keys


def prompt_stream(params: dict[str, Any], config: Any, layers: list[dict[str, Array]]) -> list[Array]:
    """The learned prompt climbs the layers, its rows attending to one another only: F_0 of every layer."""
    if not config.memory.fam_length:
        return [np.zeros((0, config.d_model))] * len(layers)
    x = np.asarray(params["fam_prompt"], np.float64)
    slots, _ = fam_slots(config.memory, 0, prompt=True)
    out = []
    for w in layers:
        out.append(x)
        q, k, v = project(w, config, x, slots)
        x = finish(w, config, x, np.stack([attend(row, k, v, config.attention_softcap) for row in q]), x)
    return out


class Read(NamedTuple):
    """What `fam_decoder` returns."""

    logits: Array  # [t, v]
    fam: list[Array]  # FAM of all layers [L, N, d] at the start and after every complete block


def fam_decoder(
    params: dict[str, Any], config: Any, tokens: Array, initial: Array | None = None, offset: float = 0.0
) -> Read:
    """Algorithm 2 over one document.

    Args:
        params: parameter tree.
        config: decoder configuration, with a block memory.
        tokens: int [t].
        initial: stored FAM [L, N, d] to start from (Random State Passing); None is the learned prompt.
        offset: position of the first token (Random Position Offset).
    """
    memory, size = config.memory, config.memory.block_size
    layers = layers_of(params, config)
    fam = prompt_stream(params, config, layers) if initial is None else list(np.asarray(initial, np.float64))
    without_residual = initial is None and memory.first_residual == "zero"
    # Per layer, positions, keys and values of past blocks.
    ring: list[list[tuple[Array, Array, Array]]] = [[] for _ in layers]
    embed = np.asarray(params["embed"], np.float64)
    history, outputs = [np.array(fam)], []
    for begin in range(0, len(tokens), size):
        x = embed[tokens[begin : begin + size]]
        positions = offset + begin + np.arange(len(x))
        key_slots, query_slots = fam_slots(memory, offset + begin, begin == 0 and initial is None)
        updated = []
        for l, w in enumerate(layers):
            q, k, v = project(w, config, x, positions)
            fam_q, fam_k, fam_v = project(w, config, fam[l], key_slots, query_slots)
            past = ring[l][len(ring[l]) - memory.segments :] if memory.segments < len(ring[l]) else ring[l]
            rows = []
            for t in range(len(x)):
                seen = [*past, (positions[: t + 1], k[: t + 1], v[: t + 1])]
                keys, values = [fam_k], [fam_v]
                for where, block_k, block_v in seen:
                    visible_here = near(w, config, positions[t] - where)
                    keys.append(block_k[visible_here])
                    values.append(block_v[visible_here])
                rows.append(attend(q[t], np.concatenate(keys), np.concatenate(values), config.attention_softcap))
            if len(x) == size and memory.fam_length:
                keys, values = np.concatenate([fam_k, k]), np.concatenate([fam_v, v])
                read = np.stack([attend(row, keys, values, config.attention_softcap) for row in fam_q])
                residual = np.zeros_like(fam[l]) if begin == 0 and without_residual else fam[l]
                updated.append(finish(w, config, fam[l], read, residual))
            x = finish(w, config, x, np.stack(rows), x)
            ring[l].append((positions, k, v))
        outputs.append(logits_of(params, config, x))
        if updated:
            fam = updated
            history.append(np.array(fam))
    return Read(np.concatenate(outputs), history)


# ------------------------------------------------------------------------------------------ models under test

SIZES = dict(vocab_size=29, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24)
B, N = 4, 2


def decoder_config(memory: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    """A tiny decoder in float64; `memory` holds changes to a BSWA of one segment, None is full attention."""
    block = None if memory is None else MemoryConfig(**{"block_size": B, **memory})
    wide = {"dtype": "float64", "param_dtype": "float64"}
    return DecoderConfig(**{**SIZES, **wide, "memory": block, **changes})


def fam_config(memory: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    """The same with FAM of N rows."""
    return decoder_config({"fam_length": N, **(memory or {})}, **changes)


def as_pretrained(config: DecoderConfig) -> DecoderConfig:
    """With all that one family of pretrained models or another has besides."""
    return dataclasses.replace(
        config,
        activation="gelu",
        attention_bias=True,
        post_norms=True,
        qk_norm=True,
        attention_softcap=2.0,
        logit_softcap=3.0,
        rope_scaling=RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, original=8),
        local_window=3,
        local_layers=tuple(l % 2 == 0 for l in range(config.num_layers)),
        local_rope_base=100.0,
    )


def model_shapes(config: DecoderConfig) -> Any:
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 3), jnp.int32))


def random_params(config: DecoderConfig, seed: int = 0) -> Any:
    """Parameters in which nothing is at its initial value, so that everything has an effect."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Array:
        name = str(path[-1].key)
        normal = rng.standard_normal(leaf.shape)
        if name.endswith("norm"):
            value = 1.0 + 0.3 * normal
        elif name in ("embed", "fam_prompt", "fam_prefix"):
            value = normal
        else:
            axis = max(-2, -leaf.ndim) if leaf.ndim < 4 else 1
            fan_in = leaf.shape[1] * leaf.shape[2] if name == "wo" else leaf.shape[axis]
            value = 1.3 * normal / np.sqrt(fan_in)
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model_shapes(config)["params"])


@functools.cache
def fast_compile_options() -> dict[str, Any]:
    """XLA options that compile tiny programs up to five times faster; those the installed version knows."""
    known = {}
    for option in ({"xla_backend_optimization_level": 0}, {"xla_cpu_use_fusion_emitters": False}):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options=option)()
            known |= option
    return known


def quick_jit(function: Any, **kwargs: Any) -> Any:
    """`jax.jit` for code that is compiled once to run a few times."""
    return jax.jit(function, compiler_options=fast_compile_options(), **kwargs)


@functools.cache
def params_of(config: DecoderConfig) -> Any:
    return random_params(config)


@functools.cache
def runner(config: DecoderConfig) -> Any:
    """A decoder, compiled: takes parameters, tokens and the keywords of `Decoder.__call__`."""
    model = Decoder(config)

    def run(params: Any, tokens: Any, aligned: bool = False, **kwargs: Any) -> Any:
        return model.apply({"params": params}, tokens, aligned=aligned, **kwargs)

    return quick_jit(run, static_argnames="aligned")


def some_tokens(*shape: int, seed: int = 0, vocab: int = SIZES["vocab_size"]) -> Array:
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def assert_close(got: Any, want: Any, tolerance: float = 1e-10, what: str = "") -> None:
    """max|got - want| <= tolerance * max|want|, the project's meaning of "within"."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, not {want.shape}"
    error, scale = np.max(np.abs(got - want), initial=0.0), np.max(np.abs(want), initial=0.0)
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} where the largest value is {scale:.3g}"


def assert_trees_close(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    chex.assert_trees_all_equal_structs(got, want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if np.asarray(b).dtype.kind in "biu":
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
        else:
            assert_close(a, b, tolerance, jax.tree_util.keystr(path))


def mostly_slow(names: Iterable[str], fast: Collection[str]) -> pytest.MarkDecorator:
    """Parametrizes a test by `name`; those of a class that a fast one stands for are slow."""
    assert set(fast) <= set(names)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]
    )

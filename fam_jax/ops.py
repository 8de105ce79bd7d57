"""The arithmetic that every layer is made of: norm, rotary positions, attention, gated feed-forward.

Pure functions of arrays. Letters in einsum strings and shapes: b batch, n block, c token in its block, s key,
f FAM row, h query head, g key/value head, r query heads per key/value head, k head width, d model width,
e feed-forward width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# Letters of the inputs and of the outputs of every weight that can be adapted (e: feed-forward width).
WEIGHTS = {
    "wq": ("d", "hk"),
    "wk": ("d", "gk"),
    "wv": ("d", "gk"),
    "wo": ("hk", "d"),
    "w_gate": ("d", "e"),
    "w_up": ("d", "e"),
    "w_down": ("e", "d"),
}


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Type in which norms, softmax and rotations of `dtype` values are computed: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root mean square norm: x / sqrt(mean(x^2) + eps) * scale over the last axis, of any shape [..., d]."""
    wide = x.astype(accumulation_dtype(x.dtype))
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


def rotate(x: Array, positions: Array, frequencies: Array) -> Array:
    """Rotary positions: turns pair i of each head by `position * frequencies[i]` radians.

    Args:
        x: Queries or keys: [..., c, heads, k]. Pair i is made of channels i and i + k/2.
        positions: [..., c], whole or fractional; leading axes broadcast against those of `x`.
        frequencies: [k/2], see `fam_jax.rope`.
    """
    dtype = accumulation_dtype(x.dtype)
    half = x.shape[-1] // 2
    angles = positions.astype(dtype)[..., None, None] * jnp.asarray(frequencies, dtype)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Source(NamedTuple):
    """Keys that a set of queries may read.

    Attributes:
        k: Rotated keys [..., s, g, k].
        v: Values [..., s, g, k].
        mask: True where a query sees a key, broadcastable to [..., c, s]; None if it sees all.
    """

    k: Array
    v: Array
    mask: Array | None = None


def cap(logits: Array, limit: float | None) -> Array:
    """Soft cap: limit * tanh(logits / limit), so that they stay within +-limit; as they are without a limit."""
    return logits if limit is None else limit * jnp.tanh(logits / limit)


@jax.named_scope("attend")  # parts of a program are found by these names, see `experiments.parts`
def attend(q: Array, sources: list[Source], softcap: float | None = None) -> Array:
    """One softmax over all keys of all sources; grouped heads.

    The sources are not concatenated: neighbouring blocks share keys, which a copy would multiply. Every query
    must see at least one key.

    Args:
        q: Rotated queries [..., c, h, k].
        sources: Keys and values, with the leading axes of `q`.
        softcap: Limit of the scores, see `cap`.

    Returns:
        [..., c, h, k] in the type of `q`.
    """
    dtype = accumulation_dtype(q.dtype)
    weights = attention_weights(q, sources, softcap).astype(q.dtype)
    parts = []
    start = 0
    for source in sources:
        stop = start + source.k.shape[-3]
        parts.append(
            jnp.einsum("...grcs,...sgk->...cgrk", weights[..., start:stop], source.v, preferred_element_type=dtype)
        )
        start = stop
    return sum(parts[1:], parts[0]).reshape(q.shape).astype(q.dtype)


def attention_weights(q: Array, sources: list[Source], softcap: float | None = None) -> Array:
    """The weights with which `attend` sums values, which are not read here.

    Args:
        q: Rotated queries [..., c, h, k].
        sources: Keys, with the leading axes of `q`.
        softcap: Limit of the scores, see `cap`.

    Returns:
        [..., g, r, c, s], the keys of all sources one after another; float32 at least.
    """
    dtype = accumulation_dtype(q.dtype)
    *lead, queries, heads, width = q.shape
    groups = sources[0].k.shape[-2]
    q = (q * width**-0.5).reshape(*lead, queries, groups, heads // groups, width)
    scores = []
    for source in sources:
        score = jnp.einsum("...cgrk,...sgk->...grcs", q, source.k, preferred_element_type=dtype)
        score = cap(score, softcap)
        if source.mask is not None:
            score = jnp.where(source.mask[..., None, None, :, :], score, jnp.finfo(dtype).min)
        scores.append(score)
    return jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)


def attend_by_block(q: Array, sources: list[Source], softcap: float | None = None) -> Array:
    """`attend` of one block after another, whose scores the backward pass computes again.

    So there are those of one block at a time. Over a whole text, in float32, they are the most memory that a layer
    takes: [b, n, h, c, s].

    Args:
        q: Rotated queries [b, n, c, h, k].
        sources: Keys and values [b, n, s, g, k]; masks [b or 1, n, c or 1, s], or [c, s] for all blocks.
        softcap: Limit of the scores, see `cap`.
    """
    shared = [source.mask if source.mask is not None and source.mask.ndim == 2 else None for source in sources]
    own = [
        source._replace(mask=None) if mask is not None else source for source, mask in zip(sources, shared, strict=True)
    ]

    def one(_, block):
        q, own = block
        masked = [
            source if mask is None else source._replace(mask=mask) for source, mask in zip(own, shared, strict=True)
        ]
        return None, attend(q, masked, softcap)

    blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, own))
    with jax.named_scope("attention"):  # by which the loop is found in a compiled program
        _, attended = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, blocks)
    return jnp.moveaxis(attended, 0, 1)


def product(equation: str, x: Array, weight: Array, factors: Mapping[str, Array], name: str) -> Array:
    """An adapted weight's product with its inputs: x W + (x A) B. A B, as large as W, is never there.

    Args:
        equation: Einsum of `x` and `weight`, in the letters of WEIGHTS.
        x: Inputs.
        weight: W.
        factors: Those of the layer, as `fam_jax.lora.effective` gives them; W alone is used if they are not of it.
        name: Name of W.
    """
    y = jnp.einsum(equation, x, weight)
    if f"{name}_a" not in factors:
        return y
    inputs, outputs = WEIGHTS[name]
    rows, result = equation.split(",")[0], equation.split("->")[1]
    lead = rows.removesuffix(inputs)
    thin = jnp.einsum(f"{rows},{inputs}r->{lead}r", x, factors[f"{name}_a"])
    return y + jnp.einsum(f"{lead}r,r{outputs}->{result}", thin, factors[f"{name}_b"])


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=True)}


@jax.named_scope("feed_forward")
def feed_forward(
    w_gate: Array, w_up: Array, w_down: Array, x: Array, lora: Mapping[str, Array], activation: str = "silu"
) -> Array:
    """Gated feed-forward: (activation(x w_gate) * x w_up) w_down, x of any shape [..., d].

    What `lora` has for the three weights is added to them, see `product`.
    """
    # One row axis: XLA's CPU backend is nearly twice as fast at the gradient of such products.
    rows = x.reshape(-1, x.shape[-1])
    gate = product("nd,de->ne", rows, w_gate, lora, "w_gate")
    hidden = ACTIVATIONS[activation](gate) * product("nd,de->ne", rows, w_up, lora, "w_up")
    return product("ne,ed->nd", hidden, w_down, lora, "w_down").reshape(x.shape)

"""Low-rank adaptation (LoRA, arXiv 2106.09685): a trained model is changed by products of two thin matrices.

A weight W of a layer, with d inputs and e outputs, acts as W + (alpha / rank) A B, with A [d, rank] and B [rank, e].
TransformerFAM gives a trained model its memory so: rank 64, on all weights of attention and feed-forward (section
3.1), and the FAM prompt trained with them. A begins random and B zero, so that training begins at the model as it was.
`merge` adds the products to the weights for inference.

The two are declared beside the model's other parameters, stacked over layers like them, and no other parameter has
another path or another value for them: params["lora"]["layers"]["wq_a"] [l, d, r], ["wq_b"] [l, r, h, k], and so on.

Dropout acts on the inputs of A: in a training step each layer leaves out inputs of each A, the same ones for every
token of the call, where usual implementations draw anew for every token. So it is a mask on A, drawn once where layers
are stacked, and every schedule, any split of a text over devices, tokens, FAM rows and the prompt have the same.

Qwix, the library for LoRA in JAX, does not fit: it intercepts the products of a Linen module while this runs, and
declares A and B where it finds the weight among the module's parameters. Here pure functions compute with slices of
stacked weights inside scans, partly under a gradient of their own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from fam_jax.config import DecoderConfig, LoraConfig
from fam_jax.ops import WEIGHTS


def sides(config: DecoderConfig, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the inputs and of the outputs of a weight."""
    c = config
    sizes = {"d": c.d_model, "h": c.num_heads, "g": c.num_kv_heads, "k": c.head_dim, "e": c.d_ff}
    inputs, outputs = (tuple(sizes[letter] for letter in side) for side in WEIGHTS[name])
    return inputs, outputs


def init(config: DecoderConfig, key: Array, dtype: DTypeLike) -> dict[str, dict[str, Array]]:
    """A, whose products with inputs of variance 1 have variance 1, and B, which is zero, of all targets and layers."""
    lora = _of(config)
    found = {}
    for name in lora.targets:
        inputs, outputs = sides(config, name)
        normal = jax.random.normal(_key_of(key, name), (config.num_layers, *inputs, lora.rank), dtype)
        found[f"{name}_a"] = normal * math.prod(inputs) ** -0.5
        found[f"{name}_b"] = jnp.zeros((config.num_layers, lora.rank, *outputs), dtype)
    return {"layers": found}


def effective(config: DecoderConfig, factors: Mapping[str, Array], key: Array | None) -> dict[str, Array]:
    """What layers compute with: A times alpha / rank and without the inputs that are dropped, and B.

    Args:
        config: The decoder's.
        factors: `params["lora"]["layers"]`, if it has any.
        key: For dropout; None for none.

    Returns:
        The same arrays in the type of the activations; none without LoRA.
    """
    lora = config.lora
    found: dict[str, Array] = {}
    for name in () if lora is None else lora.targets:
        assert lora is not None
        a = factors[f"{name}_a"] * lora.scale
        if key is not None and lora.dropout:
            kept = jax.random.bernoulli(_key_of(key, name), 1 - lora.dropout, a.shape[:-1])
            a = jnp.where(kept[..., None], a / (1 - lora.dropout), 0)
        found |= {f"{name}_a": a.astype(config.dtype), f"{name}_b": factors[f"{name}_b"].astype(config.dtype)}
    return found


def merge(config: DecoderConfig, params: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The same model without LoRA, the products being in its weights.

    Args:
        config: The decoder's; it has LoRA.
        params: Its parameters, the "params" of its variables.

    Returns:
        Config and parameters of the merged model.

    Raises:
        ValueError: The model has no LoRA.
    """
    merged = _changed(config, params["layers"], params["lora"]["layers"] if config.lora else {}, 1)
    rest = {name: part for name, part in params.items() if name != "lora"}
    return dataclasses.replace(config, lora=None), {**rest, "layers": merged}


def unmerge(config: DecoderConfig, params: Mapping[str, Any], lora_params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `merge`, up to rounding.

    Args:
        config: The decoder's before it was merged; it has LoRA.
        params: Parameters of the merged model.
        lora_params: What "lora" was among those before.

    Returns:
        The parameters before.

    Raises:
        ValueError: The model has no LoRA.
    """
    return {**params, "layers": _changed(config, params["layers"], lora_params["layers"], -1), "lora": lora_params}


def _changed(config: DecoderConfig, layers: Mapping[str, Any], factors: Mapping[str, Any], sign: int) -> dict[str, Any]:
    """Weights of all layers plus or minus their products, which are computed in float32 at least."""
    lora, found = _of(config), dict(layers)
    for name in lora.targets:
        weight, (inputs, outputs) = layers[name], WEIGHTS[name]
        dtype = jnp.promote_types(weight.dtype, jnp.float32)
        a, b = (jnp.asarray(factors[f"{name}_{which}"], dtype) for which in "ab")
        change = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", a, b, precision="highest")
        found[name] = (weight.astype(dtype) + sign * lora.scale * change).astype(weight.dtype)
    return found


def _key_of(key: Array, name: str) -> Array:
    """One weight's key, whatever the other targets are."""
    return jax.random.fold_in(key, list(WEIGHTS).index(name))


def _of(config: DecoderConfig) -> LoraConfig:
    if config.lora is None:
        raise ValueError("DecoderConfig.lora=None has nothing to add to weights; it must be a LoraConfig")
    return config.lora

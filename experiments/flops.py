"""Floating point operations: counted on a function's jaxpr, and by a closed formula for the decoder.

Matrix products only, an addition and a multiplication being two operations; norms, softmax and rotations are under one
percent. XLA's own `cost_analysis` counts the body of a loop once and is of no use here. Letters in formulas: B tokens
in a block, m segments, N FAM rows, H query and G key/value heads of width k, d model width, e feed-forward width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from fam_jax import DecoderConfig
from fam_jax.lora import sides
from lime_jax import LimeConfig
from lime_jax.config import source_mask

# Primitives that do the work of matrix products in a way that is not visible in a jaxpr, or that has no single count.
OPAQUE = frozenset(
    {
        "cholesky",
        "conv_general_dilated",
        "custom_linear_solve",
        "eig",
        "eigh",
        "fft",
        "ffi_call",
        "geqrf",
        "hessenberg",
        "householder_product",
        "lu",
        "pallas_call",
        "qr",
        "ragged_dot",
        "ragged_dot_general",
        "scaled_matmul",
        "schur",
        "svd",
        "symmetric_product",
        "triangular_solve",
        "tridiagonal",
        "tridiagonal_solve",
    }
)

# Products of [queries, keys, width] that cuDNN's attention computes for a head.
FUSED = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
# The same of the splash kernels, by the beginnings of their names; they take all heads of a group at once.
SPLASH = {"splash_mqa_fwd": 2, "splash_mqa_dq": 3, "splash_mqa_dkv": 4}

# Peak of dense bfloat16 products with float32 accumulation, operations per second of one device as JAX counts devices.
# TPUs: the "System architecture" pages of cloud.google.com/tpu/docs, in TFLOP/s a chip: v3 123, v4 275, v5e 197,
# v5p 459, v6e 918, TPU7x 2307. A chip of v3 and of TPU7x is two devices; one of v4 is one, its cores being fused.
# GPUs: NVIDIA's data sheets, half of what they give "with sparsity": A100 624, H100 SXM and H200 1979, H100 PCIe 1513,
# H100 NVL and H200 NVL 1671, L4 242.
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
}


def count(fn: Callable[..., Any], *args: Any) -> int:
    """Operations of `fn(*args)` on all devices together, what a backward pass computes again included.

    Counts every product in the program as it is traced, masked entries and padding too, but for what cuDNN's attention
    leaves out because it is causal: loops times their length, the larger branch of a conditional, and a `jax.shard_map`
    times the devices that run it. Where a text is spread over D devices that is too high: the FAM's turns are
    conditional, so that its updates count D times.

    Args:
        fn: Anything that can be traced, jitted or not.
        args: Its arguments; `jax.ShapeDtypeStruct` will do, so that no memory is needed.

    Raises:
        ValueError: There are products in a `while` loop, whose length is unknown (`jax.lax.fori_loop` with constant
            bounds is a scan), or a kernel or a factorisation whose operations a jaxpr does not show.
    """
    return count_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def count_jaxpr(jaxpr: Jaxpr) -> int:
    """`count` of what has been traced already."""
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * terms * math.prod(equation.outvars[0].aval.shape)
    if name in FUSED:
        return 2 * FUSED[name] * _fused_pairs(equation)
    products = [SPLASH[one] for one in SPLASH if name == "pallas_call" and str(params["name"]).startswith(one)]
    if products:
        q, k, *_ = (one.aval for one in equation.invars if jnp.issubdtype(one.aval.dtype, jnp.floating))
        return 2 * products[0] * math.prod(q.shape) * k.shape[-2]
    if name in OPAQUE:
        raise ValueError(
            f"the operations of {name} cannot be read off a jaxpr; count a reference implementation instead"
        )
    inner = [count_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError("a while loop with matrix products has no known length; use jax.lax.scan or constant bounds")
    if name == "shard_map":
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    return sum(inner)


def _fused_pairs(equation: Any) -> int:
    """Pairs of query and key of fused attention, times heads and their width; those that a causal mask leaves."""
    (batch, queries, heads, width), keys = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
    causal = "CAUSAL" in str(equation.params["mask_type"])
    pairs = queries * (queries + 1) // 2 if causal and queries == keys else queries * keys
    return batch * heads * width * pairs


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters: those of jit, remat, custom derivatives, loops and branches."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def forward_flops(config: DecoderConfig, batch: int, length: int, *, useful: bool = False, read: int = 0) -> int:
    """Operations of one call of the decoder without a state, logits included: the closed formula.

    Per layer, with P = 2dHk + 2dGk + 3de weights, a row of tokens, FAM or prompt costs 2P, and a pair of query and key
    4Hk. The FAM has N rows in each block, which see N + B keys, and the prompt N rows a call; a prefix costs nothing.
    A call shorter than a block projects FAM rows twice: for its tokens, and for the update at a block's end,
    where layers are scanned.
    Without its feed-forward, FAM rows cost the other weights only. LoRA of rank r adds r weights for every input and
    output of those that it changes.

    Args:
        config: The decoder's; its mixing is None or a LimeConfig of any router but dynamic_views.
        batch: Rows of the batch.
        length: Tokens of a row.
        useful: False counts what the program computes: whole blocks, and all scores of a token with its block, m
            segments and N FAM rows, masked or not. True, for the utilisation of a device, only what the model needs:
            keys that a token sees, blocks that are full, layers that have a FAM, and layers that a router may read.
        read: Tokens of each row's document, whole blocks, that earlier calls have read: what is useful sees them, too.

    Raises:
        ValueError: There is no formula for the mixing, for the kind of memory, or for what the schedule computes.
    """
    c, memory, fam = config, config.memory, config.fam_length
    if memory is not None and memory.kind != "fam":
        raise ValueError(f"memory.kind={memory.kind!r} has no formula; count the operations on the jaxpr with count()")
    if config.schedule == "wavefront" and not useful:
        raise ValueError("schedule='wavefront' has no formula with its idle places; count the operations with count()")
    block = memory.block_size if memory else length
    tokens, updates = _rows(config, batch, length, useful)
    if useful:
        token_pairs = batch * _visible(config, length, read)
        number = (read + np.arange(length, dtype=np.int64)) // block  # of the block that each token is in
        seen = batch * fam * int(np.minimum(number + 1, memory.fam_blocks).sum()) if memory else 0
    else:
        token_pairs = tokens * block * (1 + c.segments)
        seen = tokens * fam * memory.fam_blocks if memory else 0
    prompt = _prompt(config)
    pairs = c.num_layers * (token_pairs + prompt**2) + _fam_layers(config, useful) * (
        seen + updates * fam * (fam + block)
    )
    layers = 2 * _weight_rows(config, tokens, updates, useful) + 4 * c.num_heads * c.head_dim * pairs
    mixed = (tokens + updates * fam + prompt) * _mixing(config, useful)
    if not useful and length < block:
        projected = _weights(c)[0] - c.d_model * c.num_heads * c.head_dim + _lora_weights(c, ("wq", "wk", "wv"))
        layers += 2 * c.num_layers * updates * fam * projected
        mixed += updates * fam * _mixing(dataclasses.replace(c, scan_layers=True), useful)
    return layers + mixed + 2 * c.d_model * c.vocab_size * batch * length


def _prompt(config: DecoderConfig) -> int:
    """Rows of the prompt that climb the layers in a call."""
    return config.fam_length if config.memory and config.memory.fam_init == "prompt" else 0


def _fam_layers(config: DecoderConfig, useful: bool) -> int:
    """Layers that compute a FAM; a scanned layer does even if it has none."""
    chosen = config.memory.layers if config.memory else None
    return config.num_layers if chosen is None or not useful else len(chosen)


def _weight_rows(config: DecoderConfig, tokens: int, updates: int, useful: bool, lora: bool = True) -> int:
    """Weights of all layers, times the rows that pass through them."""
    attention, ff = _weights(config)
    if lora:
        attention += _lora_weights(config, ("wq", "wk", "wv", "wo"))
        ff += _lora_weights(config, ("w_gate", "w_up", "w_down"))
    whole = config.num_layers * (attention + ff) * (tokens + _prompt(config))
    fam = attention + ff if config.memory and config.memory.fam_ff else attention
    return whole + _fam_layers(config, useful) * fam * updates * config.fam_length


def _rows(config: DecoderConfig, batch: int, length: int, useful: bool) -> tuple[int, int]:
    """Tokens and updates of the FAM of a call."""
    block = config.memory.block_size if config.memory else length
    if useful:
        return batch * length, batch * (length // block)
    blocks = -(-length // block)
    return batch * blocks * min(length, block), batch * blocks


def _weights(config: DecoderConfig) -> tuple[int, int]:
    """Weights of a layer in products, P: of attention, and of the feed-forward."""
    c = config
    return 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads), 3 * c.d_model * c.d_ff


def _lora_weights(config: DecoderConfig, names: tuple[str, ...]) -> int:
    """Those that LoRA adds to these weights of a layer."""
    if config.lora is None:
        return 0
    return config.lora.rank * sum(
        math.prod(side) for name in config.lora.targets if name in names for side in sides(config, name)
    )


def idle_share(config: DecoderConfig, length: int, devices: int) -> float:
    """Share of the time that devices along the text wait for the FAM, if all operations were equally fast.

    With W operations of a row's tokens and F of its FAM, which is with one of D devices at a time, a device works for
    (W + F) / D of W / D + F. On real devices the FAM's few rows take longer than their operations say; what a backward
    pass computes again is not counted.

    Args:
        config: The decoder's.
        length: Tokens of a row.
        devices: Devices along the text: `mesh.sequence`.
    """
    if not config.fam_length:
        return 0.0
    assert config.memory is not None
    whole = forward_flops(config, 1, length)
    c, updates = config, -(-length // config.memory.block_size)
    linear = _weight_rows(config, 0, updates, False) - _weight_rows(config, 0, 0, False)
    pairs = updates * c.fam_length * (c.fam_length + config.memory.block_size)
    fam = 2 * linear + 4 * c.num_layers * c.num_heads * c.head_dim * pairs
    return 1 - whole / (whole + (devices - 1) * fam)


def train_flops(config: DecoderConfig, batch: int, length: int, *, useful: bool = False, read: int = 0) -> int:
    """Three times `forward_flops`: for each product, its gradient takes two more. Nothing is computed again.

    With LoRA the weights themselves, embedding included, have no gradient, which saves one of the three of theirs.
    """
    total = 3 * forward_flops(config, batch, length, useful=useful, read=read)
    if config.lora is None:
        return total
    tokens, updates = _rows(config, batch, length, useful)
    return (
        total
        - 2 * _weight_rows(config, tokens, updates, useful, lora=False)
        - 2 * config.d_model * config.vocab_size * batch * length
    )


@functools.cache
def step_flops(config: DecoderConfig, stream: bool, batch: int, length: int) -> int | None:
    """Operations that a training step needs, by which its utilisation is measured; None if there is no formula.

    Args:
        config: The decoder's.
        stream: Rows go on from step to step, so that all segments are there; documents that begin on the way are not
            looked for.
        batch: Rows of the step.
        length: Tokens of a row.
    """
    read = config.segments * config.memory.block_size if stream and config.memory else 0
    try:
        return train_flops(config, batch, length, useful=True, read=read)
    except ValueError:
        return None


def _visible(config: DecoderConfig, length: int, read: int) -> int:
    """Tokens that the tokens of a document see, summed over those that come after `read` of them."""
    position = read + np.arange(length, dtype=np.int64)
    seen = position + 1
    if config.memory is not None:
        block = config.memory.block_size
        seen = np.minimum(seen, position % block + 1 + config.segments * block)
        if config.memory.window is not None:
            seen = np.minimum(seen, config.memory.window)
    return int(seen.sum())


def _mixing(config: DecoderConfig, useful: bool) -> int:
    """Operations of all layers' mixing of one row.

    A layer that is scanned mixes the whole bank of layers, those that come after it with weight zero, and its own slot;
    one that is not, only what there is.
    """
    mixing, layers, heads, width = config.mixing, config.num_layers, config.num_kv_heads, config.d_model
    if mixing is None:
        return 0
    if not isinstance(mixing, LimeConfig):
        raise ValueError(f"mixing={mixing!r} has no formula; count the operations on the jaxpr with count()")
    apart = 4 * heads * config.head_dim  # keys and values, head by head
    static = apart if mixing.same_head else apart * heads
    cost = {  # of a slot that is read: mixing it, and computing its weights
        "static_kv": (static, 0),
        "average": (apart, 0),
        "dynamic_kv": (static + apart, 2 * width * heads),
        "static_hidden": (2 * width * heads, 0),
        "dynamic_hidden": (2 * width * heads, 2 * width * heads),
    }
    if mixing.router not in cost:
        raise ValueError(f"router={mixing.router!r} has no formula; count the operations on the jaxpr with count()")
    mix, weigh = cost[mixing.router]
    if useful:  # the first layer has nothing to mix
        return int(source_mask(mixing.sources, layers)[1:].sum()) * (mix + weigh)
    whole = config.scan_layers or mixing.backward == "push"
    slots = layers * (layers + 1) if whole else layers * (layers + 1) // 2
    return slots * mix + layers**2 * weigh


def mfu(flops: float, seconds: float, device_kind: str, devices: int) -> float | None:
    """Share of the devices' bfloat16 peak: model FLOP utilisation, or that of the hardware.

    Args:
        flops: Operations of a step: `train_flops` with `useful=True` for the model's, `count` for the hardware's.
        seconds: Time of the step.
        device_kind: `device_kind` of a JAX device.
        devices: Devices that ran the step.

    Returns:
        A fraction; None if the peak of the device is not known.
    """
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops / (seconds * peak * devices)

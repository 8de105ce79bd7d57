"""Attention by cuDNN's fused kernels, which never hold the scores: `DecoderConfig.attention`.

The queries of a block see two sets of keys: their own block causally, and whole what comes before it, FAM rows and then
memory segments from the latest to the oldest, of which the first blocks of a document miss the last. Each set is one
kernel without a mask, blocks being rows of its batch, and a softmax over both follows from what each gives (o) and from
the logarithm of its denominator (L):

    L = log(exp(L1) + exp(L2)),  o = exp(L1 - L) o1 + exp(L2 - L) o2

The gradient needs no formula of its own: given o and L of the whole, a kernel's backward pass has the right weights
exp(score - L) of its keys. `jax.nn.dot_product_attention` has neither a gradient of L nor L in more than the precision
of the activations, hence the kernels below it.
"""

import inspect
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from fam_jax.ops import Source, accumulation_dtype
from fam_jax.remat import FUSED

if TYPE_CHECKING:
    from fam_jax.config import DecoderConfig

WIDEST = 256  # head that the kernels take, from compute capability 9 on; 128 before


def obstacle(config: "DecoderConfig") -> str | None:
    """The field of a config by which its attention is nothing for these kernels, and what it must be; None if none."""
    c = config
    if c.dtype != "bfloat16":
        return f"dtype={c.dtype!r}, which must be 'bfloat16'"
    if c.head_dim % 8 or c.head_dim > WIDEST:
        return f"head_dim={c.head_dim}, which must be a multiple of 8, at most {WIDEST}"
    if c.attention_softcap is not None:
        return f"attention_softcap={c.attention_softcap}, which must be None"
    return masked(config)


def masked(config: "DecoderConfig") -> str | None:
    """The field by which a block sees more, or less, than itself causally and whole rows before it; None if none."""
    memory = config.memory
    if config.local_window is not None:
        return f"local_window={config.local_window}, which must be None"
    if memory is None:
        return None
    if memory.kind not in ("fam", "summary"):
        return f"memory.kind={memory.kind!r}, which must be 'fam' or 'summary'"
    for name, value, needed in (
        ("window", memory.window, None),
        ("fam_blocks", memory.fam_blocks, 1),
        ("layers", memory.layers, None),
    ):
        if value != needed:
            return f"memory.{name}={value!r}, which must be {needed}"
    return None


def chosen(config: "DecoderConfig") -> bool:
    """Whether a call of whole blocks uses these kernels, on the device that JAX uses.

    By `attention="auto"` it does if it can, in a program of one device.

    Raises:
        ValueError: They are asked for on another kind of device.
    """
    if config.attention == "cudnn" and not _on_gpu(config.head_dim):
        raise ValueError(
            f"attention='cudnn' with head_dim={config.head_dim} needs an NVIDIA GPU of compute capability "
            f"{_capability(config.head_dim)} or more, but JAX uses {jax.devices()[0].device_kind!r}; set attention to "
            "'auto' or 'xla'"
        )
    if config.attention != "auto":
        return config.attention == "cudnn"
    return obstacle(config) is None and jax.sharding.get_abstract_mesh().size <= 1 and _on_gpu(config.head_dim)


def _capability(head_dim: int) -> float:
    """Of the oldest GPUs whose kernels take heads of this width."""
    return 8.0 if head_dim <= 128 else 9.0


def _on_gpu(head_dim: int) -> bool:
    """Whether JAX's device is a GPU whose kernels take heads of this width."""
    device = jax.devices()[0]
    if "cuda" not in getattr(device.client, "platform_version", ""):
        return False
    return float(device.compute_capability) >= _capability(head_dim)


def forward(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Array]:
    """Attention to one set of keys.

    Args:
        q: Rotated queries [b, c, h, k].
        k: Rotated keys [b, s, g, k].
        v: Values [b, s, g, k].
        lengths: A row's queries see its first so many keys, at least one: int32 [b]. None: causally.

    Returns:
        What attention gives [b, c, h, k], and the logarithms of its denominators, float32 [b, h, c].
    """
    mask, q_seqlen = _mask(q, lengths)
    out: Any = _kernels().dot_product_attention(
        q, k, v, q_seqlen=q_seqlen, kv_seqlen=lengths, scale=_scale(q), mask_type=mask, return_residual=True
    )
    return out[0], out[1]


def backward(
    q: Array, k: Array, v: Array, lengths: Array | None, lse: Array, out: Array, grad: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v of `forward`, if all keys of the queries give `out` and `lse`.

    Args:
        q: As in `forward`; so k, v and lengths.
        k: Keys.
        v: Values.
        lengths: Keys that are seen.
        lse: Logarithms of the denominators over all keys, float32 [b, h, c].
        out: What attention to all keys gives [b, c, h, k].
        grad: Its gradient.
    """
    kernels, none = _kernels(), jnp.zeros(0, q.dtype)
    mask, q_seqlen = _mask(q, lengths)
    newer = "score_mod" in inspect.signature(kernels.dot_product_attention).parameters  # from JAX 0.12 on
    dq, dk, dv = kernels._dot_product_attention_bwd_p_wrapper.bind(
        *(q, k, v, none),
        *((none, none) if lengths is None else (q_seqlen, lengths)),
        *(none, none, none, none, lse, out, grad),
        scale=_scale(q),
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=mask,
        layout=kernels.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        **({"score_mod": None} if newer else {}),
    )
    return dq, dk, dv


def _kernels() -> Any:
    """The module that `jax.nn.dot_product_attention` is made of: not public, and imported only where it is used."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _mask(q: Array, lengths: Array | None) -> tuple[Any, Array | None]:
    """The kernels' kind of mask, and how many queries there are in each row, if they ask."""
    kinds = _kernels().MaskType
    if lengths is None:
        return kinds.CAUSAL, None
    return kinds.PADDING, 0 * lengths + q.shape[1]  # of the lengths, so that a vmap over those is one over these


def _scale(q: Array) -> float:
    return float(q.shape[-1] ** -0.5)


@jax.named_scope("attend")
def attend_blocks(q: Array, own: Source, rows: list[Source], segments: list[Source], there: Array) -> Array:
    """What `fam_jax.ops.attend` gives of whole blocks.

    Args:
        q: Rotated queries [b, n, c, h, k].
        own: Keys and values of the same blocks [b, n, c, g, k], seen causally.
        rows: What every block sees whole: FAM rows [b, n, f, g, k].
        segments: Memory segments, the latest first: each [b, n, c, g, k].
        there: Of how many each block sees: int [b, n].
    """

    def fold(x):
        return x.reshape(-1, *x.shape[2:])

    prefix = None
    if rows or segments:
        k, v = (
            jnp.concatenate(parts, axis=2) for parts in zip(*((one.k, one.v) for one in rows + segments), strict=True)
        )
        lengths = sum(one.k.shape[2] for one in rows) + own.k.shape[2] * there.reshape(-1)
        prefix = (fold(k), fold(v), lengths.astype(jnp.int32))
    return _attend(fold(q), (fold(own.k), fold(own.v)), prefix).reshape(q.shape)


@jax.custom_vjp
def _attend(q: Array, own: tuple[Array, Array], prefix: tuple[Array, Array, Array] | None) -> Array:
    """Attention of q [b, c, h, k] to `own` keys and values, causally, and to the first of a `prefix`."""
    return _forward(q, own, prefix)[0]


def _forward(q, own, prefix):
    out, lse = forward(q, own[0], own[1], None)
    if prefix is not None:
        k, v, lengths = prefix
        more, more_lse = forward(q, k, v, jnp.maximum(lengths, 1))  # kernels need a key, which then has no weight
        more_lse = jnp.where((lengths > 0)[:, None, None], more_lse, -jnp.inf)
        whole = jnp.logaddexp(lse, more_lse)
        shares = (jnp.exp(part - whole).swapaxes(1, 2)[..., None] for part in (lse, more_lse))
        first, second = (share * part for share, part in zip(shares, (out, more), strict=True))
        out, lse = (first + second).astype(q.dtype), whole
    out, lse = checkpoint_name(out, FUSED), checkpoint_name(lse, FUSED)
    return out, (q, own, prefix, out, lse)


def _backward(kept, grad):
    q, own, prefix, out, lse = kept
    dq, dk, dv = backward(q, own[0], own[1], None, lse, out, grad)
    if prefix is None:
        return dq, (dk, dv), None
    k, v, lengths = prefix
    # The key of a row that has none: so large a denominator leaves it no weight.
    lse = jnp.where((lengths > 0)[:, None, None], lse, 1e30)
    more, *of_prefix = backward(q, k, v, jnp.maximum(lengths, 1), lse, out, grad)
    there = (jnp.arange(k.shape[1]) < lengths[:, None])[..., None, None]  # kernels may leave anything elsewhere
    of_k, of_v = (jnp.where(there, part, 0) for part in of_prefix)
    dq, more = (part.astype(accumulation_dtype(q.dtype)) for part in (dq, more))
    return (dq + more).astype(q.dtype), (dk, dv), (of_k, of_v, None)


_attend.defvjp(_forward, _backward)

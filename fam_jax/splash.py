"""Attention by the splash kernels of TPUs, which never hold the scores: `DecoderConfig.attention="splash"`.

Blocks are rows of the kernel's batch. A block's keys stand one after another: FAM rows, memory segments, then its own,
so that one mask that the kernel computes serves all of them: a query in slot i sees the keys up to the i-th of its own
block. Of the segments that the first blocks of a document miss, the kernel is told by segment ids. The kernels are
those of `jax.experimental.pallas.ops.tpu.splash_attention`; on a CPU they are interpreted, which is slow, for tests.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from fam_jax.cudnn import masked
from fam_jax.ops import Source
from fam_jax.remat import FUSED
from fam_jax.sharding import ShardingRules, fit

if TYPE_CHECKING:
    from fam_jax.config import DecoderConfig

LANES = 128  # tiles of queries and of keys are multiples of it
LARGEST = 4  # of so many; as scores, a tile of 512 by 512 takes a megabyte


def obstacle(config: "DecoderConfig") -> str | None:
    """The field of a config by which its attention is nothing for these kernels, and what it must be; None if none."""
    if config.dtype not in ("bfloat16", "float32"):
        return f"dtype={config.dtype!r}, which must be 'bfloat16' or 'float32'"
    return masked(config)


def chosen(config: "DecoderConfig") -> bool:
    """Whether a call of whole blocks uses these kernels.

    Raises:
        ValueError: They are asked for on a GPU.
    """
    if config.attention != "splash":
        return False
    if jax.default_backend() == "gpu":
        raise ValueError(
            f"attention='splash' needs a TPU, or a CPU, which interprets it, but JAX uses "
            f"{jax.devices()[0].device_kind!r}; set attention to 'auto', 'cudnn' or 'xla'"
        )
    return True


@jax.named_scope("attend")
def attend_blocks(
    rules: ShardingRules,
    q: Array,
    own: Source,
    rows: list[Source],
    segments: list[Source],
    there: Array,
    softcap: float | None,
) -> Array:
    """What `fam_jax.ops.attend` gives of whole blocks.

    Args:
        rules: How arrays are spread over the mesh, if there is one: each device has its kernel.
        q: Rotated queries [b, n, c, h, k].
        own: Keys and values of the same blocks [b, n, c, g, k], seen causally.
        rows: What every block sees whole: FAM rows [b, n, f, g, k].
        segments: Memory segments, the latest first: each [b, n, c, g, k].
        there: Of how many each block sees: int [b, n].
        softcap: Limit of the scores, see `fam_jax.ops.cap`.
    """
    sources = [*rows, *segments, own]
    k, v = (jnp.concatenate([getattr(one, name) for one in sources], axis=2) for name in ("k", "v"))
    keys = [
        *(jnp.ones((*there.shape, one.k.shape[2]), bool) for one in rows),
        *(jnp.broadcast_to((back <= there)[..., None], one.k.shape[:3]) for back, one in enumerate(segments, 1)),
        jnp.ones(own.k.shape[:3], bool),
    ]
    seen = jnp.broadcast_to(jnp.concatenate(keys, axis=2), k.shape[:3]).astype(jnp.int32)
    run = partial(_attend, before=k.shape[2] - own.k.shape[2], softcap=softcap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q, k, v, seen)
    # Kernels are nothing that XLA could spread. A group's queries stay with its keys; if those of several heads cannot
    # be spread over the axis of heads, each of its devices computes all.
    spread = fit(rules.spec("batch", "block", None, "kv_heads", None), k.shape, mesh)
    of_q = fit(rules.spec("batch", "block", None, "heads", None), q.shape, mesh) if k.shape[3] == 1 else spread
    free = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is not AxisType.Manual}
    specs = (of_q, spread, spread, jax.P(*spread[:3]))
    return jax.shard_map(run, in_specs=specs, out_specs=of_q, axis_names=free, check_vma=False)(q, k, v, seen)


def _attend(q: Array, k: Array, v: Array, seen: Array, *, before: int, softcap: float | None) -> Array:
    """Attention of q [b, n, c, h, k] to keys [b, n, s, g, k], of which the first `before` are seen by all queries.

    Args:
        q: Rotated queries.
        k: Rotated keys.
        v: Values.
        seen: 1 where there is a key, else 0: int32 [b, n, s].
        before: s less the keys of the own block.
        softcap: Limit of the scores.
    """
    groups, width = k.shape[3:]
    tokens, heads = q.shape[2:4]
    queries, keys = (_padded(count) for count in (tokens, k.shape[2]))

    def fold(x, count):
        """[b, n, c, ...] to [b n, `count`, ...], with zeros after the last."""
        x = x.reshape(-1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, count - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))

    rows = fold(q * width**-0.5, queries).reshape(-1, queries, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k, v = (fold(x, keys).swapaxes(1, 2) for x in (k, v))

    def kernel(interpret, rows, k, v, seen):
        one = _kernel(heads // groups, queries, keys, before, softcap, interpret)
        return jax.vmap(jax.vmap(one, in_axes=(0, 0, 0, None)))(rows, k, v, seen)

    seen = _segment_ids(jnp.ones((len(rows), queries), jnp.int32), fold(seen, keys))
    out = jax.lax.platform_dependent(rows, k, v, seen, cpu=partial(kernel, True), default=partial(kernel, False))
    return out.transpose(0, 3, 1, 2, 4).reshape(-1, queries, heads, width)[:, :tokens].reshape(q.shape)


def _padded(count: int) -> int:
    """`count` tokens in whole tiles, of which there are few."""
    tile = LANES * min(LARGEST, -(-count // LANES))
    return -(-count // tile) * tile


def _tile(count: int) -> int:
    return LANES * max(size for size in range(1, LARGEST + 1) if count % (LANES * size) == 0)


def _segment_ids(q: Array, kv: Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q, kv)


def _kernel(heads: int, queries: int, keys: int, before: int, softcap: float | None, interpret: bool) -> Any:
    """The kernel of heads that share keys: q [r, c, k], k and v [s, k], segment ids of [c] and [s] -> [r, c, k]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    q, kv = _tile(queries), _tile(keys)
    sizes = splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((queries, keys), offset=before)] * heads)
    return splash.make_splash_mqa_single_device(
        mask,
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=FUSED,
        interpret=interpret,
    )

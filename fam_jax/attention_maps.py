"""Who reads what around the FAM: attention weights of tokens and of FAM rows, for analysis (the paper's appendix F).

The decoder itself keeps none of it. `attention_maps` runs the same layers, by the same functions, and works out the
weights beside them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fam_jax.call import check_call
from fam_jax.config import DecoderConfig
from fam_jax.embedding import embed_blocks
from fam_jax.fam import FamInputs, earlier, key_positions, query_positions
from fam_jax.layer import layer, seen_blocks
from fam_jax.ops import Source, attention_weights, rotate
from fam_jax.plan import Plan, make_plan
from fam_jax.rope import frequencies
from fam_jax.schedules import stack_layers, through_layers
from fam_jax.state import LayerMemory
from fam_jax.sublayers import LayerParams, project
from lime_jax import Depth, Mixer, make_mixer
from lime_jax.depth import NO_DEPTH
from lime_jax.mixer import shape_of


class AttentionMaps(NamedTuple):
    """Attention weights of each layer l, text b, block n and head h; those of a row sum to 1.

    A token (c) reads what the FAM (f) was when it entered the block, past blocks, and its own. A FAM row reads the FAM
    as it entered and the whole block, no past ones. Where tokens see several FAMs (e) or past blocks (m), the oldest
    comes first; those from before the text have weight 0.

    Attributes:
        token_fam: Of tokens over FAM rows: [l, b, n, h, c, e, f]; 0 in layers without a FAM.
        token_past: Of tokens over past blocks: [l, b, n, h, c, m, c].
        token_block: Of tokens over their block: [l, b, n, h, c, c].
        fam_fam: Of FAM rows over the FAM: [l, b, n, h, f, f]; NaN in layers without a FAM, and so is the next.
        fam_block: Of FAM rows over the block: [l, b, n, h, f, c].
        fam: The FAM as it enters each block, and after the last: [l, b, n + 1, f, d]. The first is where it starts.
    """

    token_fam: Array
    token_past: Array
    token_block: Array
    fam_fam: Array
    fam_block: Array
    fam: Array


def attention_maps(config: DecoderConfig, params: Any, tokens: ArrayLike) -> AttentionMaps:
    """Reads texts from their beginning, block by block, and returns who read what. A pure function.

    Args:
        config: The decoder's.
        params: Its parameters, the "params" of its variables.
        tokens: Ids of whole blocks: int32 [b, n * c].

    Raises:
        ValueError: See `Decoder.__call__`; or the model has no FAM, or the texts do not end with a block.
    """
    memory = config.memory
    if memory is None or memory.kind != "fam" or not memory.fam_length:
        raise ValueError(
            f"attention_maps looks at a FAM, but this model has none (memory={memory}); give one whose memory is of "
            "kind 'fam' with fam_length above 0"
        )
    call = check_call(config, tokens, None, None, None, None, False)
    time, size = call.tokens.shape[1], memory.block_size
    if time < size or time % size:
        raise ValueError(f"tokens has {time} columns, which are no whole blocks of {size}; cut or pad the texts")
    plan, layout = make_plan(config, call, key=None, rsp_valid=None)
    mixer = make_mixer(config.mixing, shape_of(config))
    weights = {field.name: params["layers"].get(field.name) for field in dataclasses.fields(LayerParams)}
    params = {**params, "layers": LayerParams(**weights)}
    layers, final = stack_layers(config, mixer, params), params.get("mixing", {}).get("final", {})

    def body(plan, carries, xs, depths):
        one, before = xs
        held = _weights(config, mixer, one.params, one.inputs, before, carries["tokens"], plan, depths)
        carries, after, _, slots = layer(config, mixer, one.params, carries, before, one.inputs, plan, depths)
        return carries, slots, (after, held)

    def step(before, block):
        x, plan = block
        _, (after, held) = through_layers(config, mixer, layers, final, body, {"tokens": x}, before, plan)
        return after, held

    x = embed_blocks(config, params, call.tokens, layout)
    last, held = jax.lax.scan(step, call.state.layers, (jnp.moveaxis(x, 1, 0)[:, :, None], plan.per_block()))
    held = {name: jnp.moveaxis(array[:, :, :, 0], 0, 2) for name, array in held.items()}  # [n, l, b, 1, ...]
    fam = jnp.concatenate([held.pop("fam"), last.fam[:, :, None]], axis=2)
    return AttentionMaps(**held, fam=fam)


def _weights(
    config: DecoderConfig,
    mixer: Mixer,
    params: LayerParams,
    inputs: FamInputs,
    memory: LayerMemory,
    carry: Array,
    plan: Plan,
    depths: dict[str, Depth],
) -> dict[str, Array]:
    """The fields of AttentionMaps for one layer and one block, as [b, 1, ...]; the FAM as it enters.

    The arguments are those of `fam_jax.layer.layer`.
    """
    settings = config.memory
    assert settings is not None
    assert inputs.prompt is not None
    turns, fresh = frequencies(config, params.local), plan.fresh
    depth, fam_depth = (depths.get(name, NO_DEPTH) for name in ("tokens", "fam"))
    x, _ = mixer.enter(params.mixing, carry, depth, 0)
    q, k, v, _ = project(config, mixer, params, x, depth)
    q, blocks, _, _ = seen_blocks(config, params, memory, q, k, v, plan)

    rows_mixer = mixer if mixer.mixes_rows else Mixer(None, mixer.shape)
    fam = jnp.where(fresh[..., None, None], inputs.prompt, memory.fam[:, None])
    fam_q, fam_k, fam_v, _ = project(config, rows_mixer, params, fam, fam_depth)
    own = Source(rotate(fam_k, key_positions(settings, plan.position, fresh), turns), fam_v)
    fams = [own]
    if memory.fam_k is not None and memory.fam_v is not None:
        every_k = jnp.concatenate([memory.fam_k, fam_k], axis=1)
        every_v = jnp.concatenate([memory.fam_v, fam_v], axis=1)
        fams += earlier(config, turns, every_k, every_v, plan)
    if inputs.active is not None:
        seen = jnp.broadcast_to(inputs.active, (1, 1, 1, 1))
        fams = [one._replace(mask=seen if one.mask is None else one.mask & seen) for one in fams]

    def weigh(q: Array, sources: list[Source]) -> Array:
        found = attention_weights(q, sources, config.attention_softcap)
        return found.reshape(*found.shape[:2], -1, *found.shape[4:])  # [b, 1, h, rows, keys]

    def in_parts(found: Array, *parts: int) -> Array:
        """Keys of sources one after another, the latest first, as [..., parts, keys], the oldest first."""
        return jnp.flip(found.reshape(*found.shape[:-1], *parts), axis=-2)

    size, past = settings.block_size, config.segments * settings.block_size
    of_tokens = weigh(q, [*blocks, *fams])
    fam_q = rotate(fam_q, query_positions(settings, plan.position, fresh), turns)
    of_rows = weigh(fam_q, [own, blocks[0]._replace(mask=None)])
    if inputs.active is not None:
        of_rows = jnp.where(inputs.active, of_rows, jnp.nan)
    return {
        "token_block": of_tokens[..., :size],
        "token_past": in_parts(of_tokens[..., size : size + past], config.segments, size),
        "token_fam": in_parts(of_tokens[..., size + past :], len(fams), settings.fam_length),
        "fam_fam": of_rows[..., : settings.fam_length],
        "fam_block": of_rows[..., settings.fam_length :],
        "fam": fam,
    }

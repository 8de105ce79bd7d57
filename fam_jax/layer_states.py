"""What every layer of the decoder holds: hidden states and values, for analysis.

The decoder itself keeps none of it. `layer_states` runs the same layers, by the same functions, and hands out what
goes by.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fam_jax.call import check_call
from fam_jax.config import DecoderConfig
from fam_jax.embedding import embed_blocks, read_out
from fam_jax.layer import layer
from fam_jax.plan import make_plan
from fam_jax.schedules import stack_layers, through_layers
from fam_jax.sublayers import LayerParams, project
from lime_jax import Mixer, make_mixer
from lime_jax.depth import NO_DEPTH
from lime_jax.mixer import shape_of


class LayerStates(NamedTuple):
    """States of all layers at every token; those of padding mean nothing.

    Attributes:
        hidden: What each layer's norm reads, which without mixing is the residual stream: the embeddings, the outputs
            of the layers before the last, and the input of the final norm: [l + 1, b, t, d].
        values: Values that each layer projects from its own input: [l, b, t, g, k].
        mixed: Values that its attention reads; the same without a mixer of values: [l, b, t, g, k].
        ff_inputs: What the feed-forward's mixer of "dynamic_views" reads: [l, b, t, d]. None with others, and in the
            parallel block, where it is `hidden`.
        logits: As the decoder's: [b, t, v].
    """

    hidden: Array
    values: Array
    mixed: Array
    ff_inputs: Array | None
    logits: Array


def layer_states(
    config: DecoderConfig, params: Any, tokens: ArrayLike, lengths: ArrayLike | None = None
) -> LayerStates:
    """Reads texts from their beginning and returns what all layers hold. A pure function.

    Args:
        config: The decoder's.
        params: Its parameters, the "params" of its variables.
        tokens: Ids: int32 [b, t].
        lengths: Real tokens of each row, the rest being padding on the right: int32 [b]. None: all.

    Raises:
        ValueError: See `Decoder.__call__`; or the memory is of a kind that has only the block schedule, which this does
            not follow.
    """
    if config.memory is not None and config.memory.block_schedule_only:
        raise ValueError(
            f"layer_states follows the layer schedule, which memory.kind={config.memory.kind!r} does not have; look "
            "at a model of kind 'fam' or 'summary'"
        )
    call = check_call(config, tokens, None, lengths, None, None, False)
    plan, layout = make_plan(config, call, key=None, rsp_valid=None)
    mixer = make_mixer(config.mixing, shape_of(config))
    plain = Mixer(None, mixer.shape)
    weights = {field.name: params["layers"].get(field.name) for field in dataclasses.fields(LayerParams)}
    params = {**params, "layers": LayerParams(**weights)}

    def body(plan, carries, xs, depths):
        one, memory = xs
        depth = depths.get("tokens", NO_DEPTH)
        x, _ = mixer.enter(one.params.mixing, carries["tokens"], depth, 0)
        held = {
            "hidden": x,
            "values": project(config, plain, one.params, x, NO_DEPTH)[2],
            "mixed": project(config, mixer, one.params, x, depth)[2],
        }
        carries, _, _, slots = layer(config, mixer, one.params, carries, memory, one.inputs, plan, depths)
        if mixer.mixes_ff and mixer.per_layer == 2:
            held["ff_inputs"] = slots["tokens"][1]
        return carries, slots, held

    last, held = through_layers(
        config,
        mixer,
        stack_layers(config, mixer, params),
        params.get("mixing", {}).get("final", {}),
        body,
        {"tokens": embed_blocks(config, params, call.tokens, layout)},
        call.state.layers,
        plan,
    )
    held["hidden"] = jnp.concatenate([held["hidden"], last["tokens"][None]])

    def flat(states: Array) -> Array:
        """[l, b, n, w, ...] as [l, b, t, ...]: rows begin a document, so their tokens stand in order."""
        return states.reshape(*states.shape[:2], -1, *states.shape[4:])[:, :, : call.tokens.shape[1]]

    held = {name: flat(states) for name, states in held.items()}
    logits = read_out(config, params, held["hidden"][-1])
    return LayerStates(**{"ff_inputs": None, **held}, logits=logits)

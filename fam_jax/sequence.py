"""Sequence parallelism: the blocks of a text spread over the `sequence` axis of the mesh, in the layer schedule.

Every device holds blocks that follow one another. What belongs to tokens alone needs no other device; memory segments
cross only at the edge between two devices; and the FAM goes from device to device in the order of the blocks, so that
each of its updates is computed once. While it is with one device the others wait for it, forwards and backwards.

    def run(...):                               # on this device's blocks
        blocks = before(segments, k)            # the segments that its first block sees
        fam, out = pass_along(scan, fam, ...)   # its turn of the FAM
        fam = from_last(fam)

    x, memory = over_blocks(run, ...)

Without such an axis, the functions below are those of one device that holds all blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from fam_jax.config import DecoderConfig
from fam_jax.plan import Plan
from fam_jax.remat import UPDATED
from fam_jax.state import LayerMemory
from lime_jax import Mixer
from lime_jax.stack import split_floating

AXIS = "sequence"


def check_sequence(config: DecoderConfig, time: int, windows: int) -> bool:
    """Whether a call runs on several devices along the text; calls shorter than a block are computed on each of them.

    Args:
        config: The decoder's.
        time: Tokens of the call.
        windows: Blocks that it is laid out in.

    Raises:
        ValueError: It should, but cannot.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape.get(AXIS, 1)
    if size == 1 or AXIS not in config.sharding.block:
        return False
    if config.memory is None:
        raise ValueError(
            f"the mesh has sequence={size}, but full attention (memory=None) has no blocks to spread over it; set "
            "sequence to 1, or give the model a memory"
        )
    block = config.memory.block_size
    if time < block:
        return False
    if config.schedule != "layer":
        raise ValueError(
            f"schedule={config.schedule!r} cannot be spread over the mesh's sequence={size}, as it does not have all "
            "blocks of a layer at once; set schedule to 'layer', or sequence to 1"
        )
    if windows % size:
        raise ValueError(
            f"{time} tokens, which touch {windows} blocks of {block}, cannot be spread over the mesh's "
            f"sequence={size}: the length must be a multiple of {size} x {block} = {size * block} tokens, from the "
            "start of a block on (aligned=True); change the length, or set sequence to 1"
        )
    return True


def over_blocks(
    run: Callable[..., Any],
    config: DecoderConfig,
    mixer: Mixer,
    layers: Any,
    final: Any,
    x: Array,
    memory: LayerMemory,
    plan: Plan,
) -> tuple[Array, LayerMemory, Array]:
    """`run` on every device with its blocks of `x` [b, n, ...] and of the plan, and with all of the rest.

    Args:
        run: The layer schedule: takes the arguments that follow, and returns (x, memory, kept), of which memory and
            kept are the same everywhere.
        config: The decoder's.
        mixer: The layer mixer.
        layers: Stacked over layers.
        final: What the mixer needs for the output of the last layer.
        x: Embedded tokens.
        memory: What earlier calls left, stacked over layers; only the first device is given the open block.
        plan: Bookkeeping of the blocks.
    """

    def local(layers, final, x, memory, plan):
        count = x.shape[1]
        plan = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number() * count, count, axis=leaf.ndim - 1), plan
        )
        open_k, open_v = (jnp.where(number() == 0, part, 0) for part in (memory.open_k, memory.open_v))
        return run(config, mixer, layers, final, x, memory._replace(open_k=open_k, open_v=open_v), plan)

    whole, blocks = PartitionSpec(), PartitionSpec(None, AXIS)
    return jax.shard_map(
        local,
        axis_names={AXIS},
        in_specs=(whole, whole, blocks, whole, whole),
        out_specs=(blocks, whole, whole),
        check_vma=False,
    )(layers, final, x, memory, plan)


def devices() -> int:
    """Devices that the blocks are spread over, here, inside of `over_blocks`; outside of it 1."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[AXIS] if types.get(AXIS) is AxisType.Manual else 1


def number() -> Array | int:
    """Number of this device along the text, from 0."""
    return jax.lax.axis_index(AXIS) if devices() > 1 else 0


def total(x: Any) -> Any:
    """Sum over the devices along the text."""
    return jax.lax.psum(x, AXIS) if devices() > 1 else x


def from_last(x: Array) -> Array:
    """What the device with the last blocks has, on all."""
    return total(jnp.where(number() == devices() - 1, x, 0)) if devices() > 1 else x


def before(segments: Array, blocks: Array) -> Array:
    """The m blocks before the first one of this device.

    Args:
        segments: Those before the call: [b, m, ...].
        blocks: Of this device: [b, n, ...].

    Returns:
        [b, m, ...]. If m is more than n, they come from several devices.
    """
    size, count, own = devices(), segments.shape[1], blocks.shape[1]
    if size == 1 or not count:
        return segments
    empty = jnp.zeros_like(segments)
    start = jnp.minimum(number() * own, count)
    # What is left of the segments before the call, then zeros, where the blocks of other devices come.
    older = jax.lax.dynamic_slice_in_dim(jnp.concatenate([segments, empty], axis=1), start, count, axis=1)
    received: list[Array] = []
    for hop in range(1, -(-count // own) + 1):
        part = blocks[:, max(0, own - (count - (hop - 1) * own)) :]
        pairs = [(source, source + hop) for source in range(size - hop)]
        received.insert(0, jax.lax.ppermute(part, AXIS, pairs) if pairs else jnp.zeros_like(part))
    return older + jnp.concatenate(received, axis=1)


def pass_along(run: Callable[[Array, Any], tuple[Array, Any]], carry: Array, operands: Any) -> tuple[Array, Any]:
    """`run` on every device in turn, each beginning with the carry that the one before it ended with.

    Args:
        run: (carry, operands) -> (carry, out), of this device. It must not close over traced arrays.
        carry: What the first device begins with.
        operands: Any arrays; of this device.

    Returns:
        What this device's carry ended with, and its out.
    """
    size = devices()
    if size == 1:
        return run(carry, operands)
    diff, rest, join = split_floating(operands)

    def turns(order: Any, move: int, state: Any, turn: Callable[[Any], Any]) -> Any:
        """`turn` of the state (passed, kept) at each device; then `passed` goes to the next in line."""
        pairs = [(source, source + move) for source in range(size) if 0 <= source + move < size]

        def stage(state, whose):
            passed, kept = jax.lax.cond(whose == number(), turn, lambda state: state, state)
            return (jax.lax.ppermute(passed, AXIS, pairs), kept), None

        return jax.lax.scan(stage, state, order)[0][1]

    def forward(carry, diff, rest):
        operands = join(diff, rest)

        def turn(state):
            entered, _ = state
            left, out = run(entered, operands)
            return left, (entered, left, out)

        shapes = jax.eval_shape(run, carry, operands)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (carry, *shapes))
        entered, left, out = turns(jnp.arange(size), 1, (carry, nothing), turn)
        return (left, out), entered

    @jax.custom_vjp
    def call(carry, diff, rest):
        return forward(carry, diff, rest)[0]

    def call_forward(carry, diff, rest):
        # Named, so that a layer that is computed again need not go through all turns again.
        result, entered = jax.tree.map(lambda x: checkpoint_name(x, UPDATED), forward(carry, diff, rest))
        return result, (entered, diff, rest)

    def call_backward(saved, cotangents):
        entered, diff, rest = saved
        # All devices know what theirs began with: they recompute at the same time, and only the way back is in turns.
        _, pull = jax.vjp(lambda carry, diff: run(carry, join(diff, rest)), entered, diff)
        d_left, d_out = cotangents

        def turn(state):
            d_next, _ = state
            d_carry, d_diff = pull((d_left + d_next, d_out))
            return d_carry, (d_carry, d_diff)

        nothing = jax.tree.map(jnp.zeros_like, (entered, diff))
        d_carry, d_diff = turns(jnp.arange(size)[::-1], -1, (jnp.zeros_like(entered), nothing), turn)
        return jnp.where(number() == 0, d_carry, 0), d_diff, None

    call.defvjp(call_forward, call_backward)
    return call(carry, diff, rest)

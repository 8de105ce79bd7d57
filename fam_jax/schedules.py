"""The three schedules, which compute the same function.

Layer l at block t needs layer l - 1 at block t, and what layer l kept of block t - 1. The layer schedule takes all
blocks of a layer before the next layer; the block schedule all layers of a block before the next block; the wavefront
schedule takes all (l, t) of one diagonal l + t at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fam_jax import lora, rivals
from fam_jax.config import DecoderConfig
from fam_jax.fam import FamInputs, climb
from fam_jax.layer import end_block, layer
from fam_jax.plan import Plan
from fam_jax.remat import POLICIES, recompute
from fam_jax.sharding import constrain, gather, gathers
from fam_jax.state import LayerMemory, RSPState
from fam_jax.sublayers import LayerParams, cast
from lime_jax import Mixer, run_layers
from lime_jax.depth import NO_DEPTH, Depth


class Layers(NamedTuple):
    """Everything that differs from layer to layer, stacked, and the learned prompt, if it has yet to climb them.

    Without a FAM, `inputs` is None, and so is the prompt [f, d], but for RMT and AutoCompressors, whose rows it is.
    """

    params: LayerParams
    inputs: FamInputs | None
    prompt: Array | None


def stack_layers(
    config: DecoderConfig,
    mixer: Mixer,
    params: dict[str, Any],
    key: Array | None = None,
    rsp: RSPState | None = None,
) -> Layers:
    """What the layers of a call compute with, in its precision: weights, and what their FAM starts from.

    Args:
        config: The decoder's.
        mixer: The layer mixer.
        params: The decoder's, its layers as `LayerParams`.
        key: For FAM noise and LoRA's dropout; None for none.
        rsp: The stored state of Random State Passing.
    """
    dtype = jnp.dtype(config.dtype)
    weights = cast(params["layers"], dtype)
    mixing = params.get("mixing", {}).get("layers", {})
    factors = params.get("lora", {}).get("layers", {})
    factors = lora.effective(config, factors, None if key is None else jax.random.fold_in(key, 3))
    local = None if config.local_window is None else jnp.asarray(config.is_local)
    weights = dataclasses.replace(weights, mixing=mixer.effective(mixing), lora=factors, local=local)
    prompt = None
    if "fam_prompt" in params:
        prompt = constrain(config.sharding, params["fam_prompt"].astype(dtype), None, None)
    if not config.fam_length:
        return Layers(weights, None, prompt)
    assert config.memory is not None
    stored = None if rsp is None else jax.lax.stop_gradient(rsp.fam).astype(dtype)
    noise_keys = None
    if key is not None and config.memory.noise > 0:
        noise_key = jax.random.fold_in(key, 2)
        noise_keys = jax.vmap(lambda number: jax.random.fold_in(noise_key, number))(jnp.arange(config.num_layers))
    prefix = None
    if prompt is None:
        prefix = constrain(config.sharding, params["fam_prefix"].astype(dtype), None, None, None)
    active = None
    if config.memory.layers is not None:
        active = jnp.asarray([number in config.memory.layers for number in range(config.num_layers)])
    return Layers(weights, FamInputs(prefix, stored, noise_keys, active), prompt)


def layer_schedule(
    config: DecoderConfig,
    mixer: Mixer,
    layers: Layers,
    final: dict[str, Array],
    x: Array,
    memory: LayerMemory,
    plan: Plan,
) -> tuple[Array, LayerMemory, Array]:
    """Layer after layer, each over all blocks.

    Args:
        config: The decoder's.
        mixer: The layer mixer.
        layers: Stacked over layers.
        final: What the mixer needs for the output of the last layer.
        x: Embedded tokens [b, n, w, d].
        memory: Stacked over layers.
        plan: Bookkeeping of the blocks.

    Returns:
        Output of the last layer [b, n, w, d], memory, and the FAM to store [l, f, d].
    """
    short, start, summaries = plan.slot is not None, {"tokens": x}, memory.summaries
    memory = memory._replace(summaries=None)
    # A short window leaves the segments as they are. Handed through a loop over layers, they might be copied.
    names = ["open_k", "open_v", "output_k", "output_v", "fam"] if short else list(LayerMemory._fields)
    changed = [name for name in names if getattr(memory, name) is not None]

    def body(plan, carries, xs, depths):
        one, before = xs
        carries, after, kept, slots = layer(config, mixer, one.params, carries, before, one.inputs, plan, depths)
        fam = jnp.stack(slots["fam"]) if short and "fam" in depths else None
        return carries, slots, ({name: getattr(after, name) for name in changed}, kept, fam)

    if summaries is not None and layers.prompt is not None:
        start |= rivals.begin_block(config, layers.prompt, summaries, plan)
    last, (left, kept, fam) = through_layers(config, mixer, layers, final, body, start, memory, plan)
    memory = memory._replace(**left)
    if short and config.memory is not None:
        memory, kept = jax.lax.cond(
            jnp.any(plan.complete),
            lambda memory: _end_block_of_all(config, mixer, layers, memory, fam, plan),
            lambda memory: (memory, kept),
            memory,
        )
    if summaries is not None:
        memory = memory._replace(summaries=rivals.end_block(summaries, last["write"], plan))
    return last["tokens"], memory, kept


_SIDE_BY_SIDE = 1024  # FAM rows of layers that are updated at once, so that what they take of memory has a limit


@jax.named_scope("layers")
def _end_block_of_all(
    config: DecoderConfig, mixer: Mixer, layers: Layers, memory: LayerMemory, fam: Array | None, plan: Plan
) -> tuple[LayerMemory, Array]:
    """What the end of a block does to the memory of all layers: `end_block` of several at a time.

    Args:
        config: The decoder's.
        mixer: The layer mixer.
        layers: Stacked over layers; the prompt of a FAM has climbed them.
        memory: Stacked over layers; no summaries.
        fam: Slots of all layers for FAM rows as they entered the block: [l, slots, b, 1, f, ...]; None if none.
        plan: Bookkeeping of the block.
    """
    assert fam is None or not mixer.first, "only layers write slots for FAM rows"
    bank = None if fam is None else fam.reshape(-1, *fam.shape[2:])

    def one(x):
        number, params, inputs, memory = x
        params, depth = gather(config.sharding, params), Depth(bank, number * mixer.per_layer, number)
        return end_block(config, mixer, params, memory, inputs, plan, depth)

    count, rows = config.num_layers, len(plan.complete) * max(config.fam_length, 1)
    # Where weights must be gathered, those of several layers at once may be more than a device holds.
    most = 1 if gathers(config.sharding) else max(1, _SIDE_BY_SIDE // rows)
    together = max(number for number in range(1, count + 1) if number <= most and count % number == 0)
    xs = jnp.arange(count), layers.params, layers.inputs, memory
    xs = jax.tree.map(lambda x: x.reshape(count // together, together, *x.shape[1:]), xs)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), jax.lax.map(jax.vmap(one), xs))


def through_layers(
    config: DecoderConfig,
    mixer: Mixer,
    layers: Layers,
    final: dict[str, Array],
    body: Callable[..., Any],
    start: dict[str, Array],
    memory: LayerMemory,
    plan: Plan,
) -> tuple[dict[str, Array], Any]:
    """Tokens, and rows beside them, through all layers, `body` being one of them (see `lime_jax.run_layers`).

    The prompt of a FAM climbs along with them, so that each layer's weights are gathered, and their gradients summed,
    once.

    Returns:
        Output of the last layer at each of `start`, for tokens [b, n, w, d], and what the layers kept, stacked.
    """
    names = tuple(start)
    if layers.prompt is not None and layers.inputs is not None:
        start = start | {"prompt": layers.prompt}
    rows = {name: embedded.shape[:-1] for name, embedded in start.items()}
    if config.fam_length and mixer.mixes_rows:
        rows["fam"] = (*start["tokens"].shape[:2], config.fam_length)

    def step(plan, carries, xs, depths):
        (params, inputs, _), one_memory = xs
        params = gather(config.sharding, params)
        slots = {}
        if "prompt" in carries:
            prompt, entering, depth = climb(config, mixer, params, carries["prompt"], depths.get("prompt", NO_DEPTH))
            carries, slots = carries | {"prompt": prompt}, {"prompt": depth.own}
            inputs = inputs._replace(prompt=entering)
        own = {name: carries[name] for name in names}
        own, more, kept = body(plan, own, (Layers(params, inputs, None), one_memory), depths)
        return carries | own, {name: (slots | more)[name] for name in rows}, kept

    carries, xs = jax.tree.map(mixer.open, start), (layers._replace(prompt=None), memory)
    carries, banks, kept = _run_layers(config, mixer, layers.params.mixing, step, plan, carries, xs, rows, start)
    return {name: mixer.close(final, carries[name], banks.get(name)) for name in names}, kept


def _run_layers(
    config: DecoderConfig,
    mixer: Mixer,
    mixing: Any,
    body: Callable[..., Any],
    consts: Any,
    carry: Any,
    xs: Any,
    rows: dict[str, tuple[int, ...]],
    start: dict[str, Array],
) -> tuple[Any, Any, Any]:
    """`run_layers` as the config says, with banks for the rows of the given shapes.

    Args:
        config: The decoder's.
        mixer: The layer mixer.
        mixing: Its parameters, stacked over layers.
        body: One layer, see `run_layers`.
        consts: What all layers share.
        carry: What goes into the first layer.
        xs: What each layer has of its own.
        rows: Shapes of the rows, by name of the bank.
        start: Embedded rows [..., d], by name of the bank.
    """
    banks = {}
    if mixer.per_layer:
        banks = {name: mixer.bank(shape, config.dtype) for name, shape in rows.items()}
        axes = ("batch", "block", None, *[None] * len(mixer.slot_shape))
        banks |= {name: constrain(config.sharding, banks[name], *axes) for name in banks if name != "prompt"}
        if mixer.first:  # the embeddings have a slot of their own
            banks = {name: bank.at[0].set(start[name]) for name, bank in banks.items()}
    return run_layers(
        mixer,
        body,
        consts,
        carry,
        xs,
        banks,
        mixer.columns(mixing) if banks and mixer.backward in ("push", "pull") else None,
        scan=config.scan_layers,
        remat=config.remat != "none",
        policy=POLICIES[config.remat],
        # In the same order in every process of a job: all must compile the same program.
        rebuild=tuple(name for name in ("tokens", "prompt") if name in rows) if mixer.from_input else (),
    )


def block_schedule(
    config: DecoderConfig,
    mixer: Mixer,
    layers: Layers,
    final: dict[str, Array],
    x: Array,
    memory: LayerMemory,
    plan: Plan,
) -> tuple[Array, LayerMemory, Array]:
    """Block after block, each through all layers. Arguments and results are those of `layer_schedule`."""
    short = plan.slot is not None
    layers = _climb_all(config, mixer, layers, plan)

    def run(x, memory, plan):
        return layer_schedule(config, mixer, layers, final, x, memory, plan)

    def skip(x, memory, plan):
        return x, memory, jnp.zeros((config.num_layers, config.fam_length, config.d_model), x.dtype)

    def step(carry, block):
        memory, kept = carry
        x, plan = block
        if short:  # a short call seldom runs over a block's end
            touched = jnp.any((plan.end > plan.first) | plan.passed)
            x, memory, new = jax.lax.cond(touched, run, skip, x, memory, plan)
        else:
            x, memory, new = run(x, memory, plan)
        return (memory, jnp.where(plan.store[0], new, kept)), x

    kept = jnp.zeros((config.num_layers, config.fam_length, config.d_model), x.dtype)
    blocks = (jnp.moveaxis(x, 1, 0)[:, :, None], plan.per_block())
    (memory, kept), x = jax.lax.scan(recompute(config.remat, step), (memory, kept), blocks)
    return jnp.moveaxis(x[:, :, 0], 0, 1), memory, kept


def wavefront_schedule(
    config: DecoderConfig,
    mixer: Mixer,
    layers: Layers,
    final: dict[str, Array],
    x: Array,
    memory: LayerMemory,
    plan: Plan,
) -> tuple[Array, LayerMemory, Array]:
    """Diagonal after diagonal: layer l reads block d - l, all layers side by side as one batch.

    Of l layers and n blocks, n + l - 1 steps in sequence in place of the n * l updates of the layer schedule, at the
    price of l * (l - 1) idle places at the two ends. What layers let later ones read travels along with its block, so
    that there are l banks; a backward pass keeps those of every step. Arguments and results are those of
    `layer_schedule`.
    """
    layers, count = _climb_all(config, mixer, layers, plan), config.num_layers
    layers = layers._replace(params=gather(config.sharding, layers.params))  # all are used at every diagonal
    blocks, plans = jnp.moveaxis(x, 1, 0)[:, :, None], plan.per_block()
    last = len(blocks) - 1
    rows = {"tokens": blocks.shape[1:-1]} if mixer.per_layer else {}
    if config.fam_length and mixer.mixes_rows:
        rows["fam"] = (*rows["tokens"][:2], config.fam_length)

    def one(number, layers, carry, banks, memory, plan, active):
        live = mixer.first + number * mixer.per_layer
        depths = {name: Depth(bank, live, number) for name, bank in banks.items()}
        carries, after, kept, slots = layer(
            config, mixer, layers.params, {"tokens": carry}, memory, layers.inputs, plan, depths
        )
        memory = jax.tree.map(lambda new, old: jnp.where(active, new, old), after, memory)
        banks = {
            name: jax.lax.dynamic_update_slice_in_dim(bank, jnp.stack(slots[name]), live, 0)
            for name, bank in banks.items()
        }
        return carries["tokens"], banks, memory, kept

    def step(carry, diagonal):
        entering, banks, memory, kept = carry
        block = blocks[jnp.minimum(diagonal, last)]
        entering = entering.at[0].set(mixer.open(block))
        if mixer.first:  # the embeddings have a slot of their own
            banks = banks | {"tokens": banks["tokens"].at[0, 0].set(block)}
        numbers = jnp.arange(count)
        number = diagonal - numbers
        active = (number >= 0) & (number <= last)
        here = jax.tree.map(lambda leaf: leaf[jnp.clip(number, 0, last)], plans)
        left, banks, memory, new = jax.vmap(one)(numbers, layers, entering, banks, memory, here, active)
        out = mixer.close(final, left[-1], banks["tokens"][-1] if banks else None)
        kept = jnp.where((active & here.store[:, 0])[:, None, None], new, kept)
        left = moved(left, 1)
        banks = {name: moved(bank, 2).at[0].set(0) for name, bank in banks.items()}
        return (left, banks, memory, kept), out

    def moved(x, batch):
        """To the next layer: x [l, ...], whose axis `batch` is that of the rows."""
        return constrain(config.sharding, jnp.roll(x, 1, axis=0), "batch", *[None] * (x.ndim - batch - 1))

    # Idle places at the beginning read the first block, so that their numbers, which nothing uses, are finite.
    entering, banks = jax.tree.map(
        lambda one: jnp.broadcast_to(one, (count, *one.shape)),
        (mixer.open(blocks[0]), {name: mixer.bank(shape, config.dtype) for name, shape in rows.items()}),
    )
    kept = jnp.zeros((count, config.fam_length, config.d_model), x.dtype)
    start, diagonals = (entering, banks, memory, kept), jnp.arange(last + count)
    (_, _, memory, kept), out = jax.lax.scan(recompute(config.remat, step), start, diagonals)
    return jnp.moveaxis(out[count - 1 :, :, 0], 0, 1), memory, kept


def _climb_all(config: DecoderConfig, mixer: Mixer, layers: Layers, plan: Plan) -> Layers:
    """With the prompt as it arrives at each layer, [l, f, d] (appendix B.1), before there are tokens."""
    if layers.prompt is None or layers.inputs is None:
        return layers
    start = {"prompt": layers.prompt}

    def body(_, carry, one, depths):
        carry, rows, depth = climb(config, mixer, gather(config.sharding, one), carry, depths.get("prompt", NO_DEPTH))
        return carry, {"prompt": depth.own}, rows

    def compute():
        rows, carry, mixing = {"prompt": start["prompt"].shape[:1]}, mixer.open(start["prompt"]), layers.params.mixing
        return _run_layers(config, mixer, mixing, body, None, carry, layers.params, rows, start)[2]

    if plan.slot is None:
        prompts = compute()
    else:  # decoding token by token reads the prompt in a first block only, but for static summary queries
        nothing = jnp.zeros((config.num_layers, *layers.prompt.shape), layers.prompt.dtype)
        static = config.memory is not None and config.memory.kind == "summary"
        read = plan.fresh | plan.complete if static else plan.fresh
        prompts = jax.lax.cond(jnp.any(read), compute, lambda: nothing)
    return Layers(layers.params, layers.inputs._replace(prompt=prompts), None)

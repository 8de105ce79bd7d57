"""The decoder: parameters, the two schedules, and the streaming interface."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from fam_jax import state as state_lib
from fam_jax.call import check_call, check_targets
from fam_jax.config import DecoderConfig
from fam_jax.embedding import embed_blocks, read_losses, read_out
from fam_jax.fam import FamInputs, climb
from fam_jax.layer import layer
from fam_jax.loss import TokenLosses
from fam_jax.ops import accumulation_dtype
from fam_jax.plan import Plan, make_plan
from fam_jax.remat import POLICIES, recompute
from fam_jax.sequence import check_sequence, over_blocks
from fam_jax.sharding import constrain, gather
from fam_jax.state import LayerMemory, RSPState, StreamState
from fam_jax.sublayers import LayerParams, LayerStack, cast
from lime_jax import Mixer, make_mixer, run_layers
from lime_jax.depth import NO_DEPTH
from lime_jax.mixer import shape_of


@struct.dataclass
class DecoderOutput:
    """What a call returns.

    Attributes:
        logits: Float32 (float64 if the model computes in it) [b, t, v]. Those of padding mean nothing. None if the
            call was given targets.
        state: To pass to the next call, which then continues exactly here.
        rsp: The FAM to store for the next training step; None if the call was given none.
        losses: Of each target, arrays [b, t]; None if the call was given none.
    """

    logits: Array | None
    state: StreamState
    rsp: RSPState | None
    losses: TokenLosses | None = None


class Layers(NamedTuple):
    """Everything that differs from layer to layer, stacked, and the learned prompt, if it has yet to climb them.

    Without a FAM, `inputs` and `prompt` [f, d] are None.
    """

    params: LayerParams
    inputs: FamInputs | None
    prompt: Array | None


class Decoder(nn.Module):
    """PaLM-style decoder: full attention, BSWA or FAM along time, and any mixing of layers along depth.

    Parameters are stacked over layers, whether layers are scanned or not and in either schedule, so checkpoints
    are interchangeable.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        state: StreamState | None = None,
        *,
        lengths: Array | None = None,
        reset: Array | None = None,
        padded: Array | None = None,
        key: Array | None = None,
        rsp: RSPState | None = None,
        aligned: bool = False,
        targets: Array | None = None,
    ) -> DecoderOutput:
        """Reads tokens and predicts the one after each.

        Args:
            tokens: Ids: int32 [b, t], any t. Check on the host that they are below `vocab_size`; on a device an
                id outside it cannot raise.
            state: Where an earlier call stopped. None: every row starts a document.
            lengths: Real tokens of each row, the rest being padding on the right: int32 [b]. None: all. Inside
                `jax.jit`, where values cannot be checked, what is outside 0..t counts as 0 or t.
            reset: The row starts a new document at this block of the call, block 0 being its open block, whose
                tokens a reset drops: bool [b, ceil(t / block)]. None: nowhere.
            padded: The block ends in padding that `lengths` does not tell of, because a document ended there:
                bool [b, ceil(t / block)]. Random State Passing does not store it.
            key: A random key turns on the randomness of training: FAM noise, Random State Passing and Random
                Position Offset. None: evaluation.
            rsp: The stored state of Random State Passing.
            aligned: The caller promises that no row has tokens in its open block, which saves the work of the
                block that ragged offsets may need more. True anyway without a state.
            targets: The token after each, int32 [b, t]: its loss is returned instead of the logits, which are
                then never there all at once (see `fam_jax.loss`).

        Returns:
            Logits or losses, the new state, and the FAM to store. During `init`, which only declares parameters,
            logits of zeros.

        Raises:
            ValueError: An argument has a wrong type or shape, or a full-attention cache is too small. Inside
                `jax.jit`, where the number of tokens read is not known, a row that overflows its cache
                gets NaN logits instead.
        """
        config = self.config
        params = self._params()
        call = check_call(config, tokens, state, lengths, reset, padded, aligned)
        batch, time = call.tokens.shape
        if targets is not None:
            targets = check_targets(config, call, targets)
        if self.is_initializing():  # the parameters are declared; reading the tokens would only cost time
            logits = jnp.zeros((batch, time, config.vocab_size), accumulation_dtype(jnp.dtype(config.dtype)))
            return DecoderOutput(logits=logits, state=call.state, rsp=rsp)
        if rsp is not None:
            state_lib.check_rsp(config, rsp)

        plan, layout = make_plan(config, call, key=key, rsp_valid=None if rsp is None else rsp.valid)
        spread = check_sequence(config, time, len(plan.index))
        mixer = make_mixer(config.mixing, shape_of(config))
        layers = stack_layers(config, mixer, params, key=key, rsp=rsp)
        x = embed_blocks(config, params, call.tokens, layout)
        # Windows shorter than a block are at most two: the block schedule's loop, which can skip one.
        schedule = _layer_schedule if config.schedule == "layer" and plan.slot is None else _block_schedule
        run = partial(over_blocks, schedule) if spread else schedule
        final = params.get("mixing", {}).get("final", {})
        x, memory, kept = run(config, mixer, layers, final, x, call.state.layers, plan)

        x = x.reshape(batch, -1, config.d_model)
        x = x[:, :time] if layout.target is None else jnp.take_along_axis(x, layout.target[:, :time, None], axis=1)
        x = jnp.where(layout.overflow[:, None, None], jnp.nan, x)
        return DecoderOutput(
            logits=read_out(config, params, x) if targets is None else None,
            losses=None if targets is None else read_losses(config, params, x, targets),
            state=dataclasses.replace(call.state, **memory._asdict(), **layout.counters),
            rsp=None if rsp is None else _store(rsp, kept, plan),
        )

    def init_state(self, batch: int, max_length: int | None = None) -> StreamState:
        """State of `batch` rows that have read nothing; see `fam_jax.state.init_state`."""
        return state_lib.init_state(self.config, batch, max_length)

    def _params(self) -> dict[str, Any]:
        """Declares the parameters.

        As in PaLM, embeddings start with variance 1, so that the residual stream carries the token through the first
        layers, and tied output logits with variance 1: the final norm starts at 1 / sqrt(d) for that.
        Matrices have variance 1 / inputs, those that write to the residual stream 1 / (2 layers) of it, so that the
        stream does not grow with depth.
        """
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        rows = nn.initializers.normal(1.0)
        params: dict[str, Any] = {"embed": self.param("embed", rows, (c.vocab_size, c.d_model), dtype)}
        if not c.tie_embeddings:
            initializer = nn.initializers.normal(c.d_model**-0.5)
            params["unembed"] = self.param("unembed", initializer, (c.d_model, c.vocab_size), dtype)
        if c.fam_length:
            params["fam_prompt"] = self.param("fam_prompt", rows, (c.fam_length, c.d_model), dtype)
        final_scale = nn.initializers.constant(c.d_model**-0.5 if c.tie_embeddings else 1.0)
        params["final_norm"] = self.param("final_norm", final_scale, (c.d_model,), dtype)
        params["layers"] = LayerStack(c, name="layers")()
        mixer = make_mixer(c.mixing, shape_of(c))
        if jax.eval_shape(lambda: mixer.init(jax.random.key(0), dtype)):
            params["mixing"] = self.param("mixing", mixer.init, dtype)
        return params


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
        key: For FAM noise; None for none.
        rsp: The stored state of Random State Passing.
    """
    dtype = jnp.dtype(config.dtype)
    weights = cast(params["layers"], dtype)
    mixing = params.get("mixing", {}).get("layers", {})
    local = None if config.local_window is None else jnp.asarray(config.is_local)
    weights = dataclasses.replace(weights, mixing=mixer.effective(mixing), local=local)
    if not config.fam_length:
        return Layers(weights, None, None)
    stored = None if rsp is None else jax.lax.stop_gradient(rsp.fam).astype(dtype)
    noise_keys = None
    if key is not None and config.memory is not None and config.memory.noise > 0:
        noise_key = jax.random.fold_in(key, 2)
        noise_keys = jax.vmap(lambda number: jax.random.fold_in(noise_key, number))(jnp.arange(config.num_layers))
    prompt = constrain(config.sharding, params["fam_prompt"].astype(dtype), None, None)
    return Layers(weights, FamInputs(None, stored, noise_keys), prompt)


def _layer_schedule(
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

    def body(plan, carry, xs, depths):
        one, one_memory = xs
        carry, one_memory, kept, slots = layer(config, mixer, one.params, carry, one_memory, one.inputs, plan, depths)
        return carry, slots, (one_memory, kept)

    x, (memory, kept) = through_layers(config, mixer, layers, final, body, x, memory, plan)
    return x, memory, kept


def through_layers(
    config: DecoderConfig,
    mixer: Mixer,
    layers: Layers,
    final: dict[str, Array],
    body: Callable[..., Any],
    x: Array,
    memory: LayerMemory,
    plan: Plan,
) -> tuple[Array, Any]:
    """Tokens through all layers, `body` being one of them (see `lime_jax.run_layers`).

    The prompt climbs along with them, so that each layer's weights are gathered, and their gradients summed, once.

    Returns:
        Output of the last layer [b, n, w, d], and what the layers kept, stacked.
    """
    start = {"tokens": x} if layers.prompt is None else {"tokens": x, "prompt": layers.prompt}
    rows = {name: embedded.shape[:-1] for name, embedded in start.items()}
    if config.fam_length and mixer.mixes_rows:
        rows["fam"] = (*x.shape[:2], config.fam_length)

    def step(plan, carries, xs, depths):
        (params, inputs, _), one_memory = xs
        params = gather(config.sharding, params)
        slots = {}
        if "prompt" in carries:
            prompt, entering, depth = climb(config, mixer, params, carries["prompt"], depths.get("prompt", NO_DEPTH))
            carries, slots = carries | {"prompt": prompt}, {"prompt": depth.own}
            inputs = inputs._replace(prompt=entering)
        carry, more, kept = body(plan, carries["tokens"], (Layers(params, inputs, None), one_memory), depths)
        return carries | {"tokens": carry}, slots | more, kept

    carries, xs = jax.tree.map(mixer.open, start), (layers._replace(prompt=None), memory)
    carries, banks, kept = _run_layers(config, mixer, layers.params.mixing, step, plan, carries, xs, rows, start)
    return mixer.close(final, carries["tokens"], banks.get("tokens")), kept


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
        mixer.columns(mixing) if banks and mixer.backward == "push" else None,
        scan=config.scan_layers,
        remat=config.remat != "none",
        policy=POLICIES[config.remat],
        # In the same order in every process of a job: all must compile the same program.
        rebuild=tuple(name for name in ("tokens", "prompt") if name in rows) if mixer.from_input else (),
    )


def _block_schedule(
    config: DecoderConfig,
    mixer: Mixer,
    layers: Layers,
    final: dict[str, Array],
    x: Array,
    memory: LayerMemory,
    plan: Plan,
) -> tuple[Array, LayerMemory, Array]:
    """Block after block, each through all layers. Arguments and results are those of `_layer_schedule`."""
    short = plan.slot is not None
    layers = _climb_all(config, mixer, layers, plan)

    def run(x, memory, plan):
        return _layer_schedule(config, mixer, layers, final, x, memory, plan)

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
    else:  # decoding token by token reads the prompt in a document's first block only
        nothing = jnp.zeros((config.num_layers, *layers.prompt.shape), layers.prompt.dtype)
        prompts = jax.lax.cond(jnp.any(plan.fresh), compute, lambda: nothing)
    return Layers(layers.params, layers.inputs._replace(prompt=prompts), None)


def _store(rsp: RSPState, kept: Array, plan: Plan) -> RSPState:
    """The stored state after the call: row 0's last complete block, if there was one."""
    found = jnp.any(plan.store)
    fam = jnp.where(found, kept.astype(rsp.fam.dtype), rsp.fam)
    return RSPState(fam=fam, valid=rsp.valid | found)

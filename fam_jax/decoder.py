"""The decoder: parameters, the schedules, and the streaming interface."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from fam_jax import lora, rivals
from fam_jax import state as state_lib
from fam_jax.call import check_call, check_targets
from fam_jax.config import DecoderConfig
from fam_jax.embedding import embed_blocks, read_losses, read_out
from fam_jax.loss import TokenLosses
from fam_jax.ops import accumulation_dtype
from fam_jax.plan import Plan, make_plan
from fam_jax.schedules import block_schedule, layer_schedule, stack_layers, wavefront_schedule
from fam_jax.sequence import check_sequence, over_blocks
from fam_jax.state import RSPState, StreamState
from fam_jax.sublayers import LayerStack
from lime_jax import make_mixer
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


class Decoder(nn.Module):
    """PaLM-style decoder: full attention, BSWA or FAM along time, and any mixing of layers along depth.

    Parameters are stacked over layers, whether layers are scanned or not and in whichever schedule, so checkpoints
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
            key: A random key turns on the randomness of training: FAM noise, Random State Passing, Random
                Position Offset and LoRA's dropout. None: evaluation.
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
        if plan.slot is not None:  # windows shorter than a block are at most two: the loop that can skip one
            schedule = block_schedule
        elif config.schedule == "wavefront" and len(plan.index) > 1:  # one block has a diagonal to itself
            schedule = wavefront_schedule
        else:
            schedule = block_schedule if config.schedule == "block" else layer_schedule
        run = partial(over_blocks, schedule) if spread else schedule
        final = params.get("mixing", {}).get("final", {})
        memory = call.state.layers if state is not None else rivals.without_missing(call.state.layers, len(plan.index))
        x, memory, kept = run(config, mixer, layers, final, x, memory, plan)
        memory = rivals.with_missing(config, memory)

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
        if c.memory is not None and c.memory.fam_length:
            shape = (c.memory.fam_length, c.d_model)
            if c.memory.fam_init == "prompt":
                params["fam_prompt"] = self.param("fam_prompt", rows, shape, dtype)
            else:
                params["fam_prefix"] = self.param("fam_prefix", rows, (c.num_layers, *shape), dtype)
        final_scale = nn.initializers.constant(c.d_model**-0.5 if c.tie_embeddings else 1.0)
        params["final_norm"] = self.param("final_norm", final_scale, (c.d_model,), dtype)
        params["layers"] = LayerStack(c, name="layers")()
        mixer = make_mixer(c.mixing, shape_of(c))
        if jax.eval_shape(lambda: mixer.init(jax.random.key(0), dtype)):
            params["mixing"] = self.param("mixing", mixer.init, dtype)
        if c.lora is not None:  # the last, so that all others begin as they do without
            params["lora"] = self.param("lora", partial(lora.init, c), dtype)
        return params


def _store(rsp: RSPState, kept: Array, plan: Plan) -> RSPState:
    """The stored state after the call: row 0's last complete block, if there was one."""
    found = jnp.any(plan.store)
    fam = jnp.where(found, kept.astype(rsp.fam.dtype), rsp.fam)
    return RSPState(fam=fam, valid=rsp.valid | found)

"""One training step and one evaluation step, as pure functions of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding

from experiments.config import TrainConfig
from fam_jax import Decoder, RSPState, StreamState, tree_shardings
from fam_jax.loss import TokenLosses
from fam_jax.sharding import fit


@struct.dataclass
class TrainState:
    """All that one training step hands to the next. Everything in it is in a checkpoint.

    Attributes:
        step: Updates made so far: int32 [].
        params: The decoder's parameters.
        opt_state: The optimiser's state.
        key: The run's random key; each step folds its number into it.
        stream: What each row has read, if rows carry their state from step to step, else None.
        rsp: The FAM kept by Random State Passing, else None.
    """

    step: Array
    params: Any
    opt_state: Any
    key: Array
    stream: StreamState | None
    rsp: RSPState | None


def create_state(config: TrainConfig, model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, a function of the config alone. Works under `jax.jit`."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    memory = config.model.memory
    tokens = jnp.zeros((1, memory.block_size if memory else 1), jnp.int32)
    params = model.init(init_key, tokens)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=key,
        stream=model.init_state(config.data.batch_size) if config.stream else None,
        rsp=RSPState.zeros(config.model) if memory and memory.rsp else None,
    )


def shard(config: TrainConfig, mesh: Mesh, state: TrainState) -> TrainState:
    """Shapes of a state, each with its place on the mesh."""
    places = tree_shardings(config.model.sharding, mesh, state, state.params)

    def one(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(one, state, places)


def shard_batch(config: TrainConfig, mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Array]:
    """A batch, its rows spread over the mesh."""

    def place(leaf: Any) -> Array:
        spec = config.model.sharding.spec("batch", *[None] * (leaf.ndim - 1))
        return jax.device_put(leaf, NamedSharding(mesh, fit(spec, leaf.shape, mesh)))

    return {name: place(leaf) for name, leaf in batch.items()}


def token_sums(losses: TokenLosses, weights: Array) -> dict[str, Array]:
    """Sums over a batch, which add up over batches; `means` turns them into metrics.

    Args:
        losses: Of the targets, arrays [b, t].
        weights: float32 [b, t]; 0 keeps a token out of every sum.

    Returns:
        float32 scalars: `weight`; weighted `nll`, squared log-partition `z2` and `right`, the targets that
        the argmax hits; and of the `rows` with any weight, the number in which the argmax hits all weighted
        targets, `exact`.
    """
    used = jnp.any(weights > 0, axis=-1)
    return {
        "weight": jnp.sum(weights),
        "nll": jnp.sum(weights * losses.nll),
        "z2": jnp.sum(weights * losses.log_z**2),
        "right": jnp.sum(weights * losses.hit),
        "rows": jnp.sum(used, dtype=jnp.float32),
        "exact": jnp.sum(used & jnp.all(losses.hit | (weights <= 0), axis=-1), dtype=jnp.float32),
    }


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics from sums, arrays or numbers: `loss` in nats per token, `accuracy`, `exact_match` and `z2`.

    Where nothing has weight they are zero, not undefined: a batch may hold nothing but padding.
    """
    weight = sums["weight"] + (sums["weight"] == 0)
    return {
        "loss": sums["nll"] / weight,
        "accuracy": sums["right"] / weight,
        "exact_match": sums["exact"] / (sums["rows"] + (sums["rows"] == 0)),
        "z2": sums["z2"] / weight,
    }


def _apply(model: Decoder, params: Any, batch: Mapping[str, Array], stream: StreamState | None, **kwargs: Any) -> Any:
    """The decoder on a batch: rows go on from `stream` if there is one, else each starts a document."""
    if stream is not None:
        # Rows are fed whole blocks only, so no block is ever open.
        kwargs |= {"state": stream, "reset": batch["reset"], "padded": batch["padded"], "aligned": True}
    return model.apply({"params": params}, batch["tokens"], targets=batch["targets"], **kwargs)


def make_train_step(
    config: TrainConfig,
    model: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    places: TrainState | None = None,
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, Array]]]:
    """The jitted training step.

    Args:
        config: The run's.
        model: The decoder.
        optimizer: The optimiser.
        schedule: The learning rate by step.
        places: Sharding of every part of the next state; None leaves that to XLA.

    Returns:
        A function (state, batch) -> (next state, metrics), which consumes the state that it is given. Metrics
        are float32 scalars: those of `means` before the update, `grad_norm` before clipping, the same per
        group of parameters (`grad_norm/fam_prompt` and so on, so that a memory without a gradient shows),
        `param_norm` after the update, and `learning_rate`.
    """

    def loss_fn(params: Any, state: TrainState, batch: Mapping[str, Array]) -> tuple[Array, Any]:
        key = jax.random.fold_in(state.key, state.step)
        out = _apply(model, params, batch, state.stream, key=key, rsp=state.rsp)
        metrics = means(token_sums(out.losses, batch["weights"]))
        z2 = metrics.pop("z2")
        if config.z_loss:
            metrics["z_loss"] = config.z_loss * z2
        return metrics["loss"] + metrics.get("z_loss", 0.0), (metrics, out)

    def train_step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        grads, (metrics, out) = jax.grad(loss_fn, has_aux=True)(state.params, state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics |= {f"grad_norm/{name}": optax.tree.norm(group) for name, group in grads.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        params = optax.apply_updates(state.params, updates)
        metrics["param_norm"] = optax.tree.norm(params)
        metrics["learning_rate"] = schedule(state.step)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            key=state.key,
            stream=out.state if config.stream else None,
            rsp=out.rsp,
        )
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return jax.jit(train_step, donate_argnums=0, out_shardings=None if places is None else (places, None))


def make_eval_step(
    model: Decoder,
) -> Callable[[Any, Mapping[str, Any], StreamState | None], tuple[dict[str, Array], StreamState | None]]:
    """The jitted evaluation step: (params, batch, stream or None) -> (sums of `token_sums`, next stream).

    No training randomness: no FAM noise, no Random State Passing.
    """

    def eval_step(
        params: Any, batch: Mapping[str, Array], stream: StreamState | None
    ) -> tuple[dict[str, Array], StreamState | None]:
        out = _apply(model, params, batch, stream)
        sums = token_sums(out.losses, batch["weights"])
        return sums, None if stream is None else out.state

    return jax.jit(eval_step)

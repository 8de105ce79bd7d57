"""One training step and one evaluation step, as pure functions of values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.config import TrainConfig
from fam_jax import Decoder, RSPState, StreamState, tree_shardings
from fam_jax.loss import TokenLosses
from fam_jax.sharding import fit

CHECKED = ("loss", "z_loss", "grad_norm", "param_norm")  # metrics that must be finite for a step to count


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


def split(config: TrainConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that are trained, and those that are not; the second are none without LoRA."""
    if config.model.lora is None:
        return dict(params), {}
    names = {"lora", "fam_prompt", "fam_prefix"} | ({"mixing"} if config.train_mixing else set())
    trained = {name: part for name, part in params.items() if name in names}
    return trained, {name: part for name, part in params.items() if name not in names}


def create_state(config: TrainConfig, model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, a function of the config alone. Works under `jax.jit`."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    memory = config.model.memory
    tokens = jnp.zeros((1, memory.block_size if memory else 1), jnp.int32)
    params = model.init(init_key, tokens)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(split(config, params)[0]),
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
        # Every process has all rows, and gives its devices theirs.
        sharding = NamedSharding(mesh, fit(spec, leaf.shape, mesh))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return {name: place(leaf) for name, leaf in batch.items()} if mesh.size > 1 else dict(batch)


def everywhere(mesh: Mesh, value: int) -> Array:
    """A number of this process on each of its devices: int32 [devices], spread over all processes."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, value, np.int32))


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


def _batch_axes(tree: Any) -> Any:
    """For each leaf the number of its batch axis."""
    if hasattr(tree, "logical_axes"):
        there = ((name, axes) for name, axes in tree.logical_axes.items() if getattr(tree, name) is not None)
        axes = {name: axes.index("batch") for name, axes in there}
        return dataclasses.replace(tree, **axes)
    return jax.tree.map(lambda _: 0, tree)


def _split(tree: Any, count: int) -> Any:
    """An axis [count] behind that of the rows: row r is in part r % count, so that every device has rows of each."""

    def split(leaf: Array, axis: int) -> Array:
        return leaf.reshape(*leaf.shape[:axis], leaf.shape[axis] // count, count, *leaf.shape[axis + 1 :])

    return jax.tree.map(split, tree, _batch_axes(tree))


def _take(tree: Any, axes: Any, number: Array) -> Any:
    """Part `number` of what `_split` has split; `axes` are those of the rows."""
    return jax.tree.map(
        lambda leaf, axis: jax.lax.dynamic_index_in_dim(leaf, number, axis + 1, keepdims=False), tree, axes
    )


def _put(tree: Any, part: Any, axes: Any, number: Array) -> Any:
    """With this part in the place of part `number`."""
    return jax.tree.map(
        lambda leaf, one, axis: jax.lax.dynamic_update_index_in_dim(leaf, one, number, axis + 1), tree, part, axes
    )


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
        `param_norm` after the update, `learning_rate`, and `skipped`: 1 if one of CHECKED is not finite, so that
        the step is left out: parameters and moments stay, and the rows of a stream begin documents.
    """

    def loss_fn(trained: Any, state: TrainState, batch: Mapping[str, Array], weight: Array, key: Array) -> Any:
        params = {**state.params, **trained}  # those that are not trained are constants, which have no gradient
        out = _apply(model, params, batch, state.stream, key=key, rsp=state.rsp)
        sums = token_sums(out.losses, batch["weights"])
        # Over the weight of the whole batch, so that parts of it add up.
        return (sums["nll"] + config.z_loss * sums["z2"]) / weight, (
            sums,
            out.state if config.stream else None,
            out.rsp,
        )

    def gradient(state: TrainState, batch: Mapping[str, Array], weight: Array, key: Array) -> Any:
        trained, _ = split(config, state.params)
        grads, aux = jax.grad(loss_fn, has_aux=True)(trained, state, batch, weight, key)
        if places is not None:
            grads = jax.lax.with_sharding_constraint(grads, split(config, places.params)[0])
        return grads, aux

    def in_parts(state: TrainState, batch: Mapping[str, Array], weight: Array, key: Array) -> Any:
        """The same as `gradient`, of one part of the batch after another."""
        count, axes = config.accumulate, _batch_axes(state.stream)
        rows = _split(dict(batch), count)

        def one(number: Any, stream: Any) -> Any:
            part = _take(rows, _batch_axes(rows), number)
            now = dataclasses.replace(state, stream=_take(stream, axes, number))
            return gradient(now, part, weight, jax.random.fold_in(key, number))

        def step(carry: Any, number: Array) -> Any:
            total, stream = carry
            found, (sums, new, rsp) = one(number, stream)
            total = jax.tree.map(lambda total, one: total + one.astype(total.dtype), total, (found, sums))
            return (total, _put(stream, new, axes, number)), rsp

        # Part after part takes the place of what its rows remembered: no second copy of that is needed.
        stream = _split(state.stream, count)
        found, (sums, _, _) = jax.eval_shape(one, jnp.zeros((), jnp.int32), stream)
        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), (found, sums)
        )
        ((grads, sums), stream), rsp = jax.lax.scan(step, (nothing, stream), jnp.arange(count))
        trained, _ = split(config, state.params)
        grads = jax.tree.map(lambda total, param: total.astype(param.dtype), grads, trained)
        stream = jax.tree.map(lambda leaf, old: leaf.reshape(old.shape), stream, state.stream)
        return grads, (sums, stream, jax.tree.map(lambda leaf: leaf[0], rsp))  # row 0 is in the first part

    def train_step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        batch = dict(batch)
        stop = batch.pop("stop", None)
        weight = jnp.sum(batch["weights"])
        run = gradient if config.accumulate == 1 else in_parts
        grads, (sums, stream, rsp) = run(
            state, batch, weight + (weight == 0), jax.random.fold_in(state.key, state.step)
        )
        metrics = means(sums)
        z2 = metrics.pop("z2")
        if config.z_loss:
            metrics["z_loss"] = config.z_loss * z2
        trained, frozen = split(config, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        metrics |= {f"grad_norm/{name}": optax.tree.norm(group) for name, group in grads.items()}
        metrics["grad_norm"] = optax.tree.norm(grads)
        updated = optax.apply_updates(trained, updates)
        metrics["param_norm"] = optax.tree.norm({**frozen, **updated})
        metrics["learning_rate"] = schedule(state.step)
        good = jnp.all(jnp.isfinite(jnp.stack([metrics[name] for name in CHECKED if name in metrics])))
        metrics["skipped"] = ~good
        if stop is not None:
            metrics["stop"] = jnp.max(stop)

        def keep(new: Array, old: Array) -> Array:
            count = jnp.issubdtype(new.dtype, jnp.integer)  # the optimiser's, of which the learning rate is a function
            return new if count else jnp.where(good, new, old)

        new_state = TrainState(
            step=state.step + 1,
            params={**frozen, **jax.tree.map(keep, updated, trained)},
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            key=state.key,
            stream=stream,
            rsp=jax.tree.map(keep, rsp, state.rsp),
        )
        if stream is not None:
            # The rows have read on, and may have begun other documents: what they remember is not of these.
            begun = model.init_state(len(batch["tokens"]))
            stream = jax.tree.map(lambda new, fresh: jnp.where(good, new, fresh), stream, begun)
            new_state = dataclasses.replace(new_state, stream=stream)
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

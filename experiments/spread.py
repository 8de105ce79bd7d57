"""Reading with a trained model on many devices: where its parameters and states are, and how results come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.distributed import waiting
from fam_jax import Decoder, StreamState, tree_shardings


def initial_state(model: Decoder, rows: int, max_length: int | None = None) -> StreamState:
    """`model.init_state`, its rows spread over the mesh that is set, if there is one."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return model.init_state(rows, max_length)
    return _creation(model, rows, max_length, mesh)()


@lru_cache(maxsize=32)
def _creation(model: Decoder, rows: int, max_length: int | None, mesh: Mesh) -> Callable[[], StreamState]:
    """The same function for the same state, so that it is compiled once and not for every batch."""
    create = partial(model.init_state, rows, max_length)
    places = tree_shardings(model.config.sharding, mesh, jax.eval_shape(create))
    return jax.jit(create, out_shardings=places)


def as_before(model: Decoder, state: StreamState) -> StreamState:
    """Within `jax.jit`: the state laid out as `initial_state` is, so that one program serves all chunks of a text."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return state
    return jax.lax.with_sharding_constraint(state, tree_shardings(model.config.sharding, mesh, state))


@partial(jax.jit, static_argnums=(0, 1))
def read_on(
    model: Decoder, aligned: bool, variables: Any, state: StreamState, tokens: Array, lengths: Array
) -> StreamState:
    """The state after the first `lengths` [b] of the tokens [b, t]; their logits are not computed."""
    out: Any = model.apply(variables, tokens, state, lengths=lengths, aligned=aligned)
    return as_before(model, out.state)


def to_host(tree: Any) -> Any:
    """NumPy arrays of a computation's results, whole, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    with waiting("all to hand their results around"):
        return multihost_utils.process_allgather(tree, tiled=True)

"""The arrays of a checkpoint: trees as one array per leaf, under its path, read and written by Orbax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from experiments.files import absolute
from experiments.integrity import CheckpointError, first_line


def named(tree: Any) -> dict[str, Any]:
    """The leaves by path. Those without elements are left out: Orbax refuses them, and they hold nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves if leaf.size}


def name_of(path: tuple) -> str:
    """The name of a leaf, by its path in the tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def shape_of(leaf: Any) -> str:
    """Type and shape of a leaf, as in `float32[64, 32]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def load(folder: Path, item: str, like: Any, meta: dict[str, Any]) -> Any:
    """Reads an item of a verified checkpoint into a tree like `like`."""
    wanted, stored = named(like), meta["arrays"][item]
    for name in dict.fromkeys([*wanted, *stored]):
        here = shape_of(wanted[name]) if name in wanted else "absent"
        if stored.get(name, "absent") != here:
            raise CheckpointError(
                f"{folder} is a checkpoint of another model: {item}.{name} is {stored.get(name, 'absent')} "
                f"there and {here} here; use the code that wrote it, or start a run in another --work-dir"
            )
    arrays = read_arrays(folder, item, wanted)

    def pick(path: tuple, leaf: Any) -> Any:
        return arrays[name_of(path)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, like)


def read_arrays(folder: Path, item: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of an item of a verified checkpoint by name, like the arrays or shapes that are wanted.

    Raises:
        CheckpointError: They cannot be read.
    """
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
        for name, leaf in wanted.items()
    }
    partial = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    try:
        with ocp.Context(pytree_options=partial):
            return ocp.load(absolute(folder) / item, abstract)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} could not be read: {first_line(error)}") from error

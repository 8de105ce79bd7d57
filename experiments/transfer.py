"""A new run that begins with the parameters of another: FAM added to a trained BSWA model, another FAM length, LIMe,
LoRA.

What only memory along time, mixing along depth or LoRA brings may differ between the two models; the rest may not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.arrays import name_of, named, read_arrays, shape_of
from experiments.checkpoint import CheckpointError
from experiments.config import TrainConfig
from experiments.distributed import waiting
from experiments.stored import find_checkpoint
from experiments.typed import differences, to_json
from fam_jax.fam import new_prompt

# Fields of the model that the parameters they share do not depend on.
_FREE = re.compile(r"(memory|mixing|lora|sharding)(\..*)?|schedule|attention|remat|scan_layers|dtype")


def take_parameters(path: str, config: TrainConfig, params: Any, say: Callable[[str], None]) -> Any:
    """The parameters of a checkpoint where a model has the same, and the model's own where it has not.

    A FAM prompt of another length is cut, or goes on with the new one's rows. Where there was none, it begins like
    `config.prompt_token`, see `fam_jax.fam.new_prompt`.

    Args:
        path: A run's folder, or one checkpoint in it.
        config: Of the new run.
        params: Its initial parameters.
        say: Told what is not taken over.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or its model differs in what may not differ; names
            the first such field.
    """
    folder, meta, theirs = find_checkpoint(path)
    for field, before, now in differences(to_json(theirs.model), to_json(config.model)):
        if not _FREE.fullmatch(field):
            raise CheckpointError(
                f"{folder} cannot be begun with: model.{field} is {before!r} there and {now!r} here; only memory, "
                "mixing and lora may differ"
            )
    stored = meta["arrays"]["params"]
    wanted = named(params)
    same = {name: leaf for name, leaf in wanted.items() if stored.get(name) == shape_of(leaf)}
    with waiting(f"all to read {folder}"):
        taken = read_arrays(folder, "params", same)
    if "fam_prompt" in stored and "fam_prompt" in wanted and "fam_prompt" not in same:
        new = wanted["fam_prompt"]
        rows = int(re.findall(r"\d+", stored["fam_prompt"].partition("[")[2])[0])
        whole = NamedSharding(new.sharding.mesh, PartitionSpec())  # on all devices, as rows need not divide by them
        shape = jax.ShapeDtypeStruct((rows, new.shape[1]), new.dtype, sharding=whole)
        with waiting(f"all to read the FAM prompt of {folder}"):
            old = read_arrays(folder, "params", {"fam_prompt": shape})
        kept = old["fam_prompt"][: new.shape[0]]
        taken["fam_prompt"] = jax.device_put(new.at[: len(kept)].set(kept), new.sharding)
        say(f"  fam_prompt has {new.shape[0]} rows; {len(kept)} are taken over")
    elif "fam_prompt" in wanted and "fam_prompt" not in stored:
        begin = jax.jit(partial(new_prompt, token=config.prompt_token), out_shardings=wanted["fam_prompt"].sharding)
        params = {**params, "fam_prompt": begin(wanted["fam_prompt"], taken["embed"])}
    fresh, left = sorted(wanted.keys() - taken.keys()), sorted(stored.keys() - wanted.keys())
    if fresh:
        say(f"  new: {', '.join(fresh)}")
    if left:
        say(f"  not taken over: {', '.join(left)}")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: taken.get(name_of(path), leaf), params)

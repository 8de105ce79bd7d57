"""Folders that Hugging Face loads: `config.json` and safetensors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fam_jax.config import DecoderConfig
from fam_jax.pretrained.families import hugging_face_config
from fam_jax.pretrained.weights import Weight, weights

SHARD_BYTES = 4 * 2**30  # of a file


def save(
    folder: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    max_length: int = 8192,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as Hugging Face has them; `AutoModelForCausalLM.from_pretrained(folder)` loads it.

    A memory of blocks is left out: theirs reads with full attention, which is the same for texts that the window
    covers. Copy the tokenizer's files beside it.

    Args:
        folder: Made if it is not there; must hold no weights.
        config: The model's.
        params: Its parameters.
        max_length: What the config says is the longest text.
        shard_bytes: Of a file, of which there are more for larger models; so much is in the host's memory.

    Raises:
        ValueError: The model has what Hugging Face's do not: a FAM, a layer mixer, LoRA that is not merged, or a field
            that no family has; the folder has weights already; or safetensors is not installed.
        OSError: It cannot be written.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ValueError('writing safetensors needs: pip install -e ".[pretrained]"') from None
    table = _checked(config, hugging_face_config(config, max_length), params)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(file.name for file in folder.glob("*.safetensors*")):
        raise ValueError(f"{folder} holds {old[0]} already; give another folder")
    places: dict[str, str] = {}
    total = 0
    part: dict[str, np.ndarray] = {}

    def flush(file: str) -> None:
        save_file(part, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
        part.clear()

    for name, array in _theirs(config, table, params):
        if part and sum(one.nbytes for one in part.values()) + array.nbytes > shard_bytes:
            flush(f"model-{len(set(places.values())) + 1:05d}.safetensors")
        part[name] = array
        total += array.nbytes
    flush(f"model-{len(set(places.values())) + 1:05d}.safetensors" if places else "model.safetensors")
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    theirs = hugging_face_config(config, max_length) | {"dtype": str(np.dtype(config.param_dtype))}
    (folder / "config.json").write_text(json.dumps(theirs, indent=1) + "\n")


def _checked(
    config: DecoderConfig, theirs: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[tuple[str, ...], Weight]:
    """The table of weights; raises ValueError if there are parameters that it has not."""
    table = weights(config, theirs)
    names = {("layers", name) for name in params["layers"]} | {(name,) for name in params if name != "layers"}
    if more := sorted(names - table.keys()):
        advice = {"mixing": "a layer mixer", "lora": "LoRA, to be merged before"}
        advice |= dict.fromkeys(("fam_prompt", "fam_prefix"), "a FAM")
        what = advice.get(more[0][0], "a parameter")
        raise ValueError(f"the model has {what} ({'.'.join(more[0])}), which Hugging Face's models do not have")
    return table


def _theirs(
    config: DecoderConfig, table: Mapping[tuple[str, ...], Weight], params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their weights by name, one after another."""

    def turned(weight: Weight, array: Any, name: str) -> tuple[str, np.ndarray]:
        ours = np.asarray(array)
        return name, np.ascontiguousarray(weight.theirs(ours.astype(np.float32)).astype(ours.dtype))

    for path, weight in table.items():
        if path[0] != "layers":
            yield turned(weight, params[path[0]], weight.name)
    for layer in range(config.num_layers):
        for path, weight in table.items():
            if path[0] == "layers":
                yield turned(weight, params["layers"][path[1]][layer], weight.name.format(layer))

"""Pretrained models from files, one parameter at a time, straight to where it lives."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from fam_jax.config import DecoderConfig
from fam_jax.decoder import Decoder
from fam_jax.fam import new_prompt
from fam_jax.pretrained.families import OWN, decoder_config
from fam_jax.pretrained.weights import Weight, weights
from fam_jax.sharding import tree_shardings

_TYPES = ("float32", "bfloat16", "float16", "float64")  # of weights; others are quantised, in ways of their own
# How the text model of a larger one is called, instead of "model."
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")


class Source(Protocol):
    """A pretrained model's file or files.

    Attributes:
        theirs: Its config, in the terms of Hugging Face's `config.json`.
    """

    theirs: dict[str, Any]

    def read(self, name: str) -> np.ndarray:
        """A weight by its Hugging Face name. Raises ValueError if it is not there."""
        ...


class Safetensors:
    """A folder with `config.json` and `*.safetensors`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack | None = None):
        self.folder = folder
        try:
            self.theirs = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} has no readable config.json ({error}); give a model's folder") from None
        if stack is not None:
            self._open(stack)

    def _open(self, stack: contextlib.ExitStack) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise ValueError('reading safetensors needs: pip install -e ".[pretrained]"') from None
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            others = sorted(file.name for file in self.folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
            what = f"only {', '.join(others)}, which may hold programs and is never opened" if others else "none"
            raise ValueError(f"{self.folder} has no weights in *.safetensors: {what}; save the model as safetensors")
        index = self.folder / "model.safetensors.index.json"
        parts = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        if missing := sorted(parts - {file.name for file in files}):
            raise ValueError(f"{self.folder} lacks {missing[0]}, which {index.name} names; copy it, too")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(str(file), framework="np"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged or no safetensors file ({error}); copy it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)

    def read(self, name: str) -> np.ndarray:
        for prefix in _PREFIXES:
            known = re.sub(r"^model\.", prefix, name)
            if known in self._files:
                return self._files[known].get_tensor(known)
        raise ValueError(f"{self.folder} lacks the weight {name}, which its config.json asks for; copy it again")


@contextlib.contextmanager
def _source(path: Path) -> Iterator[Source]:
    """A model's weights, open."""
    if path.suffix == ".gguf":
        from fam_jax.pretrained.gguf import Gguf

        yield Gguf(path)
        return
    with contextlib.ExitStack() as stack:
        yield Safetensors(path, stack)


def read_config(path: str | Path) -> DecoderConfig:
    """The config of a pretrained model, with full attention and all else as `DecoderConfig` has it.

    Args:
        path: A folder with `config.json`, or a `.gguf` file.

    Raises:
        ValueError: It cannot be read, or something in it is not supported; names the field.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        return decoder_config(Safetensors(path).theirs)
    with _source(path) as source:
        return decoder_config(source.theirs)


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    prompt_token: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **changes: Any,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """A pretrained model.

    One parameter, of all layers, is in the host's memory at a time.

    Args:
        path: A folder with `config.json` and safetensors, or a `.gguf` file, whose weights become float32.
        mesh: Where to; None is the first device.
        key: For parameters that the file lacks: the FAM's prompt and what mixes layers. None is seed 0.
        prompt_token: What the FAM's prompt begins like, best the token that texts begin with; see
            `fam_jax.fam.new_prompt`.
        progress: Told after each parameter how many there are, and of how many.
        changes: Fields of the config: `memory`, `mixing`, `dtype`, `param_dtype` and the like.

    Returns:
        The config, and the parameters for `Decoder(config).apply({"params": params}, ...)`.

    Raises:
        ValueError: as `read_config`; a weight is missing or has another shape; or a change is impossible.
        OSError: A file cannot be read.
    """
    path = Path(path)
    with _source(path) as source:
        plain = decoder_config(source.theirs)
        config = _changed(plain, changes)
        table = weights(plain, source.theirs)
        model: Any = Decoder(config)
        key = jax.random.key(0) if key is None else key
        tokens = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(model.init, key, tokens)["params"]
        place: Any = SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: place, shapes)
        if mesh is not None:
            places = tree_shardings(config.sharding, mesh, shapes, shapes)
        wanted, where = _flat(shapes), _flat(places)
        found = {}
        for name in sorted(wanted.keys() & table.keys()):
            found[name] = _array(source, table[name], name[0] == "layers", wanted[name], where[name])
            if progress is not None:
                progress(len(found), len(table))
    new = {name: where[name] for name in wanted if name not in found}
    if new:
        init = jax.jit(
            lambda: {name: _flat(model.init(key, tokens)["params"])[name] for name in new}, out_shardings=new
        )
        found |= init()
    for prompt in new.keys() & {("fam_prompt",), ("fam_prefix",)}:
        token = prompt_token if prompt == ("fam_prompt",) else None
        place = found[prompt].sharding
        found[prompt] = jax.device_put(new_prompt(found[prompt], found["embed",], token), place)
    return config, jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], shapes)


def _changed(config: DecoderConfig, changes: dict[str, Any]) -> DecoderConfig:
    """The config with other values where a use may differ from another.

    Raises:
        ValueError: A field is one that the weights depend on, or not known.
    """
    if fixed := sorted(changes.keys() - OWN):
        raise ValueError(f"{fixed[0]}={changes[fixed[0]]!r} cannot be chosen: the file says it; {', '.join(OWN)} can")
    return dataclasses.replace(config, **changes)


def _name(path: tuple) -> tuple[str, ...]:
    return tuple(part.key for part in path)


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by their path."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _array(source: Source, weight: Weight, stacked: bool, wanted: Any, where: Any) -> jax.Array:
    """One of our parameters, of all layers, where it lives."""
    numbers = range(wanted.shape[0]) if stacked else (0,)
    shape = wanted.shape[1:] if stacked else wanted.shape
    host = np.empty((len(numbers), *shape), wanted.dtype)
    for number in numbers:
        name = weight.name.format(number)
        theirs = source.read(name)
        if str(theirs.dtype) not in _TYPES:
            raise ValueError(
                f"weight {name} is {theirs.dtype}, and not one of {', '.join(_TYPES)}; take the model as such"
            )
        try:
            host[number] = weight.ours(theirs.astype(np.float32)).reshape(shape)
        except ValueError:
            raise ValueError(
                f"weight {name} has the shape {list(theirs.shape)}, which does not make {list(shape)}; the config does "
                "not belong to these weights"
            ) from None
    host = host if stacked else host[0]
    return jax.make_array_from_callback(wanted.shape, where, lambda index: host[index])

"""A state in a file, so that what has been read once need not be read again.

The file is NumPy's `.npz` without pickles: an array for each field of the state, and `about`, JSON as bytes, with what
the state belongs to. Types that NumPy does not know, such as bfloat16, are stored as bytes and named there. Every entry
has a checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import make_folder
from experiments.distributed import on_main
from experiments.files import as_os_errors, is_remote, location
from experiments.integrity import first_line, sync
from experiments.spread import to_host
from experiments.typed import differences
from fam_jax import Decoder, StreamState, tree_shardings
from fam_jax.state import check_state

FORMAT = 1
FIELDS = tuple(field.name for field in dataclasses.fields(StreamState))
_ALWAYS = {field.name for field in dataclasses.fields(StreamState) if field.default is dataclasses.MISSING}
# What zipfile and NumPy raise of other bytes than were written: some change the compression, a key, or a size.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    SyntaxError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


def origin(meta: dict[str, Any], tokenizer: Any, head: str) -> dict[str, Any]:
    """What a state depends on besides the text that was read; the folder of the run is not among it.

    Args:
        meta: Description of the checkpoint, from `find_checkpoint`.
        tokenizer: Of the text.
        head: What the chat template puts before the text; empty without one.
    """
    files = sorted((name, crc) for name, (_, crc) in meta["files"].items() if name.startswith("params/"))
    return {
        "model": meta["config"]["model"],
        "step": meta["step"],
        "parameters": f"{zlib.crc32(json.dumps(files).encode()):08x}",
        "tokenizer": str(getattr(tokenizer, "hash", type(tokenizer).__name__)),
        "chat": head,
    }


def check_target(path: Path) -> None:
    """Raises ValueError, before anything long is done, if a state cannot be written there; makes its folder."""
    path = location(path)
    if is_remote(path):
        return
    if path.is_dir():
        raise ValueError(f"--save-state={str(path)!r} is a folder; give the name of a file")
    make_folder(path.parent, "--save-state")


def save_state(path: Path, state: StreamState, about: dict[str, Any], tokens: int) -> None:
    """Writes a state, whole or not at all; an existing file is replaced. All processes must call it.

    Args:
        path: The file, on a disk or in a bucket.
        state: Of one row.
        about: Its `origin`.
        tokens: How many it has read.

    Raises:
        ValueError: It cannot be written: a full disk, say. What was there before is as it was.
    """
    there = [name for name in FIELDS if getattr(state, name) is not None]
    arrays = {name: np.asarray(to_host(getattr(state, name))) for name in there}
    about = {"format": FORMAT, "tokens": tokens, "types": {k: str(v.dtype) for k, v in arrays.items()}, **about}
    stored: dict[str, Any] = {
        name: array if array.dtype.isbuiltin == 1 else _as_bytes(array) for name, array in arrays.items()
    }
    stored["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    target = location(path)
    on_main(lambda: _write(target, stored), (ValueError,))


def _write(target: Path, arrays: dict[str, Any]) -> None:
    beside = target if is_remote(target) else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with as_os_errors(target):
            with beside.open("wb") as file:
                # As `numpy.savez` does, which leaves a file that it cannot write to its destructor.
                with zipfile.ZipFile(file, "w") as entries:
                    for name, array in arrays.items():
                        with entries.open(f"{name}.npy", "w", force_zip64=True) as entry:
                            np.lib.format.write_array(entry, array, allow_pickle=False)
                if not is_remote(target):
                    file.flush()
                    os.fsync(file.fileno())
            if not is_remote(target):
                os.replace(beside, target)
                sync(target.parent)
    except BaseException as error:
        if not is_remote(target):
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise ValueError(
            f"--save-state={str(target)!r} could not be written ({first_line(error)}); make room, or give another file"
        ) from error


def load_state(path: Path, model: Decoder, about: dict[str, Any]) -> tuple[StreamState, int]:
    """Reads a state for the model and the mesh that is set.

    Args:
        path: A file that `save_state` has written.
        model: The decoder.
        about: The `origin` that the state must have.

    Returns:
        The state, of one row, and how many tokens it has read.

    Raises:
        ValueError: There is no such file, it is damaged, or it belongs to another model, checkpoint or tokenizer; the
            message names what differs.
    """
    target = location(path)
    try:
        with as_os_errors(target), target.open("rb") as file:
            found, arrays = _read(file)
    except (OSError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a wrong offset in the file gives
            raise ValueError(
                f"--load-state={str(target)!r} cannot be read ({first_line(error)}); check the path"
            ) from None
        raise ValueError(
            f"--load-state={str(target)!r} is damaged, or no saved state ({first_line(error)}); read the text again "
            "with --context-file and --save-state"
        ) from None
    if found.get("format") != FORMAT:
        raise ValueError(
            f"--load-state={str(target)!r} has format {found.get('format')}, this code reads {FORMAT}; use the code "
            "that wrote it"
        )
    for field, there, here in differences({name: found.get(name) for name in about}, about):
        what = field.partition(".")[0]
        remedy = (
            "give the same --chat and --system" if what == "chat" else "give the --checkpoint that it was read with"
        )
        raise ValueError(
            f"--load-state={str(target)!r} belongs to another {_NAMES[what]}: {field} is {there!r} there and {here!r} "
            f"here; {remedy}, or read the text again"
        )
    state = StreamState(**arrays)
    check_state(model.config, state, 1)
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.size == 1:
        return jax.tree.map(jnp.asarray, state), found["tokens"]
    return jax.device_put(state, tree_shardings(model.config.sharding, mesh, state)), found["tokens"]


_NAMES = {"model": "model", "step": "checkpoint", "parameters": "checkpoint", "tokenizer": "tokenizer", "chat": "chat"}


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file holds: what the state belongs to, and its arrays; checksums are compared on the way."""
    with np.load(file, allow_pickle=False) as stored:
        about = json.loads(stored["about"].tobytes())
        there = [name for name in FIELDS if name in _ALWAYS or name in about["types"]]
        arrays: dict[str, Any] = {name: stored[name] for name in there}
    for name, kind in about["types"].items():
        if str(arrays[name].dtype) != kind:
            arrays[name] = arrays[name].view(jnp.dtype(kind))[..., 0]
    return about, arrays


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of each number, along a new last axis."""
    return np.ascontiguousarray(array)[..., None].view(np.uint8)

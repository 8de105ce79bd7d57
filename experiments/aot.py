"""Compiles a step for real TPUs on a machine without one, and says whether it fits and what it sends.

python -m experiments.aot --preset palm_1b --memory fam --topology v5e:4x4 --batch 128 --microbatch 32 --length 8192
python -m experiments.aot --what decode --preset palm_1b --topology v5e:4x4 --mesh fsdp=1,tensor=4,data=4 --batch 128

Needs `pip install -e ".[tpu]"` for the TPU's compiler, and no TPU. The training step is the trainer's own: Adafactor
with momentum, float32 parameters, bfloat16 products, rows that carry their memory, blocked cross entropy. Those of
generation are what `fam_jax.generate` runs, with weights in the type of the products: "prefill" reads `length` tokens
of each row, "decode" reads one more and chooses the next. `experiments.aot_table` has many at once. What is printed:
peak memory of a chip against the usable one, operations counted on the program and by the closed formula without
recomputation, bytes of collectives by loop, and the seconds it took to compile.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from experiments import flops, hlo, report, results
from experiments.aot_gpu import gpu_devices
from experiments.command import run_command
from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.optim import OptimConfig, make_optimizer
from experiments.step import create_state, make_train_step, shard
from experiments.typed import to_json
from fam_jax import Decoder, DecoderConfig, MeshConfig, StreamState, make_mesh, presets, tree_shardings
from fam_jax.sharding import MESH_AXES, fit
from lime_jax import LimeConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles a step for a TPU topology.

    Attributes:
        what: The training step, or one of generation.
        preset: Shape of the model; a function of `fam_jax.presets`.
        memory: FAM, its window alone, or full attention.
        lime: With LIMe.
        attention: What computes it, as `DecoderConfig.attention` says.
        topology: TPU generation and arrangement of chips, e.g. v5e:4x4 or v5p:2x2x4; or h100:8, eight GPUs of a host,
            which needs more (see `experiments.aot_gpu`).
        mesh: Sizes of the mesh's axes, e.g. fsdp=-1,tensor=4; those left out are 1.
        batch: Rows of a step, over all chips.
        microbatch: Rows of each part whose gradients are added up; None is the whole batch.
        length: Tokens of a row; of decoding with full attention, those that the cache has room for.
        name: Of the result; None is made of the above.
        output: Folder of the result file.
    """

    what: Literal["train", "prefill", "decode"] = "train"
    preset: str = "palm_1b"
    memory: Literal["fam", "bswa", "full"] = "fam"
    lime: bool = False
    attention: Literal["auto", "xla", "splash"] = "auto"
    topology: str = "v5e:4x4"
    mesh: str = "fsdp=-1"
    batch: int = 128
    microbatch: int | None = None
    length: int = 8192
    name: str | None = None
    output: Path = results.DIRECTORY


def model_config(options: Options) -> DecoderConfig:
    """The model.

    Raises:
        ValueError: There is no such preset.
    """
    known = [name for name in vars(presets) if callable(getattr(presets, name)) and name.islower() and name[0] != "_"]
    if options.preset not in known:
        raise ValueError(f"preset={options.preset!r} is not known; there are {', '.join(known)}")
    model = getattr(presets, options.preset)()
    memory = model.memory
    if options.memory == "full":
        memory = None
    elif memory is None:
        raise ValueError(f"preset={options.preset!r} has full attention; give memory='full'")
    elif options.memory == "bswa":
        memory = dataclasses.replace(memory, fam_length=0, rsp=0.0)
    mixing = LimeConfig() if options.lime else None
    return dataclasses.replace(model, memory=memory, mixing=mixing, attention=options.attention)


def mesh_config(text: str) -> MeshConfig:
    """A mesh from `axis=size,...`.

    Raises:
        ValueError: An axis is not known or a size is no number.
    """
    sizes = {"fsdp": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.lstrip("-").isdigit():
            raise ValueError(f"mesh={text!r} is not allowed; give AXIS=SIZE,... with the axes {', '.join(MESH_AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def train_config(options: Options) -> TrainConfig:
    """The run whose step is compiled.

    Raises:
        ValueError: The options do not fit together.
    """
    model = model_config(options)
    if options.what != "train" and options.microbatch is not None:
        raise ValueError(
            f"microbatch={options.microbatch} is for training; what={options.what!r} reads all rows at once"
        )
    if options.attention == "splash" and options.topology.startswith("h100"):
        raise ValueError(f"attention='splash' is for TPUs, but topology={options.topology!r}; give 'auto' or 'xla'")
    part = options.microbatch or options.batch
    if part < 1 or options.batch % part:
        raise ValueError(f"microbatch={part} is not allowed; it must divide batch={options.batch}")
    block = model.memory.block_size if model.memory else options.length
    data = TextData(
        mode="stream" if model.memory else "packed", batch_size=options.batch, length=options.length, block_size=block
    )
    return TrainConfig(
        name="aot",
        model=model,
        data=data,
        steps=10_000,
        optim=OptimConfig(optimizer="adafactor"),
        accumulate=options.batch // part,
        mesh=mesh_config(options.mesh),
    )


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a topology, which need not be there.

    Raises:
        ValueError: There is no compiler, or no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs its compiler: pip install -e '.[tpu]'")
    # The compiler must neither ask the cloud which TPU this is, nor claim one.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"topology={topology!r} is not known to the compiler: {first}; try v5e:4x4") from error


def compile_step(config: TrainConfig, devices: list[Any]) -> tuple[Any, int, float]:
    """The compiled training step, its operations counted on the jaxpr, and the seconds it took to compile.

    Raises:
        ValueError: The mesh does not fit the devices.
    """
    mesh, data = make_mesh(config.mesh, devices), config.data
    assert isinstance(data, TextData)
    model = Decoder(config.model)
    optimizer, schedule = make_optimizer(config.optim, config.steps)
    with jax.set_mesh(mesh):
        create = functools.partial(create_state, config, model, optimizer)
        state = shard(config, mesh, jax.eval_shape(create))
        places = jax.tree.map(lambda leaf: leaf.sharding, state)
        step: Any = make_train_step(config, model, optimizer, schedule, places)
        shape = (data.batch_size, data.length)
        kinds = {"tokens": (shape, "int32"), "targets": (shape, "int32"), "weights": (shape, "float32")}
        if config.model.memory is not None:
            blocks = (shape[0], data.length // config.model.memory.block_size)
            kinds |= {"reset": (blocks, "bool"), "padded": (blocks, "bool")}
        spec = config.model.sharding.spec("batch", None)
        batch = {
            name: jax.ShapeDtypeStruct(size, kind, sharding=jax.sharding.NamedSharding(mesh, fit(spec, size, mesh)))
            for name, (size, kind) in kinds.items()
        }
        counted = flops.count(step, state, batch)
        lowered = step.lower(state, batch)
        start = time.perf_counter()
        return lowered.compile(), counted, time.perf_counter() - start


def compile_generation(config: TrainConfig, devices: list[Any], what: str) -> tuple[Any, int, float]:
    """The same of a step of `fam_jax.generate`: "prefill" reads texts, "decode" a token, and takes the likeliest next.

    Raises:
        ValueError: The mesh does not fit the devices.
    """
    mesh, data = make_mesh(config.mesh, devices), config.data
    assert isinstance(data, TextData)
    model: Any = Decoder(dataclasses.replace(config.model, param_dtype=config.model.dtype))
    rules = config.model.sharding

    def step(params: Any, state: StreamState, tokens: jax.Array, lengths: jax.Array) -> Any:
        out = model.apply({"params": params}, tokens, state, lengths=lengths)
        return out.state if what == "prefill" else (jnp.argmax(out.logits[:, 0], axis=-1), out.state)

    def place(tree: Any, params: Any = None) -> Any:
        places = tree_shardings(rules, mesh, tree, params)
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

    rows = data.batch_size
    with jax.set_mesh(mesh):
        block = config.model.memory.block_size if config.model.memory else 1
        tokens = jax.ShapeDtypeStruct((1, block), "int32")
        params = place(jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)["params"])
        room = None if config.model.memory else data.length
        state = place(jax.eval_shape(lambda: model.init_state(rows, room)), params)

        def ids(*shape: int) -> Any:
            spec = fit(rules.spec("batch", *[None] * (len(shape) - 1)), shape, mesh)
            return jax.ShapeDtypeStruct(shape, "int32", sharding=jax.sharding.NamedSharding(mesh, spec))

        arguments = (params, state, ids(rows, data.length if what == "prefill" else 1), ids(rows))
        counted = flops.count(step, *arguments)
        after = jax.tree.map(lambda leaf: leaf.sharding, state)
        jitted: Any = jax.jit(step, donate_argnums=1, out_shardings=after if what == "prefill" else (None, after))
        lowered = jitted.lower(*arguments)
        start = time.perf_counter()
        return lowered.compile(), counted, time.perf_counter() - start


def forward_flops(model: DecoderConfig, rows: int, length: int) -> tuple[int, int]:
    """Operations of the forward pass over whole documents, counted on the jaxpr and by the closed formula."""
    decoder: Any = Decoder(model)
    tokens = jax.ShapeDtypeStruct((rows, length), "int32")
    params = jax.eval_shape(lambda tokens: decoder.init(jax.random.key(0), tokens[:1]), tokens)
    counted = flops.count(lambda params, tokens: decoder.apply(params, tokens, targets=tokens).losses, params, tokens)
    return counted, flops.forward_flops(model, rows, length)


def result_name(options: Options) -> str:
    """What the result is called: its own name, or one made of what is compiled and for what."""
    kind = "" if options.what == "train" else f"-{options.what}"
    lime = "-lime" if options.lime else ""
    topology = options.topology.replace(":", "-")
    attention = "" if options.attention == "auto" else f"-{options.attention}"
    return options.name or f"aot-{options.preset}-{options.memory}{lime}{attention}{kind}-{topology}"


def run(options: Options) -> tuple[results.Result, Path, str]:
    """Compiles and measures.

    Returns:
        The result, its file, and the table of collectives.

    Raises:
        ValueError: as `train_config`, `tpu_devices`, `gpu_devices` and `compile_step`; or it does not fit the chip.
    """
    config = train_config(options)
    results.make_directory(options.output)
    of_gpus = options.topology.startswith("h100")
    devices = gpu_devices(options.topology) if of_gpus else tpu_devices(options.topology)
    start = time.perf_counter()
    try:
        if options.what == "train":
            compiled, counted, seconds = compile_step(config, devices)
        else:
            compiled, counted, seconds = compile_generation(config, devices, options.what)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"it does not fit {options.topology}: {str(error).splitlines()[0][:300]}; make microbatch smaller, spread "
            "the weights over more chips, or take another topology"
        ) from error
    memory = hlo.memory_report(compiled)
    loops = hlo.read(compiled.as_text())
    usable = hlo.USABLE_BYTES.get(devices[0].device_kind)
    gib = 2.0**30
    model = f"{options.preset} {options.memory}{' with LIMe' if options.lime else ''}"
    model += "" if options.attention == "auto" else f" by {options.attention}"
    what = "" if options.what == "train" else f", {options.what}"
    label = f"{model}{what}, {options.topology}, {options.mesh}"
    part = options.batch // config.accumulate
    forward, formula, whole = None, None, None
    if options.what == "train":
        forward, formula = forward_flops(config.model, part, options.length)
        whole = 3 * config.accumulate * formula
    curve = {
        "label": label,
        "seed": 0,
        "microbatch": [config.data.batch_size // config.accumulate],
        "peak_gib": [memory["peak"] / gib],
        "usable_gib": [None if usable is None else usable / gib],
        "argument_gib": [memory["argument"] / gib],
        "devices": [len(devices)],
        "flops": [counted],
        "flops_formula": [whole],
        "forward_flops": [forward],  # of one part of the batch
        "forward_formula": [formula],
        "collective_gb": [hlo.total_bytes(loops) / 1e9],
        "fam_scan_gb": [hlo.total_bytes(loops, "fam_scan") / 1e9],
        "fam_scan_moves": [hlo.total_count(loops, hlo.MOVES, "fam_scan")],
        "compile_seconds": [round(seconds, 1)],
    }
    settings = to_json(dataclasses.asdict(options))
    del settings["output"]
    result = results.make(
        "aot",
        result_name(options),
        config={"aot": settings, "train": to_json(config)},
        seeds=[0],
        values={"curves": [curve], "marks": [], "collectives": hlo.table(loops)},
        wall_seconds=time.perf_counter() - start,
    )
    return result, results.write(result, options.output), hlo.table(loops)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.aot", description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    try:
        result, file, loops = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    curve = result.values["curves"][0]
    print(f"{loops}\n")
    for name, values in curve.items():
        if name not in ("label", "seed"):
            print(f"{name:>16}: {values[0]:,}" if values[0] is not None else f"{name:>16}: not known")
    print(f"\n{report.table(result)}\n\nwrote {file}")
    return 0


if __name__ == "__main__":
    run_command(main)

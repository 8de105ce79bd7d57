"""What models cost: `python -m experiments.benchmark memory`, `time`, `speed` and `parts`.

`memory` and `time` are of mixing layers. `memory` compiles a gradient step at several depths and reads from the
compiled program how much temporary memory it needs, per layer; it must not grow with depth. `time` runs training steps
of models with and without mixing in turns, in one process, so that whatever else the machine does meets all of them.
`speed` is of whole models, with any memory, schedule and attention: step time, tokens per second, share of the device's
peak, memory, compile time (see `experiments.speed`). `parts` tells by the profiler where the time of a step goes (see
`experiments.parts`). All write a result file and a plot.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from experiments import parts, report, results, speed
from experiments.command import run_command
from experiments.typed import to_json
from fam_jax import Decoder, DecoderConfig
from lime_jax import (
    AttentionResidualsConfig,
    DenseFormerConfig,
    DepthAttentionConfig,
    HyperConnectionsConfig,
    LimeConfig,
    MixingConfig,
    ValueResidualConfig,
)

ARMS: dict[str, MixingConfig | None] = {
    "none": None,
    "static_kv, push": LimeConfig(backward="push"),
    "static_kv, pull": LimeConfig(backward="pull"),
    "static_kv, write_once": LimeConfig(backward="write_once"),
    "static_kv, rebuild": LimeConfig(backward="rebuild"),
    "dynamic_kv": LimeConfig("dynamic_kv"),
    "average": LimeConfig("average"),
    "static_hidden": LimeConfig("static_hidden"),
    "dynamic_hidden": LimeConfig("dynamic_hidden"),
    "dynamic_views": LimeConfig("dynamic_views"),
    "DenseFormer": DenseFormerConfig(),
    "Hyper-Connections": HyperConnectionsConfig(),
    "Value Residual": ValueResidualConfig(),
    "Depth-Attention": DepthAttentionConfig(),
    "Attention Residuals": AttentionResidualsConfig(),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what mixing layers costs.

    Attributes:
        what: Temporary memory by depth, or step time.
        arms: Which to measure; None is all.
        depths: Layers, for memory; for time the last is taken.
        tokens: Length of the text.
        batch_size: Texts in a step.
        width: Width of the model.
        d_ff: Width of the feed-forward; 0 is four times that of the model.
        heads: Query heads.
        kv_heads: Key and value heads.
        remat: Recompute layers in the backward pass, where the arm leaves the choice.
        scan: A scanned stack of layers, or an unrolled one.
        steps: For time: steps of each arm.
        name: Name of the result.
        output: Folder of the result file and the plot.
    """

    what: tyro.conf.Suppress[str]
    arms: tuple[str, ...] | None = None
    depths: tuple[int, ...] = (8, 16, 32)
    tokens: int = 128
    batch_size: int = 1
    width: int = 64
    d_ff: int = 0
    heads: int = 4
    kv_heads: int = 4
    remat: bool = False
    scan: bool = True
    steps: int = 30
    name: str | None = None
    output: Path = results.DIRECTORY


def model_config(options: Options, layers: int, mixing: MixingConfig | None) -> DecoderConfig:
    """The decoder that is measured: full attention, so that nothing but the mixing differs."""
    return DecoderConfig(
        vocab_size=256,
        num_layers=layers,
        d_model=options.width,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        head_dim=options.width // options.heads,
        d_ff=options.d_ff or 4 * options.width,
        mixing=mixing,
        remat="full" if options.remat else "none",
        scan_layers=options.scan,
    )


def gradient_step(config: DecoderConfig) -> tuple[Callable[[Any, Any], Any], Any]:
    """A function (params, tokens) -> (loss, gradients), and the shapes of the parameters."""
    model = Decoder(config)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        out: Any = model.apply({"params": params}, tokens)
        logits = out.logits
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.value_and_grad(loss), shapes


def memory(options: Options, arms: dict[str, MixingConfig | None]) -> dict[str, Any]:
    """Temporary memory per layer, in sizes of one layer's state, and compile time, by arm and depth."""
    state = options.batch_size * options.tokens * options.width * 4
    tokens = jax.ShapeDtypeStruct((options.batch_size, options.tokens), jnp.int32)
    curves = []
    with tqdm(total=len(arms) * len(options.depths), unit="program", disable=None) as bar:
        for label, mixing in arms.items():
            states, seconds = [], []
            for layers in options.depths:
                step, shapes = gradient_step(model_config(options, layers, mixing))
                lowered = jax.jit(step).lower(shapes, tokens)
                start = time.perf_counter()
                used: Any = lowered.compile().memory_analysis()
                seconds.append(round(time.perf_counter() - start, 2))
                states.append(used.temp_size_in_bytes / layers / state)
                bar.update()
            curves.append(
                {
                    "label": label,
                    "seed": 0,
                    "layers": list(options.depths),
                    "states": states,
                    "compile_seconds": seconds,
                }
            )
    return {"curves": curves, "marks": []}


def step_time(options: Options, arms: dict[str, MixingConfig | None]) -> dict[str, Any]:
    """Seconds of a gradient step, arms in turns; the ratio to the first arm is that of the medians."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (options.batch_size, options.tokens)), jnp.int32)
    programs = {}
    for label, mixing in arms.items():
        config = model_config(options, options.depths[-1], mixing)
        step, _ = gradient_step(config)
        params = jax.jit(Decoder(config).init)(jax.random.key(0), tokens[:1, :1])["params"]
        program = jax.jit(step)
        jax.block_until_ready(program(params, tokens))  # compiles
        programs[label] = (program, params)
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    for _ in tqdm(range(options.steps), unit="round", disable=None):
        for label, (program, params) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, tokens))
            seconds[label].append(time.perf_counter() - start)
    first = np.median(next(iter(seconds.values())))
    curves = [
        {
            "label": label,
            "seed": 0,
            "layers": [options.depths[-1]],
            "ratio": [float(np.median(times) / first)],
            "seconds": times,
        }
        for label, times in seconds.items()
    ]
    return {"curves": curves, "marks": []}


def run(options: Options) -> tuple[results.Result, Path, Path]:
    """Measures, and writes the result.

    Raises:
        ValueError: There is no arm of a name, or the output folder cannot be made.
    """
    unknown = [name for name in options.arms or () if name not in ARMS]
    if unknown:
        raise ValueError(f"arms={unknown} are not known; there are {', '.join(map(repr, ARMS))}")
    arms = {name: ARMS[name] for name in options.arms or ARMS}
    results.make_directory(options.output)
    start = time.perf_counter()
    values = memory(options, arms) if options.what == "memory" else step_time(options, arms)
    settings = dataclasses.asdict(options)
    del settings["output"]
    result = results.make(
        f"layer-{options.what}",
        options.name or f"layer-{options.what}",
        config=settings | {"model": to_json(model_config(options, options.depths[-1], None))},
        seeds=[0],
        values=values,
        wall_seconds=time.perf_counter() - start,
        data=None,
    )
    file = results.write(result, options.output)
    return result, file, report.plot(result, file.with_suffix(".png"))


Command = (
    Annotated[Options, tyro.conf.subcommand("memory", default=Options("memory"))]
    | Annotated[Options, tyro.conf.subcommand("time", default=Options("time"))]
    | Annotated[speed.Options, tyro.conf.subcommand("speed", description=speed.__doc__)]
    | Annotated[parts.Options, tyro.conf.subcommand("parts", description=parts.__doc__)]
)


def main() -> int:
    """The command line; returns the exit code."""
    options: Any = tyro.cli(Command, prog="python -m experiments.benchmark", description=__doc__)  # type: ignore[call-overload]
    made = {speed.Options: speed, parts.Options: parts}.get(type(options))
    try:
        result, file, figure = made.run(options) if made else run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(made.table(result) if made else report.table(result))
    print(f"\nwrote {file} and {figure}")
    return 0


if __name__ == "__main__":
    run_command(main)

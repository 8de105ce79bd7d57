"""Compiles a training step of a model just large enough that its weights are what devices send; prints what it sends.

python tests/small_step.py fam|bswa [lime], run by test_aot.py.
"""

import dataclasses
import json
import sys

import jax

from experiments import aot, hlo
from fam_jax import DecoderConfig, MemoryConfig
from lime_jax import LimeConfig

MODEL = DecoderConfig(
    vocab_size=1024,
    num_layers=3,
    d_model=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    d_ff=1024,
    memory=MemoryConfig(block_size=64, segments=1, fam_length=8, rsp=0.8),
    dtype="bfloat16",
    remat="full",
)


def main(memory: str, lime: bool) -> None:
    jax.config.update("jax_platforms", "cpu")
    kept = MODEL.memory if memory == "fam" else dataclasses.replace(MODEL.memory, fam_length=0, rsp=0.0)
    model = dataclasses.replace(MODEL, memory=kept, mixing=LimeConfig() if lime else None)
    options = aot.Options(preset="tiny", topology="v5e:2x2", batch=8, length=256)
    config = dataclasses.replace(aot.train_config(options), model=model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=64))
    compiled, operations, _ = aot.compile_step(config, aot.tpu_devices(options.topology))
    loops = hlo.read(compiled.as_text())
    found = {
        "peak": hlo.memory_report(compiled)["peak"],
        "operations": operations,
        "bytes": hlo.total_bytes(loops),
        "gathered": sum(
            loop.executions * loop.traffic["all-gather"].bytes
            for loop in loops
            if loop.within("layers") and "all-gather" in loop.traffic
        ),
        "moves in the FAM scan": hlo.total_count(loops, hlo.MOVES, "fam_scan"),
        "bytes in the FAM scan": hlo.total_bytes(loops, "fam_scan"),
        "FAM scans": sum(loop.within("fam_scan") for loop in loops),
        "table": hlo.table(loops),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], "lime" in sys.argv[2:])

"""Collectives of compiled programs by loop: programs whose collectives are known, and texts of other compilers."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import hlo
from experiments.hlo import Traffic
from fam_jax import Decoder, presets
from lime_jax import LimeConfig

ROOT = Path(__file__).parent.parent

# Every device has 8 n rows of 256 n float32 numbers, n being the number of devices.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from experiments import hlo

if sys.argv[1] == "cpu":
    devices = jax.devices()
else:
    from jax.experimental import topologies
    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
n = len(devices)
mesh = Mesh(np.array(devices), ("data",))

def inner(x, _):
    gathered = jax.lax.all_gather(x, "data", tiled=True)
    x = jnp.tanh(gathered[: len(x)] + x)
    return jax.lax.ppermute(x, "data", [(i, (i + 1) % n) for i in range(n)]), None

def outer(x, _):
    with jax.named_scope("fam_scan"):
        x, _ = jax.lax.scan(inner, x, length=5)
    return jnp.sin(jax.lax.psum(x, "data")), None

def program(x):
    with jax.named_scope("layers"):
        x, _ = jax.lax.scan(outer, x, length=3)
    scattered = jax.lax.psum_scatter(jnp.cos(x), "data", scatter_dimension=1, tiled=True)
    return jnp.exp(scattered), jax.lax.all_to_all(jnp.sin(x), "data", 0, 0, tiled=True)

program = jax.shard_map(program, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
x = jax.ShapeDtypeStruct((8 * n * n, 256 * n), jnp.float32, sharding=NamedSharding(mesh, P("data")))
compiled = jax.jit(program).lower(x).compile()
loops = hlo.read(compiled.as_text())
print(json.dumps({
    "kind": devices[0].device_kind,
    "loops": [
        (loop.label, len(loop.path), loop.trips, loop.executions,
         {kind: (traffic.count, traffic.bytes) for kind, traffic in loop.traffic.items()})
        for loop in loops
    ],
    "total": hlo.total_bytes(loops),
    "fam_scan": hlo.total_bytes(loops, "fam_scan"),
    "memory": hlo.memory_report(compiled),
}))
"""


def run_program(where: str) -> dict:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        # Several processes may compile for TPUs side by side, and none looks for a TPU.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    command = [sys.executable, "-c", PROGRAM, where]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_program(found: dict, n: int) -> None:
    state = 8 * n * 256 * n * 4
    assert found["loops"] == [
        ["outside loops", 0, 1, 1, {"reduce-scatter": [1, state // n], "all-to-all": [1, state]}],
        ["shard_map/layers", 1, 3, 3, {"all-reduce": [1, state]}],
        ["shard_map/layers/fam_scan", 2, 5, 15, {"all-gather": [1, n * state], "collective-permute": [1, state]}],
    ]
    assert found["fam_scan"] == 15 * (n + 1) * state
    assert found["total"] == found["fam_scan"] + 4 * state + state // n
    assert found["memory"]["argument"] == state
    assert found["memory"]["peak"] > state


def test_nested_loops_on_eight_devices():
    check_program(run_program("cpu"), 8)


def test_the_same_program_for_a_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    found = run_program("v5e:2x2")
    check_program(found, 4)
    assert found["memory"]["peak"] < hlo.USABLE_BYTES[found["kind"]]


# As a GPU compiler writes it, shortened: pairs of start and done, one of them generic, and a combined all-gather.
GPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[64,8]{1,0})->bf16[64,8]{1,0}}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%async (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[16,8]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (state: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %state = (s32[], bf16[64,8]{1,0}) parameter(0)
  %x = bf16[64,8]{1,0} get-tuple-element(%state), index=1
  %start = ((bf16[16,8]{1,0}, bf16[4]{0}), (bf16[64,8]{1,0}, /*index=1*/bf16[16]{0})) all-gather-start(%x, %x)
  %done = (bf16[64,8]{1,0}, bf16[16]{0}) all-gather-done(%start)
  %scatter-start = ((bf16[64,8]{1,0}), bf16[16,8]{1,0}) async-start(%x), calls=%async
  %scatter-update = ((bf16[64,8]{1,0}), bf16[16,8]{1,0}) async-update(%scatter-start), calls=%async
  %scatter-done = bf16[16,8]{1,0} async-done(%scatter-update), calls=%async
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %next = (s32[], bf16[64,8]{1,0}) tuple(%counter, %x)
}

%condition (state: (s32[], bf16[64,8])) -> pred[] {
  %state.1 = (s32[], bf16[64,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%left (l: bf16[64,8]) -> bf16[64,8] {
  %l = bf16[64,8]{1,0} parameter(0)
  ROOT %permuted = bf16[64,8]{1,0} collective-permute(%l), source_target_pairs={{0,1},{1,0}}
}

%right (r: bf16[64,8]) -> bf16[64,8] {
  ROOT %r = bf16[64,8]{1,0} parameter(0)
}

ENTRY %main (argument: bf16[64,8]) -> bf16[64,8] {
  %argument = bf16[64,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple = (s32[], bf16[64,8]{1,0}) tuple(%zero, %argument)
  %loop = (s32[], bf16[64,8]{1,0}) while(%tuple), condition=%condition, body=%body, metadata={op_name="while"}TRIPS
  %reduce-start = ((f32[2]), f32[2]) all-reduce-start(%argument), to_apply=%add
  %reduce-done = f32[2] all-reduce-done(%reduce-start)
  %y = bf16[64,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %out = bf16[64,8]{1,0} conditional(%zero, %y, %y), branch_computations={%left, %right}
}
"""


def test_asynchronous_collectives_count_once():
    text = GPU.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"7"}}')
    program, loop = hlo.read(text)
    assert program.traffic == {"all-reduce": Traffic(1, 8), "collective-permute": Traffic(1, 1024)}
    assert (loop.trips, loop.executions, loop.label) == (7, 7, "loop")
    assert loop.traffic == {"all-gather": Traffic(1, 1024 + 32), "reduce-scatter": Traffic(1, 256)}
    assert hlo.total_bytes([program, loop]) == 8 + 1024 + 7 * (1024 + 32 + 256)


def test_a_loop_of_unknown_length():
    loops = hlo.read(GPU.replace("TRIPS", ""))
    assert loops[1].trips is None
    assert loops[1].executions is None
    with pytest.raises(ValueError, match=r"the loop loop .* has no known number of passes"):
        hlo.total_bytes(loops)
    assert hlo.table(loops).splitlines()[-1] == "| `loop` | ? | ? | 1: 0.001 ? | 1: 0.000 ? |  |  |"


# As the TPU compiler writes it, shortened: no trip count but a counter in steps of two; an all-gather that stands in
# each fusion that hides it; a reduction and a slice executed as one.
TPU = """HloModule jit_step, is_scheduled=true

%begin (p0: bf16[64]) -> (bf16[64], bf16[256]) {
  %p0 = bf16[64]{0:T(256)(128)(2,1)} parameter(0)
  %all-gather.1 = bf16[256]{0:T(256)} all-gather(%p0), backend_config={"async_collective_fusion_config":{}}
  ROOT %custom.1 = (bf16[64]{0}, bf16[256]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (p1: bf16[64]) -> bf16[256] {
  %p1 = bf16[64]{0} parameter(0)
  ROOT %all-gather.2 = bf16[256]{0} all-gather(%p1), backend_config={"async_collective_fusion_config":{}}
}

%end (p2: bf16[64]) -> bf16[256] {
  %p2 = bf16[64]{0} parameter(0)
  %all-gather.3 = bf16[256]{0} all-gather(%p2), backend_config={"async_collective_fusion_config":{}}
  ROOT %custom.2 = bf16[256]{0} custom-call(%p2, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.4 (p3: bf16[256]) -> bf16[64] {
  %p3 = bf16[256]{0} parameter(0)
  %all-reduce.5 = bf16[256]{0} all-reduce(%p3), to_apply=%add
  ROOT %slice = bf16[64]{0} dynamic-slice(%all-reduce.5)
}

%body (state: (u32[], bf16[64])) -> (u32[], bf16[64]) {
  %state = (u32[]{:T(128)}, bf16[64]{0}) parameter(0)
  %x = bf16[64]{0} get-tuple-element(%state), index=1
  %fusion.1 = (bf16[64]{0}, bf16[256]{0}) fusion(%x), kind=kCustom, calls=%begin
  %fusion.2 = bf16[256]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion
  %fusion.3 = bf16[256]{0} fusion(%x), kind=kCustom, calls=%end
  %fusion.4 = bf16[64]{0} fusion(%fusion.3), kind=kCustom, calls=%all-reduce-scatter.4
  %counter = u32[]{:T(128)} get-tuple-element(%state), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%counter, %two)
  ROOT %result = (u32[]{:T(128)}, bf16[64]{0}) tuple(%next, %fusion.4)
}

%condition (state: (u32[], bf16[64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %state.1 = (u32[]{:T(128)}, bf16[64]{0}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %limit), direction=LT
}

ENTRY %main (argument: bf16[64]) -> bf16[64] {
  %argument = bf16[64]{0} parameter(0)
  %one = u32[]{:T(128)} constant(1)
  %copy = u32[]{:T(128)} copy(%one)
  %tuple = (u32[]{:T(128)}, bf16[64]{0}) tuple(%copy, %argument)
  %loop = (u32[]{:T(128)}, bf16[64]{0}) while(%tuple), condition=%condition, body=%body
  ROOT %out = bf16[64]{0} get-tuple-element(%loop), index=1
}
"""


def test_fused_collectives_and_counters_of_the_tpu_compiler():
    program, loop = hlo.read(TPU)
    assert program.traffic == {}
    assert loop.trips == 4  # 1, 3, 5, 7
    assert loop.traffic == {"all-gather": Traffic(1, 512), "reduce-scatter": Traffic(1, 128)}
    # Where the counter is not understood nothing is guessed.
    assert hlo.read(TPU.replace("direction=LT", "direction=NE"))[1].trips is None
    assert hlo.read(TPU.replace("add(%counter, %two)", "multiply(%counter, %two)"))[1].trips is None


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("module @jit_f {\n}")


@pytest.mark.parametrize(
    ("mixing", "remat"),
    [
        (None, "full"),
        pytest.param(LimeConfig(), "none", marks=pytest.mark.slow),
        pytest.param(LimeConfig(backward="push"), "none", marks=pytest.mark.slow),
        (LimeConfig(backward="pull"), "none"),
    ],
)
def test_the_fam_scan_is_found_in_both_passes(mixing, remat):
    """It is what lies in the loop over layers and runs once a block, however the gradient is had."""
    config = dataclasses.replace(presets.tiny(), num_layers=3, mixing=mixing, remat=remat)
    model = Decoder(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

    def loss(variables, tokens):
        return jnp.sum(model.apply(variables, tokens).logits)

    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    loops = hlo.read(jax.jit(jax.grad(loss)).lower(variables, tokens).compile().as_text())
    ours = [loop for loop in loops[1:] if not loop.within("scatter-add")]  # XLA's, if it is not fused
    assert all(loop.trips == (4 if loop.within("fam_scan") or loop.within("attention") else 3) for loop in ours)
    inside = [loop for loop in ours if loop.within("fam_scan") and loop.within("layers")]
    assert {loop.executions for loop in inside} == {12}
    passes = {"transpose(" in loop.label for loop in inside}
    assert passes == {False, True}

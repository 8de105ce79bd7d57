"""Evaluation and generation on eight devices, and evaluation by several processes, give what one device gives."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from train_helpers import ROOT, environment, write_text

from experiments import evaluate, generate, results

pytestmark = pytest.mark.usefixtures("compile_cache")
PROMPT = {"prompt": "abc def", "max_new_tokens": 12, "chunk": 16}

_EIGHT = """
import json, pathlib, sys
import jax
from experiments import evaluate, generate
from experiments.checkpoint import load_model
from experiments.spread import initial_state
from fam_jax import MeshConfig, make_mesh

assert jax.device_count() == 8
asked, prompt, sizes = json.loads(sys.argv[1])
mesh = MeshConfig(**sizes)
for name, one in asked.items():
    one = {k: pathlib.Path(v) if k in ("checkpoint", "output") else v for k, v in one.items()}
    evaluate.run(evaluate.Options(**one, name=f"{name}-on-eight", mesh=mesh))
print(generate.run(generate.Options(pathlib.Path(asked["text"]["checkpoint"]), **prompt, mesh=mesh)).ids.tolist())
model, variables, _ = load_model(asked["text"]["checkpoint"], mesh=make_mesh())
params = variables["params"]
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
with jax.set_mesh(make_mesh()):
    initial_state(model, 24)
    assert compiled
    compiled.clear()
    initial_state(model, 24)
assert not compiled  # once for all batches
wq = params["layers"]["wq"]
print(json.dumps(sorted({shard.data.shape for shard in wq.addressable_shards})), wq.shape)
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Options of an evaluation of each kind, by name, and of where they write."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = {"source": write_text(folder / "words"), "data_dir": str(folder / "data")}
    common = {"output": str(folder / "results")}
    arithmetic = dataclasses.replace(tiny_run.arithmetic_config(), model=tiny_run.model_config(None, 64))
    return {
        "text": {
            "checkpoint": str(tiny_run.save(tiny_run.text_config(**data), folder / "text")),
            "batch_size": 8,
            "chunk": 32,
            **common,
        },
        "passkey": {
            "checkpoint": str(tiny_run.save(tiny_run.passkey_config(), folder / "passkey")),
            "lengths": (9,),
            "trials": 8,
            "batch_size": 8,
            "zero_memory": True,
            **common,
        },
        "answers": {"checkpoint": str(tiny_run.save(arithmetic, folder / "answers")), "batch_size": 8, **common},
    }


@pytest.fixture(scope="module")
def alone(asked):
    """The values of each on one device."""
    options = {name: evaluate.Options(**{**one, **paths(one)}) for name, one in asked.items()}
    return {name: evaluate.run(one)[0].values["curves"] for name, one in options.items()}


def paths(one):
    return {name: Path(one[name]) for name in ("checkpoint", "output")}


def assert_same_curves(file, wanted):
    curves = results.read(file).values["curves"]
    assert len(curves) == len(wanted)
    for got, curve in zip(curves, wanted, strict=True):
        assert got.keys() == curve.keys()
        for name, values in curve.items():
            number = isinstance(values, list) and not isinstance(values[0], str)
            assert got[name] == (pytest.approx(values, rel=1e-5, nan_ok=True) if number else values), name


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"data": -1, "fsdp": 1}, marks=pytest.mark.slow),
    ],
    ids=["fsdp-tensor", "fsdp", "data"],
)
def test_eight_devices(asked, alone, sizes):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT, json.dumps([asked, PROMPT, sizes])],
        cwd=ROOT,
        env=environment() | {"XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    written, where = done.stdout.splitlines()
    expected = generate.run(generate.Options(Path(asked["text"]["checkpoint"]), **PROMPT))
    assert json.loads(written) == expected.ids.tolist()
    assert where == "[[2, 2, 2, 8]] (2, 16, 2, 8)"  # an eighth of the width of each
    for name in asked:
        file = Path(asked[name]["output"], f"{name}-on-eight.json")
        assert_same_curves(file, alone[name])
        file.unlink()


def processes(count, one, name, last=()):
    """Exit codes and outputs of an evaluation by several processes, as typed; the last one has more options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.evaluate"]
    command += [f"--checkpoint={one['checkpoint']}", f"--output={one['output']}", f"--name={name}", "--batch-size=8"]
    command += [f"--distributed.coordinator=127.0.0.1:{port}", f"--distributed.num-processes={count}"]
    command += ["--chunk=32"] if name.startswith("text") else []
    started = [
        subprocess.Popen(
            [*command, f"--distributed.process-id={number}", *(last if number == count - 1 else ())],
            cwd=ROOT,
            env=environment() | {"JAX_NUM_CPU_DEVICES": str(4 // count), "MPLBACKEND": "agg"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


@pytest.mark.parametrize(
    ("count", "name"),
    [(2, "text"), pytest.param(4, "text", marks=pytest.mark.slow), pytest.param(2, "answers", marks=pytest.mark.slow)],
)
def test_several_processes(asked, alone, count, name):
    codes, outputs = processes(count, asked[name], f"{name}-by-{count}")
    assert codes == [0] * count, "\n".join(outputs)
    file = f"{asked[name]['output']}/{name}-by-{count}.json"
    assert_same_curves(file, alone[name])
    assert f"wrote {file}" in outputs[0]
    assert all("wrote" not in text for text in outputs[1:])


@pytest.mark.slow
def test_an_error_is_that_of_all_processes(asked, tmp_path):
    codes, outputs = processes(2, asked["text"] | {"checkpoint": tmp_path / "nowhere"}, "text")
    assert codes == [1, 1]
    assert all("error: no checkpoint in" in text for text in outputs), outputs


@pytest.mark.slow
def test_processes_with_other_options(asked):
    codes, outputs = processes(2, asked["text"], "text", ["--documents=1"])
    assert codes == [1, 1]
    assert all("error: process 1 has other settings than process 0" in text for text in outputs), outputs


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        evaluate.run(evaluate.Options(Path("nowhere"), mesh=evaluate.MeshConfig(tensor=3)))

"""Compiling a training step for a real TPU topology, at a size that compiles in seconds."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from train_helpers import ROOT

from experiments import aot, aot_gpu, results
from fam_jax import MeshConfig

TINY = aot.Options(preset="tiny", topology="v5e:2x2", batch=8, length=64)


def compiled(folder, *options):
    """The curve of a tiny model's step, and its table of collectives."""
    if "h100:8" not in options and importlib.util.find_spec("libtpu") is None:
        pytest.skip('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    command = [sys.executable, "-m", "experiments.aot", "--preset", "tiny", "--topology", "v5e:2x2", "--batch", "8"]
    command += ["--length", "64", "--output", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.json")
    values = results.read(file).values
    return values["curves"][0], values["collectives"]


@functools.cache
def small(*words):
    """What `small_step.py` prints."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    command = [sys.executable, str(ROOT / "tests" / "small_step.py"), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", [("fam",), ("fam", "lime")])
def test_fam_sends_hardly_more_than_its_window_alone(words):
    fam, bswa = small(*words), small("bswa")
    assert fam["FAM scans"]
    assert fam["moves in the FAM scan"] == 0, fam["table"]
    assert fam["bytes in the FAM scan"] <= 1e-3 * fam["bytes"], fam["table"]  # small sums: gradients of the norms
    # The prompt climbs by the same gathered weights, and gradients of all uses of a weight are summed before they move.
    assert fam["gathered"] <= 1.01 * bswa["gathered"], fam["table"]
    assert fam["bytes"] <= 1.02 * bswa["bytes"], fam["table"]
    if words == ("fam",):
        assert fam["peak"] <= 1.35 * bswa["peak"]
        # Of 64 tokens a block 8 more for the FAM, which read the block, too: more than at the real models' 64 of 1024.
        assert 1.1 * bswa["operations"] < fam["operations"] < 1.2 * bswa["operations"]


@pytest.mark.parametrize("options", [(), ("--microbatch", "4")])
def test_the_fam_scan_moves_no_weights(tmp_path, options):
    curve, collectives = compiled(tmp_path, *options)
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in collectives.splitlines()]
    scans = [dict(zip(header, row, strict=True)) for row in rows if "fam_scan" in row[0]]
    assert scans
    for scan in scans:
        for kind in ("all-gather", "reduce-scatter", "collective-permute", "all-to-all"):
            assert not scan.get(kind), (kind, collectives)
    assert any(dict(zip(header, row, strict=True)).get("all-gather") for row in rows)  # but elsewhere they are gathered
    assert curve["peak_gib"][0] < 0.9 * curve["usable_gib"][0]
    assert curve["devices"] == [4]
    if not options:
        assert curve["flops"] == curve["flops_formula"]  # nothing is recomputed at this size
    assert curve["forward_flops"] == curve["forward_formula"]


def test_with_lime(tmp_path):
    curve, collectives = compiled(tmp_path, "--lime")
    assert curve["peak_gib"][0] < 0.9 * curve["usable_gib"][0]
    assert curve["forward_flops"][0] == pytest.approx(curve["forward_formula"][0], rel=0.01)
    assert "fam_scan" in collectives


@pytest.mark.parametrize("mesh", ["sequence=4", "fsdp=2,sequence=2", "tensor=2,sequence=2"])
def test_a_text_spread_over_chips(tmp_path, mesh):
    """Segments and the FAM go from chip to chip, and no chip gathers the text of others.

    In the FAM's turns chips do different things, so that nothing that all take part in may be there.
    """
    curve, collectives = compiled(tmp_path, "--lime", "--mesh", mesh)
    assert curve["fam_scan_moves"] == [0], collectives
    header = collectives.splitlines()[0]
    assert "collective-permute" in header
    if mesh == "sequence=4":
        assert "all-gather" not in header, collectives
        assert "all-to-all" not in header, collectives


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_generation(tmp_path, what):
    curve, collectives = compiled(tmp_path, "--what", what)
    assert curve["peak_gib"][0] < 0.9 * curve["usable_gib"][0]
    assert ("fam_scan" in collectives) == (what == "prefill")  # a token's step goes through the layers block by block
    assert curve["fam_scan_moves"] == [0]
    assert curve["flops"][0] > 0
    assert what in curve["label"]


def test_a_mesh_whose_axes_are_parts_of_a_ring(tmp_path):
    curve, _ = compiled(tmp_path, "--topology", "v5p:4x4x4", "--mesh", "fsdp=-1,tensor=2", "--batch", "32")
    assert curve["devices"] == [64]


def test_bswa_counts_less(tmp_path):
    fam, _ = compiled(tmp_path / "fam")
    bswa, collectives = compiled(tmp_path / "bswa", "--memory", "bswa")
    assert bswa["flops"][0] < fam["flops"][0]
    assert "fam_scan" not in collectives


def test_the_run_that_is_compiled():
    config = aot.train_config(
        dataclasses.replace(TINY, preset="palm_24b", microbatch=2, length=8192, mesh="fsdp=-1,tensor=4")
    )
    assert config.model.num_layers == 56
    assert config.accumulate == 4
    assert config.mesh == MeshConfig(fsdp=-1, tensor=4)
    assert aot.train_config(dataclasses.replace(TINY, memory="full")).model.memory is None
    assert aot.train_config(dataclasses.replace(TINY, memory="bswa")).model.fam_length == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "palm_2b"}, "preset='palm_2b' is not known; there are .*palm_1b"),
        ({"preset": "smollm2_135m"}, "preset='smollm2_135m' has full attention; give memory='full'"),
        ({"mesh": "fsdp"}, "mesh='fsdp' is not allowed; give AXIS=SIZE,... with the axes data, fsdp"),
        ({"mesh": "rows=2"}, "mesh='rows=2' is not allowed"),
        ({"microbatch": 3}, "microbatch=3 is not allowed; it must divide batch=8"),
        ({"attention": "splash", "topology": "h100:8"}, "attention='splash' is for TPUs, but topology='h100:8'"),
        ({"microbatch": 4, "what": "decode"}, "microbatch=4 is for training; what='decode' reads all rows at once"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        aot.train_config(dataclasses.replace(TINY, **change))


def test_gpus(tmp_path):
    if reason := aot_gpu.missing():
        with pytest.raises(ValueError, match=r"compiling for a GPU needs .*pip install --no-deps jax-cuda12-plugin"):
            aot_gpu.gpu_devices("h100:8")
        pytest.skip(reason)
    curve, collectives = compiled(tmp_path, "--topology", "h100:8")
    assert curve["devices"] == [8]
    assert curve["fam_scan_moves"] == [0], collectives
    assert 0 < curve["peak_gib"][0] < 0.9 * curve["usable_gib"][0]


def test_an_unknown_number_of_gpus():
    with pytest.raises(ValueError, match="topology='h100:x' is not known; of GPUs there is h100:COUNT"):
        aot_gpu.gpu_devices("h100:x")


def test_an_unknown_topology():
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(ValueError, match=r"pip install -e '.\[tpu\]'"):
            aot.tpu_devices("v5e:2x2")
    else:
        with pytest.raises(ValueError, match="topology='v9:2x2' is not known to the compiler"):
            aot.tpu_devices("v9:2x2")

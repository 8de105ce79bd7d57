"""Checkpoints from one mesh, or number of processes, on another; each in processes of its own."""

import contextlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from process_pairs import COUNTS
from test_sharding import eight_devices
from train_helpers import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_cache")]


def test_all_pairs_of_six_meshes():
    eight_devices(files=("mesh_pairs.py",))


def run_job(folder, count, what):
    """Runs a job of so many processes, which share four devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment() | {"JAX_NUM_CPU_DEVICES": str(4 // count), "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(count):
            command = [sys.executable, ROOT / "tests" / "process_pairs.py", str(port), str(count), str(number)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen([*command, folder, what], cwd=ROOT, env=variables, **pipes))
            stack.callback(processes[-1].kill)
        for process in processes:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0, out


def test_all_pairs_of_three_numbers_of_processes(tmp_path):
    for what in ("save", "restore"):
        for count in COUNTS:
            run_job(tmp_path, count, what)
    wanted = np.load(tmp_path / "1-1.npz")
    assert {".params['fam_prompt']", ".stream.fam", ".rsp.fam", ".key", "logits"} <= set(wanted)
    for before in COUNTS:
        for after in COUNTS:
            found = np.load(tmp_path / f"{before}-{after}.npz")
            assert set(found) == set(wanted)
            for name in set(wanted) - {"logits"}:
                assert found[name].dtype == wanted[name].dtype
                assert found[name].tobytes() == wanted[name].tobytes(), (before, after, name)
            difference = np.max(np.abs(found["logits"] - wanted["logits"])) / np.max(np.abs(wanted["logits"]))
            assert difference <= 1e-5, (before, after)

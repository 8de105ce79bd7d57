"""Launchers that hand a job to a scheduler: xpk's command, and SLURM's script, which is run here."""

import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from launch_fakes import AWKWARD, Fakes

from experiments.launch.__main__ import main
from experiments.launch.common import ROOT

GKE = ["--cluster", "c", "--workload", "run-1", "--zone", "us-east5-a", "--project", "p"]
WHERE = ["--cluster=c", "--zone=us-east5-a", "--project=p"]
IMAGE = "us-docker.pkg.dev/p/r/fam-jax:1"
CREATE = ["gke", "create", *GKE, "--tpu-type", "v6e-16", "--image", IMAGE]
RUN = ["--config", "lm"]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fakes = Fakes(tmp_path / "fakes", monkeypatch)
    for name in ("xpk", "kubectl", "sbatch", "scontrol"):
        fakes.add(name)
    # Like srun, which forwards SIGTERM to its tasks and ends as they do.
    fakes.add(
        "srun", '[ -e "$FAKE/wait" ] && { touch "$FAKE/up"; trap "exit 143" TERM; while :; do sleep 0.05; done; }\n'
    )
    monkeypatch.chdir(tmp_path)
    return fakes


def test_gke_create(fakes):
    assert main([*CREATE, "--slices", "2", "--max-restarts", "7", "--", *AWKWARD]) == 0
    (words,) = fakes.calls("xpk")
    assert words[:-1] == [
        *("workload", "create", *WHERE, "--workload=run-1", "--tpu-type=v6e-16", "--num-slices=2"),
        *(f"--docker-image={IMAGE}", "--max-restarts=7", "--termination-grace-period-seconds=120"),
    ]
    command = words[-1].removeprefix("--command=")
    assert command.count("$") == 2 * command.count("$$") > 0  # none is left for Kubernetes to read as a variable
    kubernetes = command.replace("$$", "$")
    fakes.add("python", "exit 143")
    # As xpk puts it into the container's script.
    done = subprocess.run(["bash", "-c", f"({kubernetes}) & PID=$!;\nwait $PID"])
    assert done.returncode == 143
    assert fakes.calls("python") == [["-m", "experiments.train", *AWKWARD]]


def test_gke_sends_signals_to_python_itself(fakes):
    assert main([*CREATE, "--", *AWKWARD]) == 0
    command = fakes.calls("xpk")[0][-1].removeprefix("--command=").replace("$$", "$")
    fakes.add("python", "echo $$; trap 'exit 143' TERM; while :; do sleep 0.05; done")
    script = f"({command}) & PID=$!; echo $PID; wait $PID"
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        numbers = [process.stdout.readline(), process.stdout.readline()]
        subprocess.run(["kill", "-TERM", numbers[0].strip()], check=True)
    assert numbers[0] == numbers[1]
    assert process.returncode == 143


def test_gke_list_logs_delete(fakes):
    assert main(["gke", "list", "--cluster", "c"]) == 0
    assert main(["gke", "delete", *GKE]) == 0
    assert fakes.calls("xpk") == [
        ["workload", "list", "--cluster=c"],
        ["workload", "delete", *WHERE, "--workload=run-1"],
    ]
    assert main(["gke", "logs", *GKE, "--lines", "9", "--follow"]) == 0
    assert fakes.calls("kubectl") == [
        [
            *("logs", "--selector=xpk.google.com/workload=run-1", "--all-containers", "--prefix", "--tail=9"),
            *("--max-log-requests=1000", "--follow"),
        ]
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "--cluster", "c", "--workload", "w", "--image", "i"], "tpu_type=None is not allowed for create"),
        (
            ["create", "--cluster", "c", "--workload", "w", "--tpu-type", "v6e-8"],
            "image=None is not allowed for create",
        ),
        (
            ["create", "--cluster", "c", "--tpu-type", "v6e-8", "--image", "i"],
            "workload=None is not allowed for create",
        ),
        (["delete", "--cluster", "c"], "workload=None is not allowed for delete; give --workload NAME"),
        (["logs", "--cluster", "c"], "workload=None is not allowed for logs"),
    ],
)
def test_gke_options_that_are_missing(words, message, fakes, capsys):
    rest = ["--", "--work-dir", "gs://b/r"] if words[0] == "create" else []
    assert main(["gke", *words, *rest]) == 2
    assert message in capsys.readouterr().err
    assert fakes.calls() == []


def test_gke_arguments_that_cannot_work(fakes, capsys):
    assert main([*CREATE, "--", "--work-dir", "runs/x"]) == 2
    assert "work_dir='runs/x' would be on the disk of a pod, which does not outlive it" in capsys.readouterr().err
    assert main([*CREATE, "--", "--work-dir", "gs://b/r", "--x", "a\nb"]) == 2
    assert "the argument 'a\\nb' has a line break, which xpk cannot pass on" in capsys.readouterr().err
    assert fakes.calls() == []


def slurm(fakes, tmp_path, *options, training=RUN):
    """Submits, and returns the script."""
    assert main(["slurm", "--name", "job", "--folder", str(tmp_path / "out"), *options, "--", *training]) == 0
    path = tmp_path / "out" / "job.sbatch"
    assert fakes.calls("sbatch") == [[str(path)]]
    return path


def test_slurm_script(fakes, tmp_path, capsys):
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "1-00", "--options", "partition=gpu", "account=me"]
    text = slurm(fakes, tmp_path, *options, training=AWKWARD).read_text()
    assert re.findall(r"^#SBATCH --(.*)", text, re.MULTILINE) == [
        *("job-name=job", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=1-00", "signal=B:USR1@120"),
        *("requeue", "open-mode=append", f"output={tmp_path}/out/%x-%j.log", "partition=gpu", "account=me"),
    ]
    assert f"\ncd {ROOT} || exit 2\n" in text
    assert "JAX_LOCAL_DEVICE_IDS" not in text
    assert "scancel JOB" in capsys.readouterr().out


def test_slurm_with_a_process_for_each_node(fakes, tmp_path):
    text = slurm(fakes, tmp_path, "--gpus-per-node", "4", "--process-per", "node").read_text()
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=4\n" in text
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in text


def run_job(path, restarts=0, seconds=None):
    """Runs the script as SLURM would; `seconds` is the time that it believes to have run."""
    text = path.read_text() if seconds is None else path.read_text().replace("step=$!", f"step=$!; SECONDS={seconds}")
    environment = f"export SLURM_JOB_ID=17 SLURM_RESTART_COUNT={restarts}\n"
    return subprocess.run(["bash", "-c", environment + text], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(0, 0), (1, 0), (2, 0), (130, 0), (134, 0), (143, 0), (127, 0), (129, 1), (137, 1), (139, 1), (255, 1)],
)
def test_slurm_exit_codes(code, requeued, fakes, tmp_path):
    """SIGTERM without the time limit's signal is from scancel."""
    fakes.add("srun", f"exit {code}")
    path = slurm(fakes, tmp_path, "--python", sys.executable, training=AWKWARD)
    assert run_job(path).returncode == code
    assert fakes.calls("scontrol") == [["requeue", "17"]] * requeued
    train = [sys.executable, "-m", "experiments.train", *AWKWARD]
    assert fakes.calls("srun") == [["--kill-on-bad-exit=0", "--wait=300", *train]]


@pytest.mark.parametrize(
    ("restarts", "seconds", "requeued"), [(4, 10, True), (5, 10, False), (5, 2000, True), (0, 10, True)]
)
def test_slurm_limits_fast_restarts(restarts, seconds, requeued, fakes, tmp_path):
    fakes.add("srun", "exit 137")
    done = run_job(slurm(fakes, tmp_path), restarts, seconds)
    assert bool(fakes.calls("scontrol")) == requeued
    assert ("not started again" in done.stderr) == (not requeued)


def test_slurm_saves_and_requeues_before_the_time_limit(fakes, tmp_path):
    fakes.write("wait")
    path = slurm(fakes, tmp_path)
    command = ["bash", "-c", f"export SLURM_JOB_ID=17 SLURM_RESTART_COUNT=9; . {shlex.quote(str(path))}"]
    with subprocess.Popen(command) as process:
        while not (fakes.folder / "up").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)  # to this process only, as `B:` says
    assert process.returncode == 143
    assert fakes.calls("scontrol") == [["requeue", "17"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a b"], "name='a b' is not allowed; it must be a file name without spaces and %"),
        (["--name", "a", "--nodes", "0"], "nodes=0 is not allowed; it must be at least 1"),
        (["--name", "a", "--options", "x\ny"], "is not allowed; write it as NAME=VALUE, e.g. partition=gpu"),
    ],
)
def test_slurm_options_that_are_wrong(options, message, fakes, tmp_path, capsys):
    assert main(["slurm", *options, "--folder", str(tmp_path / "out"), "--", *RUN]) == 2
    assert message in capsys.readouterr().err
    assert fakes.calls() == []
    assert not (tmp_path / "out").exists()

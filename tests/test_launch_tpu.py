"""Cloud TPUs: what gcloud is told, and what the workers do with it, on two workers that are folders here."""

import shlex
import subprocess

import pytest
from launch_fakes import AWKWARD, GCLOUD, PYTHON3, Fakes

from experiments.launch.__main__ import main

NAME = ["--name", "my-tpu", "--zone", "us-east5-a", "--project", "p", "--interval", "0.05"]
WHERE = ["my-tpu", "--zone=us-east5-a", "--project=p"]
KIND = ["--accelerator", "v6e-16"]
RUN = ["--config", "lm", "--work-dir", "gs://b/r"]
TRAINED = ["-m", "experiments.train"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A small one, which is copied fast."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "code.py").touch()
    git = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "code"]):
        subprocess.run([*git, *words], check=True)
    return folder


@pytest.fixture
def fakes(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.launch.common.ROOT", checkout)
    fakes = Fakes(tmp_path / "fakes", monkeypatch)
    fakes.add("gcloud", GCLOUD)
    fakes.add("python3", PYTHON3)
    yield fakes
    subprocess.run(["gcloud", "compute", "tpus", "tpu-vm", "delete"])  # ends what still trains


@pytest.fixture
def installed(fakes):
    """A TPU with the code on it, and no call noted."""
    assert main(["tpu", "create", *NAME, *KIND]) == 0
    assert main(["tpu", "install", *NAME]) == 0
    (fakes.folder / "calls").unlink()
    return fakes


def verbs(fakes):
    """What gcloud was asked to do, without the questions about states."""
    return [" ".join(call[2:4]) for call in fakes.calls("gcloud") if call[3] != "describe"]


def test_create_through_the_queue(fakes, capsys):
    account = ["--service-account", "me@p.iam.gserviceaccount.com"]
    assert main(["tpu", "create", *NAME, *KIND, "--spot", *account]) == 0
    assert fakes.calls("gcloud") == [
        ["compute", "tpus", "tpu-vm", "describe", *WHERE, "--format=value(state)"],
        ["compute", "tpus", "queued-resources", "describe", *WHERE, "--format=value(state.state)"],
        [
            *("compute", "tpus", "queued-resources", "create", *WHERE, "--accelerator-type=v6e-16", "--spot"),
            *(
                "--service-account=me@p.iam.gserviceaccount.com",
                "--node-id=my-tpu",
                "--runtime-version=v2-alpha-tpuv6e",
            ),
        ],
        ["compute", "tpus", "queued-resources", "describe", *WHERE, "--format=value(state.state)"],
        ["compute", "tpus", "queued-resources", "describe", *WHERE, "--format=value(state.state)"],
    ]
    assert "my-tpu: WAITING_FOR_RESOURCES\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v5p-32", "v2-alpha-tpuv5"), ("v5litepod-4", "v2-alpha-tpuv5-lite"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_create_at_once(accelerator, runtime, fakes):
    assert main(["tpu", "create", *NAME, "--accelerator", accelerator, "--no-queued"]) == 0
    flags = [f"--accelerator-type={accelerator}", f"--version={runtime}"]
    assert fakes.calls("gcloud")[-1] == ["compute", "tpus", "tpu-vm", "create", *WHERE, *flags]


@pytest.mark.parametrize("accelerator", [["--accelerator", "v9-8"], ["--accelerator", "v6e"], []])
def test_an_unknown_accelerator(accelerator, fakes, capsys):
    assert main(["tpu", "create", *NAME, *accelerator]) == 2
    assert "is not known; give one of v6e, v5p, v5litepod, v4" in capsys.readouterr().err
    assert fakes.calls() == []
    assert main(["tpu", "create", *NAME, "--accelerator", "v9-8", "--runtime", "v9-alpha"]) == 0


@pytest.mark.parametrize(("kind", "state"), [("node", "READY"), ("request", "WAITING_FOR_RESOURCES")])
def test_a_name_that_is_taken(kind, state, fakes, capsys):
    fakes.write(kind, state)
    assert main(["tpu", "create", *NAME, *KIND]) == 1
    assert (
        f"name='my-tpu' is taken: there is one in {'tpu-vm' if kind == 'node' else 'queued-resources'}, in state "
        in (capsys.readouterr().err)
    )
    assert verbs(fakes) == []


def test_a_request_that_fails(fakes, capsys):
    fakes.add("gcloud", GCLOUD.replace("WAITING_FOR_RESOURCES ACTIVE", "WAITING_FOR_RESOURCES FAILED"))
    assert main(["tpu", "create", *NAME, *KIND]) == 1
    assert "the request for 'my-tpu' is FAILED; see why by `gcloud compute" in capsys.readouterr().err


def test_gcloud_that_knows_nothing_of_the_tpu(fakes, capsys):
    fakes.add("gcloud", "echo 'ERROR: no active account' >&2; exit 1")
    assert main(["tpu", "create", *NAME, *KIND]) == 1
    assert "cannot tell the state of 'my-tpu': ERROR: no active account" in capsys.readouterr().err


def test_install_and_train_on_all_workers(fakes, capfd):
    assert main(["tpu", "create", *NAME, *KIND]) == 0
    assert main(["tpu", "start", *NAME, "--", *RUN]) == 1
    assert main(["tpu", "install", *NAME]) == 0
    copy = next(call for call in fakes.calls("gcloud") if call[3] == "scp")
    assert copy[:4] + copy[5:] == ["compute", "tpus", "tpu-vm", "scp", "my-tpu:", "--worker=all", *WHERE[1:]]
    assert copy[4].endswith("/fam-jax.bundle")
    folder = str(fakes.folder)
    assert fakes.calls("python3")[:3] == [
        ["-m", "pip", "install", "--quiet", "--user", "uv"],
        ["-m", "uv", "venv", "--quiet", "--allow-existing", "--python", "3.12", f"{folder}/w0/fam-jax-venv"],
        ["-m", "uv", "pip", "install", "--quiet", "--python", f"{folder}/w0/fam-jax-venv/bin/python", "-e", ".[tpu]"],
    ]
    for home in ("w0", "w1"):
        assert (fakes.folder / home / "fam-jax" / "code.py").is_file()
        fakes.write(f"codes-{home}", "run")

    assert main(["tpu", "start", *NAME, "--", *AWKWARD]) == 0
    ssh = [call for call in fakes.calls("gcloud") if call[3] == "ssh"]
    assert all("--worker=all" in call for call in ssh)
    assert main(["tpu", "status", *NAME]) == 0
    assert fakes.calls("trainer") == [[*TRAINED, *AWKWARD]] * 2
    assert main(["tpu", "start", *NAME, "--", *AWKWARD]) == 1
    assert main(["tpu", "install", *NAME]) == 1
    assert len(fakes.calls("trainer")) == 2
    captured = capfd.readouterr()
    assert captured.out.count("\ntraining: running on ") == 2
    assert "nothing is installed here; use install first" in captured.err
    assert captured.err.count("training is running here; stop it first") == 4

    assert main(["tpu", "stop", *NAME]) == 0
    assert main(["tpu", "logs", *NAME, "--lines", "7"]) == 0
    assert capfd.readouterr().out.count("\ntraining: 143 on ") == 2
    assert main(["tpu", "delete", *NAME]) == 0
    deletion = ["compute", "tpus", "queued-resources", "delete", *WHERE, "--force", "--quiet"]
    assert fakes.calls("gcloud")[-1] == deletion
    assert main(["tpu", "delete", *NAME, "--no-queued"]) == 0
    assert fakes.calls("gcloud")[-1] == ["compute", "tpus", "tpu-vm", "delete", *WHERE, "--quiet"]


def test_watch_from_nothing_to_the_end(fakes):
    assert main(["tpu", "watch", *NAME, *KIND, "--", *AWKWARD, "--work-dir", "gs://b/r"]) == 0
    assert verbs(fakes)[:4] == ["queued-resources create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    assert fakes.calls("trainer") == [[*TRAINED, *AWKWARD, "--work-dir", "gs://b/r"]] * 2


@pytest.mark.parametrize("queued", [True, False])
def test_watch_recreates_after_a_preemption(queued, fakes, capsys):
    fakes.write("lives", "READY READY PREEMPTED", "READY")
    for home in ("w0", "w1"):
        fakes.write(f"codes-{home}", "run", "0")
    assert main(["tpu", "watch", *NAME, *KIND, "--spot", *([] if queued else ["--no-queued"]), "--", *RUN]) == 0
    group = "queued-resources" if queued else "tpu-vm"
    changes = [verb for verb in verbs(fakes) if verb.split()[1] in ("create", "delete", "scp")]
    assert changes == [f"{group} create", "tpu-vm scp", f"{group} delete", f"{group} create", "tpu-vm scp"]
    assert len(fakes.calls("trainer")) == 4
    assert "my-tpu: PREEMPTED; making it" in capsys.readouterr().out


def test_watch_deletes_a_request_that_lost_its_tpu(fakes):
    fakes.write("request", "SUSPENDED")
    assert main(["tpu", "watch", *NAME, *KIND, "--", *RUN]) == 0
    assert verbs(fakes)[:2] == ["queued-resources delete", "queued-resources create"]


def test_watch_goes_on_waiting_for_an_earlier_request(installed):
    """A launcher that was interrupted while it waited must not lose its place in the queue."""
    (installed.folder / "node").unlink()
    installed.write("request", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    installed.add("gcloud", GCLOUD.replace('cp "$5"', 'echo READY > "$FAKE/node"; cp "$5"'))
    assert main(["tpu", "watch", *NAME, *KIND, "--", *RUN]) == 0
    assert not {"queued-resources create", "queued-resources delete"} & set(verbs(installed))


def test_watch_starts_again_after_a_signal(installed):
    for home in ("w0", "w1"):
        installed.write(f"codes-{home}", "143", "137", "0")
    assert main(["tpu", "watch", *NAME, *KIND, "--", *RUN]) == 0
    assert len(installed.calls("trainer")) == 6
    assert not {"queued-resources create", "queued-resources delete"} & set(verbs(installed))


@pytest.mark.parametrize(
    ("codes", "expected"), [(("0", "0"), 0), (("1", "134"), 1), (("2", "2"), 2), (("130", "0"), 130)]
)
def test_watch_ends_with_training(codes, expected, installed):
    for home, code in zip(("w0", "w1"), codes, strict=True):
        installed.write(f"codes-{home}", code, "0")
    assert main(["tpu", "watch", *NAME, *KIND, "--", *RUN]) == expected
    assert len(installed.calls("trainer")) == 2


def test_watch_takes_over_what_runs(installed, capsys):
    for home in ("w0", "w1"):
        installed.write(f"codes-{home}", "run")
    assert main(["tpu", "start", *NAME, "--", *RUN]) == 0
    installed.write("node", "READY", "READY", "STOPPED")
    assert main(["tpu", "watch", *NAME, *KIND, "--", *RUN]) == 1
    assert "'my-tpu' was stopped by hand" in capsys.readouterr().err
    assert len(installed.calls("trainer")) == 2


def test_watch_starts_on_all_workers_or_none(installed):
    """A start that reached one worker only would wait for the other."""
    subprocess.run(["rm", "-r", str(installed.folder / "w1" / "fam-jax-venv")], check=True)
    installed.write("codes-w0", "run")
    assert main(["tpu", "start", *NAME, "--", *RUN]) == 1
    assert main(["tpu", "watch", *NAME, *KIND, "--", *RUN]) == 0
    assert len(installed.calls("trainer")) == 3


def test_watch_gives_up_when_training_never_lasts(installed, capsys):
    for home in ("w0", "w1"):
        installed.write(f"codes-{home}", *["137"] * 10)
    assert main(["tpu", "watch", *NAME, *KIND, "--max-starts", "3", "--", *RUN]) == 1
    assert "training was started 3 times within 30 minutes" in capsys.readouterr().err
    assert len(installed.calls("trainer")) == 6


def test_watch_gives_up_without_capacity(fakes, capsys):
    fakes.write("no-capacity")
    assert main(["tpu", "watch", *NAME, *KIND, "--max-starts", "2", "--", *RUN]) == 1
    assert verbs(fakes) == ["queued-resources create"] * 2
    assert "looking again in 0.05 s" in capsys.readouterr().out


def test_watch_needs_a_bucket(fakes, capsys):
    assert main(["tpu", "watch", *NAME, *KIND, "--", "--config", "lm"]) == 2
    assert (
        "work_dir=None would be on the TPU's own disk, which goes with it; give --work-dir" in capsys.readouterr().err
    )
    assert fakes.calls() == []


def test_what_is_shown_can_be_pasted(installed, capsys):
    assert main(["tpu", "start", *NAME, "--dry-run", "--", *AWKWARD]) == 0
    line = capsys.readouterr().out.removeprefix("$ ")
    subprocess.run(["bash", "-c", line], check=True)
    assert installed.calls("gcloud") == [shlex.split(line)[1:]]
    assert installed.calls("trainer") == [[*TRAINED, *AWKWARD]] * 2

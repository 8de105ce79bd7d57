"""Plain hosts, which are folders here: how each is started, and how all end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_fakes import AWKWARD, SSH, Fakes

from experiments.launch.__main__ import main

RUN = ["--config", "lm"]
TRAINED = ["-m", "experiments.train"]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fakes = Fakes(tmp_path / "fakes", monkeypatch)
    fakes.add("ssh", SSH)
    monkeypatch.setattr("experiments.launch.ssh.POLL_SECONDS", 0.02)
    return fakes


def launch(tmp_path, hosts, *options, training=RUN):
    words = ["ssh", "--hosts", *hosts, "--logs", str(tmp_path / "logs"), "--grace", "0.5", *options]
    return main([*words, "--", *training])


def test_what_each_host_runs(fakes, tmp_path):
    assert launch(tmp_path, ["me@a", "b"], training=AWKWARD) == 0
    calls = sorted(fakes.calls("ssh"), key=lambda call: call[-2], reverse=True)
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15"]
    assert [call[:-1] for call in calls] == [[*options, "-o", "ServerAliveCountMax=4", host] for host in ("me@a", "b")]
    flags = ["--distributed.coordinator", "a:8476", "--distributed.num-processes", "2", "--distributed.process-id"]
    trained = sorted(fakes.calls("trainer"), key=lambda call: call[-1])
    assert trained == [[*TRAINED, *AWKWARD, *flags, number] for number in ("0", "1")]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["0-me@a.log", "1-b.log"]


def test_an_address_for_the_coordinator(fakes, tmp_path):
    options = ["--coordinator", "10.0.0.1:99", "--directory", "fam-jax", "--python", ".venv/bin/python"]
    assert launch(tmp_path, ["a"], *options) == 0
    assert fakes.calls("trainer")[0][4:6] == ["--distributed.coordinator", "10.0.0.1:99"]


@pytest.mark.parametrize("code", [1, 2])
def test_one_that_fails_ends_the_others(code, fakes, tmp_path, capsys):
    fakes.write("codes-a", "run")
    fakes.write("codes-b", str(code))
    fakes.write("codes-c", "run")
    start = time.monotonic()
    assert launch(tmp_path, ["a", "b", "c"], "--grace", "20") == code
    assert time.monotonic() - start < 15
    out = capsys.readouterr().out
    assert f"process 1 on b ended with exit code {code}: it printed nothing" in out
    assert "ending process 0 on a" in out
    assert "ending process 2 on c" in out
    started = [call[-1] if call[-2] == "--distributed.process-id" else call for call in fakes.calls("trainer")]
    # None was started again; one that is ended at once may not have come as far as being seen.
    assert "1" in started
    assert len(set(started)) == len(started) <= 3, started


def test_all_have_time_to_save_after_a_signal(fakes, tmp_path, capsys):
    """The signal's second coming would interrupt the others while they save."""
    fakes.write("codes-a", "143", "0")
    fakes.write("codes-b", "run", "0")
    start = time.monotonic()
    assert launch(tmp_path, ["a", "b"]) == 0
    assert time.monotonic() - start > 0.5
    assert len(fakes.calls("trainer")) == 4
    assert "starting again; training continues from its last checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_no_restart(code, fakes, tmp_path):
    fakes.write("codes-a", str(code), "0")
    assert launch(tmp_path, ["a"]) == code
    assert len(fakes.calls("trainer")) == 1


def test_a_host_that_cannot_be_reached(fakes, tmp_path, capsys):
    fakes.write("unreachable-b")
    fakes.write("codes-a", *["run"] * 3)
    assert launch(tmp_path, ["a", "b"], "--max-starts", "2") == 1
    captured = capsys.readouterr()
    assert "process 1 on b ended with exit code 255: ssh: connect to host b: No route to host" in captured.out
    assert "training was started 2 times within 30 minutes" in captured.err


def test_a_process_that_will_not_end_is_killed(fakes, tmp_path):
    stubborn = "[ $(basename $HOME) = b ] && { sleep 0.3; exit 1; }\ntrap '' TERM\necho $$ > $FAKE/stubborn\n"
    fakes.add("trainer", stubborn + "while :; do sleep 0.05; done", fakes.folder / "trainer")
    assert launch(tmp_path, ["a", "b"]) == 1
    assert not Path(f"/proc/{(fakes.folder / 'stubborn').read_text().strip()}").exists()


def test_interrupted_by_the_user(fakes, tmp_path):
    """Ctrl-C ends the processes on the hosts, with time to save, and the launcher."""
    saves = "trap 'sleep 0.2; touch $FAKE/saved; exit 143' TERM\ntouch $FAKE/up\nwhile :; do sleep 0.05; done"
    fakes.add("trainer", saves, fakes.folder / "trainer")
    words = ["ssh", "--hosts", "a", "--logs", str(tmp_path / "logs"), "--", *RUN]
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "experiments.launch", *words]
    process = subprocess.Popen(
        command,
        env=dict(os.environ, PYTHONPATH=str(root)),
        start_new_session=True,
        # Where the tests run in the background, a shell has made their children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (fakes.folder / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (fakes.folder / "saved").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "hosts=() is not allowed; give at least one, e.g. --hosts user@gpu1 user@gpu2"),
        (["--hosts", "a", "a"], "hosts='a' is there twice; one process drives all devices of its host"),
        (["--hosts", "a", "--coordinator", "a"], "coordinator='a' has no port; give HOST:PORT"),
        (["--hosts", "a", "--max-starts", "0"], "max_starts=0 is not allowed; it must be at least 1"),
    ],
)
def test_options_that_are_wrong(options, message, fakes, capsys):
    assert main(["ssh", *options, "--", *RUN]) == 2
    assert message in capsys.readouterr().err
    assert fakes.calls() == []

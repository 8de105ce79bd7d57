"""What all launchers share: the command line, what is run and shown, and when training starts again."""

import re
import shlex
import shutil

import pytest
from launch_fakes import AWKWARD, Fakes

from experiments.launch import common
from experiments.launch.__main__ import main

LAUNCHERS = {
    "gcloud": ["tpu", "watch", "--name", "t", "--accelerator", "v6e-8"],
    "xpk": ["gke", "create", "--cluster", "c", "--workload", "w", "--tpu-type", "v6e-16", "--image", "i"],
    "sbatch": ["slurm", "--name", "job"],
    "ssh": ["ssh", "--hosts", "a", "b"],
}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([1, 1], 1),
        ([0, 2], 2),
        ([130, 130], 130),
        ([143, 143], None),
        ([137, 1], None),  # one was killed, which the other could only report
        ([255, 134], None),
        ([1, 134, 134], 1),  # one failed, and JAX aborted the others
        ([134, 134], None),
        ([0, 134], None),
        ([127], 127),
    ],
)
def test_what_exit_codes_mean(codes, expected):
    assert common.verdict(codes) == expected


def test_starts_are_limited_within_half_an_hour_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    starts = common.Starts(2)
    for _ in range(10):
        starts.count()
        now[0] += 1000
    starts.count()
    with pytest.raises(common.GiveUpError, match="2 times within 30 minutes"):
        starts.count()
    with pytest.raises(ValueError, match="max_starts=0 is not allowed"):
        common.Starts(0)


@pytest.mark.parametrize(
    "words", [["--work-dir", "gs://b/r"], ["--work-dir=gs://b/r"], ["--work_dir", "gs://b/r", "--x"]]
)
def test_a_run_in_a_bucket(words):
    common.check_bucket(words, "would be lost")


@pytest.mark.parametrize("words", [[], ["--work-dir"], ["--work-dir", "runs/x"], ["--work-dir=gs://b", "--work-dir=r"]])
def test_a_run_that_is_not_in_a_bucket(words):
    with pytest.raises(ValueError, match=r"work_dir=.* would be lost; give --work-dir gs://BUCKET/RUN"):
        common.check_bucket(words, "would be lost")


@pytest.mark.parametrize("program", LAUNCHERS)
def test_without_a_training_command(program, capsys):
    for rest in ([], ["--"]):
        assert main([*LAUNCHERS[program], *rest]) == 2
        assert "needs the training command line after `--`, e.g. -- --config" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["tpu", "delete", "--name", "t"], ["gke", "list", "--cluster", "c"]])
def test_a_training_command_where_nothing_trains(words, capsys):
    assert main([*words, "--", "--config", "lm"]) == 2
    assert f"{words[1]} trains nothing, but got `-- --config lm`; leave it away" in capsys.readouterr().err


@pytest.mark.parametrize("program", LAUNCHERS)
def test_a_program_that_is_not_there(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("experiments.launch.tpu_watch.FAILURES", 0)
    extra = ["--folder", str(tmp_path)] if program == "sbatch" else []
    assert main([*LAUNCHERS[program], *extra, "--", *AWKWARD]) == 1
    assert f"error: {program} is not on the PATH; {common.REMEDIES[program]}" in capsys.readouterr().err


@pytest.mark.parametrize("program", LAUNCHERS)
def test_a_dry_run_runs_nothing(program, tmp_path, monkeypatch, capsys):
    fakes = Fakes(tmp_path / "fakes", monkeypatch)
    for name in ("gcloud", "xpk", "kubectl", "sbatch", "ssh", "git"):
        fakes.add(name)
    monkeypatch.chdir(tmp_path)
    assert main([*LAUNCHERS[program], "--dry-run", "--", *AWKWARD]) == 0
    out = capsys.readouterr().out
    assert f"$ {program} " in out
    assert "experiments.train" in out
    assert fakes.calls() == []
    assert [path.name for path in tmp_path.iterdir()] == ["fakes"]


def test_a_command_that_fails_is_named(tmp_path, monkeypatch, capsys):
    Fakes(tmp_path, monkeypatch).add("xpk", "exit 3")
    assert main(["gke", "list", "--cluster", "c"]) == 1
    assert "`xpk workload list --cluster=c ...` ended with exit status 3" in capsys.readouterr().err
    assert shutil.which("xpk") == str(tmp_path / "bin" / "xpk")


@pytest.mark.parametrize("page", ["cloud-tpu", "gke", "slurm", "ssh"])
def test_commands_of_the_documentation(page, tmp_path, monkeypatch, capsys):
    """Each is understood, and shows what it would run."""
    monkeypatch.chdir(tmp_path)
    text = (common.ROOT / "experiments" / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"python -m experiments\.launch ([^`\n]+-[^`\n]+)", text)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(re.sub(r"\$\w+", "value", command.replace("gs://$BUCKET", "gs://bucket")))
        end = words.index("--") if "--" in words else len(words)
        assert main([*words[:end], "--dry-run", *words[end:]]) == 0, command
        assert "$ " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []

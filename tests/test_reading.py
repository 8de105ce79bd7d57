"""A long text read in a stream: what is measured on the way, and that memory does not grow."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from train_helpers import ROOT, environment

from experiments import reading, report, results
from experiments.conversation import Reader, Style
from experiments.data import DataError
from experiments.data.tokenizers import ByteTokenizer
from fam_jax import MemoryConfig

LINE = "def f(x): return 'ö'\n"  # 22 bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run on bytes of text."""
    return tiny_run.save(tiny_run.text_config(), tmp_path_factory.mktemp("run"))


def text_file(folder, text):
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def measure(run, text, **options):
    """The values and the curve of a result."""
    result, _, _ = reading.run(reading.Options(run, text, chunk=16, output=text.parent, **options))
    (curve,) = result.values["curves"]
    return result.values, curve


def test_a_text_is_measured_at_evenly_spaced_places(run, tmp_path, monkeypatch, capsys):
    path = text_file(tmp_path, LINE * 100)
    words = ["--checkpoint", run, "--text", path, "--chunk", 10, "--points", 5, "--output", tmp_path, "--name", "demo"]
    monkeypatch.setattr(sys, "argv", ["reading", *map(str, words)])
    assert reading.main() == 0
    result = results.read(tmp_path / "demo.json")
    assert result.kind == "reading"
    assert result.config["reading"]["points"] == 5
    assert set(result.data) == {"sha256"}
    assert result.values["text"] == {"bytes": 2200, "characters": 2100, "tokens": 2200}
    assert result.values["tokens_read"] == 2200
    assert result.values["extrapolated_seconds_for_all"] is None
    (curve,) = result.values["curves"]
    assert curve["tokens"] == [448, 896, 1344, 1792, 2200]  # chunks of 10 are read as whole blocks, of 16
    assert curve["seconds"] == sorted(curve["seconds"])
    assert curve["cpu_seconds"] == sorted(curve["cpu_seconds"])
    assert curve["seconds"][-1] == result.values["seconds"] == result.wall_seconds
    assert len(set(curve["state_bytes"])) == 1
    if Path("/proc/self/status").exists():
        assert 0 < max(curve["resident_mib"]) <= result.values["peak_resident_mib"]
    rates = np.diff([0, *curve["tokens"]]) / np.diff([0, *curve["seconds"]])
    np.testing.assert_allclose(curve["tokens_per_second"], rates, rtol=0.5)  # times are in milliseconds
    out = capsys.readouterr().out
    assert out.count("\n| ") == 6
    assert "read 2,200 of the 2,200 tokens of 2,200 bytes in" in out
    assert "extrapolated" not in out
    assert "tokens per second by tokens read" in report.table(result)
    assert (tmp_path / "demo.png").exists()


def test_a_part_is_extrapolated_and_called_so(run, tmp_path):
    values, curve = measure(run, text_file(tmp_path, LINE * 1000), limit=1111, points=3)
    assert (values["tokens_read"], values["text"]["tokens"]) == (1111, 22_000)
    assert curve["tokens"] == [384, 768, 1111]
    assert values["extrapolated_seconds_for_all"] == round(values["seconds"] / 1111 * 22_000)
    assert values["tokens_per_second"] == pytest.approx(1111 / values["seconds"], rel=1e-3)
    result = results.read(tmp_path / "tiny-reading.json")
    assert f"{values['extrapolated_seconds_for_all']:,} s (extrapolated, not measured)" in reading.summary(result)


def test_the_state_is_that_of_reading_at_once(run, tmp_path, monkeypatch):
    states = []

    class Watched(Reader):
        """Keeps the last state."""

        def read(self, pieces, state=None):
            states[:] = [super().read(pieces, state)]
            return states[0]

    text = LINE * 50
    monkeypatch.setattr(reading, "Reader", Watched)
    measure(run, text_file(tmp_path, text), points=4)
    ((state, _),) = states
    once, count = Reader(*tiny_run.init(tiny_run.model_config()), Style(1, 16)).read([ByteTokenizer().encode(text)])
    assert count == 1100
    jax.tree.map(np.testing.assert_array_equal, state, once)


@pytest.mark.parametrize(("memory", "grows"), [(tiny_run.FAM, False), (tiny_run.BSWA, False), (None, True)])
def test_only_the_cache_of_full_attention_grows_with_the_text(memory, grows, tmp_path):
    run = tiny_run.save(tiny_run.text_config(memory), tmp_path / "run")
    sizes = set()
    for lines in (1, 30):
        sizes.update(measure(run, text_file(tmp_path, LINE * lines), points=2)[1]["state_bytes"])
    assert (len(sizes) > 1) == grows


def test_installed_source_code_is_a_text_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path))
    path = reading.source_code(20_000)
    assert 20_000 - 3 <= path.stat().st_size <= 20_000
    assert path.read_text(encoding="utf-8").startswith("# file: ")
    assert reading.source_code(20_000) == path
    short = reading.source_code(10_000)
    assert path.read_bytes().startswith(short.read_bytes()[:9_990])
    monkeypatch.setattr(reading, "python_source", lambda: reading_source("ö" * 10))
    assert reading.source_code(9).read_text(encoding="utf-8") == "ö" * 4
    with pytest.raises(DataError, match="size=30: only 20 bytes of Python source are installed; ask for less"):
        reading.source_code(30)


def reading_source(text):
    from experiments.data.corpus import Source, Text

    return Source("demo", "demo", "key", ("train",), lambda split: [Text("demo", text)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--text": "empty.txt"}, "empty.txt: empty; a prompt needs some text"),
        ({"--text": "none.txt"}, "none.txt: cannot be read"),
        ({"--checkpoint": "nowhere"}, "no checkpoint in"),
        ({"--limit": "0"}, "limit=0 is not allowed; it must be at least 1"),
        ({"--points": "0"}, "points=0 is not allowed"),
        ({"--size": "0"}, "size=0 is not allowed"),
        ({"--name": "a/b"}, "cannot name a result file"),
        ({"--output": "empty.txt"}, "output='"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(options, message, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").touch()
    text_file(tmp_path, LINE)
    given = {"--checkpoint": str(run), "--text": "text.txt", "--output": "results"} | options
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reading", *(word for pair in given.items() for word in pair)])
    assert reading.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    run = tiny_run.save(tiny_run.text_config(MemoryConfig(block_size=128, fam_length=2)), tmp_path / "run")
    path = text_file(tmp_path, LINE * 120_000)  # 2.6 MB
    words = ["--checkpoint", run, "--text", path, "--output", tmp_path, "--name", "long"]
    line = [sys.executable, "-m", "experiments.reading", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (curve,) = json.loads((tmp_path / "long.json").read_text())["values"]["curves"]
    assert curve["tokens"][-1] == 2_640_000
    assert len(set(curve["state_bytes"])) == 1
    fifth = next(i for i, tokens in enumerate(curve["tokens"]) if tokens >= 2_640_000 / 5)
    grown = np.array(curve["resident_mib"][fifth:]) - curve["resident_mib"][fifth]
    assert grown.max() < 8, curve["resident_mib"]  # the ids that were read since have 8 MiB, their keys and values 258

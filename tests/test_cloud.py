"""Runs, checkpoints and data in object storage: the real clients, and a server on this machine in place of Google's."""

import dataclasses
import importlib.util
import json
import re
import shutil

import jax
import numpy as np
import pytest
from fake_gcs import serve
from test_checkpoint import trees
from test_distributed import Job, tiny_job
from train_helpers import assert_same_bits, metric_rows, plain, restore, tiny

from experiments import checkpoint, files, metrics, report, results
from experiments.checkpoint import CheckpointError, Checkpoints, load_model
from experiments.data import DataError, TextData, load, load_tokenizer, manifest
from experiments.data import cache as data_cache
from experiments.files import location, run_folder
from experiments.integrity import verify
from experiments.process import BusyError, only_process
from experiments.profiling import Profiler
from experiments.stored import find_checkpoint, write_run
from experiments.train import main, train

pytestmark = [
    pytest.mark.usefixtures("compile_cache"),
    pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"),
]


@pytest.fixture(scope="module")
def server():
    with serve() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def bucket(server):
    """The server with an empty bucket."""
    server.objects.clear()
    server.written.clear()
    server.full = False
    server.refused, server.refusal = None, 403
    return server


def in_bucket(config, **changes):
    return dataclasses.replace(config, work_dir="gs://bucket/runs/run", **changes)


def test_paths(bucket):
    assert location("gs://bucket/a/b").name == "b"
    assert str(location("gs:/bucket/a")) == "gs://bucket/a"  # what pathlib makes of it
    assert files.is_remote(location("gs://bucket/a") / "b")
    assert not files.is_remote(location("runs/gs"))
    assert str(run_folder("gs://bucket/run/checkpoints")) == "gs://bucket/run"


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--config", "passkey", "--work-dir", "gs://bucket/run"]) == 2
    assert "'gs://bucket/run' needs the package gcsfs: pip install -e \".[gcs]\"" in capsys.readouterr().err


def test_a_run_in_a_bucket_is_as_one_on_a_disk(bucket, tmp_path, capsys):
    local = plain(tmp_path, "local", steps=7, log_every=2, eval_every=3, checkpoint_every=3)
    train(local, progress=False)
    config = in_bucket(local)
    train(dataclasses.replace(config, steps=4), progress=False)
    assert bucket.below("runs/run/checkpoints/4/meta")
    result = train(config)
    assert "continuing after step 4 of 7" in capsys.readouterr().out
    assert_same_bits(restore(config).params, restore(local).params)
    assert metric_rows(config)[-1] == metric_rows(local)[-1]
    assert [row["step"] for row in metric_rows(config)] == [2, 3, 4, 4, 6, 6, 7, 7]
    names = bucket.below("runs/run/")
    assert {name.partition("/")[0] for name in names} == {"checkpoints", "metrics.jsonl", "run.json", "tensorboard"}
    # The latest two, and the one that the second process continued from.
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"4", "6", "7"}
    written = [name for name in bucket.written if name.startswith("runs/run/checkpoints/7/")]
    assert written[-1].endswith("/meta.json")
    assert sum(name.endswith("meta.json") for name in written) == 1

    folder, variables, _ = load_model("gs://bucket/runs/run")
    assert folder.config == config.model
    assert_same_bits(variables, result.variables)
    assert results.find(["gs://bucket/runs/run"]) == [location("gs://bucket/runs/run")]
    found = results.read_run("gs://bucket/runs/run")
    assert found.values["curves"][0]["step"] == [2, 4, 6, 7]
    assert results.read(results.write(found, "gs://bucket/runs/run/results")) == found
    assert len(results.find(["gs://bucket/runs/run"])) == 2
    picture = report.plot(found, location("gs://bucket/runs/run/training.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    begun = dataclasses.replace(config, init_from="gs://bucket/runs/run", work_dir=str(tmp_path / "begun"), steps=1)
    train(begun, progress=False)
    with pytest.raises(ValueError, match=r"--fresh cannot move gs://bucket/runs/run aside.*gcloud storage mv"):
        train(config, progress=False, fresh=True)


def saved(tmp_path, steps=(1, 2), **policy):
    config = in_bucket(tiny(tmp_path))
    folder = Checkpoints(config.directory / "checkpoints", **({"keep": 2} | policy))
    for step in steps:
        folder.save(step, *trees(step), config, {"step": step}, float(10 - step))
    return folder, config


def test_torn_and_damaged_checkpoints(bucket, tmp_path, capsys):
    folder, config = saved(tmp_path)
    folder.begin(3, *trees(3), config, {})
    folder.wait()
    del bucket.objects["runs/run/checkpoints/3/meta.json"]  # its process was killed just before
    assert folder.steps() == [2]
    again = Checkpoints(folder.directory, keep=2)
    assert "checkpoint gs://bucket/runs/run/checkpoints/3 is not complete" in capsys.readouterr().err
    assert not bucket.below("runs/run/checkpoints/3/")
    again.save(3, *trees(3), config, {})
    name = next(name for name in bucket.objects if name.startswith("runs/run/checkpoints/3/params") and "/d/" in name)
    content = bytearray(bucket.objects[name])
    content[len(content) // 2] ^= 1
    bucket.objects[name] = bytes(content)
    found = again.restore(*trees(), config)
    assert_same_bits((found.params, found.rest), trees(2))
    error = capsys.readouterr().err
    assert "checkpoints/3 is damaged" in error
    assert "it is now gs://bucket/runs/run/checkpoints/damaged-3" in error
    assert bucket.below("runs/run/checkpoints/damaged-3/")
    assert again.steps() == [2]
    again.save(3, *trees(3), config, {})
    assert again.steps() == [2, 3]
    assert find_checkpoint("gs://bucket/runs/run", 2)[0] == folder.directory / "2"


def test_retention(bucket, tmp_path):
    folder, _ = saved(tmp_path, range(1, 7), keep=1, every=2, best=1)
    assert folder.steps() == [2, 4, 6]
    assert {name.split("/")[0] for name in bucket.below("runs/run/checkpoints/")} == {"2", "4", "6"}


def test_a_bucket_that_refuses(bucket, tmp_path):
    folder, config = saved(tmp_path)
    bucket.full = True
    with pytest.raises(CheckpointError, match=r"checkpoint 3 could not be written to gs://.*\(steps: 1, 2\)"):
        folder.save(3, *trees(3), config, {})
    assert folder.restore(*trees(), config).step == 2
    with pytest.raises(ValueError, match=r"work_dir='gs://bucket/runs/run' cannot be used: .*quota.*exceeded"):
        train(in_bucket(plain(tmp_path)), progress=False)


@pytest.mark.parametrize("part", ["3/params/", "3/params/state/d/"])
def test_what_cannot_be_listed_is_not_missing(bucket, tmp_path, part):
    folder, config = saved(tmp_path)
    listing = f"GET /storage/v1/b/bucket/o?delimiter=/&prefix=runs/run/checkpoints/{part}&maxResults=1000"
    bucket.refused = listing
    with pytest.raises(CheckpointError, match=r"checkpoint 3 could not be written to gs://.*\(steps: 1, 2\)"):
        folder.save(3, *trees(3), config, {})
    bucket.refused = None
    folder.save(3, *trees(3), config, {})
    bucket.refused = listing
    with pytest.raises(CheckpointError, match=r"checkpoints/3 could not be read: .*start again later"):
        folder.restore(*trees(), config)
    assert folder.steps() == [2, 3]


def test_the_process_that_comes_last_takes_a_folder_over(bucket, tmp_path):
    directory = location("gs://bucket/runs/run")
    config = in_bucket(tiny(tmp_path))
    with only_process(directory) as held:
        first = Checkpoints(directory / "checkpoints", keep=2, held=held)
        first.save(1, *trees(1), config, {})
        with only_process(directory) as later:
            later()
            with pytest.raises(BusyError, match=r"another process has taken over gs://bucket/runs/run: .*host"):
                first.save(2, *trees(2), config, {})
            later()
        assert first.steps() == [1]
    assert "runs/run/lock" not in bucket.objects


def test_a_failure_deletes_only_what_is_its_own(bucket, tmp_path, monkeypatch):
    folder, config = saved(tmp_path)
    whole = bucket.below("runs/run/checkpoints/2/")
    bucket.refused = "checkpoints/2/meta.json"  # whether it is complete cannot be seen
    with pytest.raises(CheckpointError, match=r"checkpoint 2 could not be written .*they cannot be listed"):
        folder.save(2, *trees(2), config, {})
    bucket.refused = None
    assert bucket.below("runs/run/checkpoints/2/") == whole

    write_meta = checkpoint.write_meta

    def no_answer(*args):
        write_meta(*args)
        raise OSError("the answer did not come")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_meta", no_answer)
        with pytest.raises(CheckpointError, match=r"the answer did not come.*\(steps: 1, 2, 3\)"):
            folder.save(3, *trees(3), config, {})

    directory = location("gs://bucket/runs/run")
    with only_process(directory) as held, monkeypatch.context() as patch:
        first = Checkpoints(directory / "checkpoints", keep=2, held=held)

        def later(*args):
            bucket.put("runs/run/lock", b"of another process")
            raise OSError("refused")

        patch.setattr(checkpoint, "checksums", later)
        with pytest.raises(CheckpointError, match="refused"):
            first.save(4, *trees(4), config, {})
    assert bucket.below("runs/run/checkpoints/4/")


def test_an_old_checkpoint_that_cannot_be_deleted(bucket, tmp_path, capsys):
    folder, config = saved(tmp_path)
    bucket.refused = "DELETE /storage/v1/b/bucket/o/runs/run/checkpoints/1/params"
    folder.save(3, *trees(3), config, {})
    assert "the old checkpoint gs://bucket/runs/run/checkpoints/1 could not be deleted: Forb" in capsys.readouterr().err
    assert folder.steps() == [2, 3]
    assert bucket.below("runs/run/checkpoints/1/")
    bucket.refused = None
    folder.save(4, *trees(4), config, {})
    assert folder.steps() == [3, 4]
    assert not bucket.below("runs/run/checkpoints/1/")


def test_metrics_that_cannot_be_uploaded(bucket, monkeypatch, capsys):
    directory = location("gs://bucket/runs/run")
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
    with only_process(directory) as held:
        log = metrics.MetricsLog(directory, 0, held)
        bucket.full = True
        log.write(1, "train", {"loss": 1.0})
        error = capsys.readouterr().err
        assert "WARNING: metrics could not be uploaded to gs://bucket/runs/run: " in error
        assert "tried again" in error
        bucket.full = False
        log.write(2, "train", {"loss": 1.0})
        assert [row["step"] for row in metrics.read_metrics(log.path)] == [1, 2]
        with only_process(directory) as later:
            new = metrics.MetricsLog(directory, 1, later)
            log.write(3, "train", {"loss": 1.0})
            log.close()
            assert [row["step"] for row in metrics.read_metrics(log.path)] == [1]
            error = capsys.readouterr().err
            assert "another process has taken over" in error
            (place,) = set(re.findall(r"They are in (\S+): ", error))
            assert [row["step"] for row in metrics.read_metrics(f"{place}/metrics.jsonl")] == [1, 2, 3]
            new.close()
    shutil.rmtree(place)


def test_a_profile(bucket, capsys):
    for full in (True, False):
        bucket.full = full
        profiler = Profiler((1, 1), location("gs://bucket/runs/run/profile"), print)
        assert profiler.run(1, jax.jit(lambda x: x + 1), 1) == 2
        said = capsys.readouterr()
        if full:
            assert "WARNING: no profile could be written to gs://bucket/runs/run/profile: " in said.err
            (place,) = re.findall(r"What there is: (\S+)", said.err)
            shutil.rmtree(place)
    assert "a profile is in gs://bucket/runs/run/profile" in said.out
    assert any(name.endswith(".trace.json.gz") for name in bucket.below("runs/run/profile/"))


def test_errors_of_the_client_are_os_errors(bucket, tmp_path):
    folder, config = saved(tmp_path)
    directory = folder.directory.parent
    bucket.refused, bucket.refusal = "/b/bucket/o", 400  # gcsfs raises this one as an exception of its own
    for call in (
        folder.steps,
        lambda: load_model(directory),
        lambda: run_folder(directory),
        lambda: write_run(config),
        lambda: metrics.MetricsLog(directory, 0),
        lambda: files.remove(folder.directory / "1"),
        lambda: list(files.files_below(directory)),
        lambda: Checkpoints(folder.directory, keep=2),
    ):
        with pytest.raises(OSError, match="HttpError: no access"):
            call()
    with pytest.raises(results.ResultError, match=r"cannot be read .*no access"):
        results.read_run(directory)
    with pytest.raises(CheckpointError, match=r"could not be read: .*no access.*start again later"):
        verify(folder.directory / "2")
    bucket.refused = None
    assert folder.steps() == [1, 2]


def text(tmp_path, **changes) -> TextData:
    data = tiny(tmp_path).data
    return dataclasses.replace(data, data_dir="gs://bucket/data", **changes)


def test_data_is_prepared_once_and_copied(bucket, tmp_path, monkeypatch):
    config = text(tmp_path)
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path / "one"))
    batch = next(load(config))
    assert sum(name.endswith("/meta.json") for name in bucket.objects) == 2  # text and tokens
    count = len(bucket.written)
    assert next(load(config))["tokens"].tolist() == batch["tokens"].tolist()
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path / "other"))
    monkeypatch.setattr("experiments.data.tokens._write", None)  # would be called if it were prepared again
    assert next(load(config))["tokens"].tolist() == batch["tokens"].tolist()
    assert len(bucket.written) == count
    assert manifest(config)["splits"]["train"]["tokens"] > 0

    name = next(name for name in bucket.objects if name.endswith("train.bin"))
    bucket.objects[name] = bytes([bucket.objects[name][0] ^ 1]) + bucket.objects[name][1:]
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path / "third"))
    with pytest.raises(DataError, match=r"gs://bucket/data/tokens/.*/train.bin is missing or damaged"):
        load(config)
    assert not list((tmp_path / "third").rglob("train.bin"))


def test_an_upload_that_ended_early_is_made_again(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path / "one"))
    with monkeypatch.context() as patch:
        patch.setattr(data_cache, "write_meta", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(text(tmp_path))
    assert bucket.objects
    assert not [name for name in bucket.objects if name.endswith("meta.json")]
    first = next(load(text(tmp_path)))
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path / "other"))
    assert next(load(text(tmp_path)))["tokens"].tolist() == first["tokens"].tolist()
    bucket.objects.clear()
    bucket.full = True
    with pytest.raises(DataError, match=r"gs://bucket/data/.* could not be read or written: .*quota"):
        load(text(tmp_path))


def test_what_must_be_here(bucket, tmp_path):
    with pytest.raises(ValueError, match="tfds_dir='gs://bucket/tfds': must be a folder of this machine"):
        TextData(source="tfds:lm1b", tfds_dir="gs://bucket/tfds")
    with pytest.raises(DataError, match=r"tokenizer='gs://bucket/t.json': there is no such file"):
        load_tokenizer("gs://bucket/t.json")
    bucket.put("t.json", b"{}")
    with pytest.raises(DataError, match=r"gs://bucket/t.json: not a Hugging Face tokenizer.json"):
        load_tokenizer("gs://bucket/t.json")


@pytest.mark.slow
def test_two_processes(bucket, tmp_path):
    config = in_bucket(tiny_job(tmp_path, steps=4, checkpoint_every=2))
    config = dataclasses.replace(
        config, eval_every=2, data=dataclasses.replace(config.data, data_dir="gs://bucket/data")
    )
    job = Job(tmp_path, config)
    assert job.wait() == [0, 0], job.text()
    assert bucket.written.count(next(name for name in bucket.objects if name.endswith("/train.bin"))) == 1
    alone = dataclasses.replace(config, work_dir=str(tmp_path / "alone"))
    train(alone, progress=False)
    assert metric_rows(config)[-1]["loss"] == pytest.approx(metric_rows(alone)[-1]["loss"], rel=1e-5)
    # Adam divides by small numbers, so that an order of addition shows; a part in a wrong place would be far off.
    for a, b in zip(*(jax.tree.leaves(restore(run).params) for run in (config, alone)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert json.loads(bucket.objects["runs/run/checkpoints/4/meta.json"])["content"]["step"] == 4

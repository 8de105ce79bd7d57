import errno
import os
import signal
import subprocess
import sys
import tracemalloc

import data_helpers
import numpy as np
import pytest

from experiments.data import DataError, TextData, load
from experiments.data.cache import build_once
from experiments.data.tokenizers import ByteTokenizer
from experiments.data.tokens import tokenize

# Prepares text and stops in the middle of it: says so, and waits to be killed.
STOPPING = """
import os, sys, time
from experiments.data import TextData, load, sources
read, count = sources._read_text, 0
def stopping(path):
    global count
    count += 1
    if count == 8:  # all five are checked first, so this is in the middle of writing
        os.write(1, b"stopped\\n")
        time.sleep(60)
    return read(path)
sources._read_text = stopping
load(TextData(source=sys.argv[1], data_dir=sys.argv[2]))
"""
PREPARING = """
import sys
from experiments.data import TextData, manifest
print(manifest(TextData(source=sys.argv[1], data_dir=sys.argv[2]))["splits"]["train"]["tokens_sha256"])
"""
FULL = """
import resource, signal, sys
from experiments.data import DataError, TextData, load
import tensorflow_datasets, numpy
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    load(TextData(source=sys.argv[1], data_dir=sys.argv[2]))
except DataError as error:
    print(error)
"""


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(5):
        # Text that hardly compresses, so that a limit on the size of a file is met.
        letters = np.random.default_rng(i).integers(33, 127, 20_000).astype(np.uint8)
        (folder / f"{i}.txt").write_bytes(letters.tobytes())
    return f"text:{folder}"


def prepared(directory):
    """What a later run would take for complete."""
    return [p.name for p in directory.glob("*/*") if not p.name.startswith(".")]


def leftovers(directory):
    return [p for p in directory.glob("*/.*") if ".partial-" in p.name]


def test_a_killed_preparation_is_not_taken_for_complete(source, tmp_path):
    data = tmp_path / "data"
    process = subprocess.Popen(python(STOPPING, source, data), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "stopped\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not prepared(data)
    assert leftovers(data)
    config = TextData(source=source, data_dir=str(data), batch_size=2, length=64)
    batch = next(load(config))
    assert len(prepared(data)) == 2  # the text and its tokens
    assert not leftovers(data)
    other = next(load(TextData(source=source, data_dir=str(tmp_path / "other"), batch_size=2, length=64)))
    np.testing.assert_array_equal(batch["tokens"], other["tokens"])


def test_control_c_leaves_nothing(source, tmp_path):
    data = tmp_path / "data"
    process = subprocess.Popen(
        python(STOPPING, source, data),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=data_helpers.heed_interrupts,
    )
    assert process.stdout.readline() == "stopped\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert not prepared(data)
    assert not leftovers(data)


@pytest.mark.parametrize("stage", ["text", "tokens"])
def test_a_full_disk_is_one_clear_message_and_leaves_nothing(source, tmp_path, stage):
    data = tmp_path / "data"
    config = TextData(source=source, data_dir=str(data))
    if stage == "tokens":  # the text is there already
        load(config)
        (tokens,) = data.glob("tokens/[!.]*")
        tokens.rename(tmp_path / "away")
    before = prepared(data)
    done = subprocess.run(python(FULL, source, data, 50_000), capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert f"{data}/{'corpora' if stage == 'text' else 'tokens'}" in done.stdout
    assert "ree space" in done.stdout
    assert "nothing half-made was kept" in done.stdout
    assert prepared(data) == before
    assert not leftovers(data)
    assert next(load(config))["tokens"].any()


def test_two_processes_at_once_prepare_the_same(source, tmp_path):
    data = tmp_path / "data"
    processes = [subprocess.Popen(python(PREPARING, source, data), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert out[0] == out[1] != ""
    assert len(prepared(data)) == 2
    assert not leftovers(data)


def test_a_second_process_waits_for_the_first(tmp_path):
    code = """
import sys, time
from pathlib import Path
from experiments.data.cache import build_once
def build(partial):
    print("building", flush=True)
    time.sleep(0.5)
    (partial / "value").write_text("x")
print((build_once(Path(sys.argv[1]), build) / "value").read_text())
"""
    target = tmp_path / "data" / "thing"
    processes = [subprocess.Popen(python(code, target), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = "".join(process.communicate()[0] for process in processes)
    assert out.split().count("building") == 1
    assert out.split().count("x") == 2


def test_a_process_that_never_finishes_preparing(tmp_path, monkeypatch, capsys):
    code = """
import sys, time
from pathlib import Path
from experiments.data.cache import build_once
def build(partial):
    print("building", flush=True)
    time.sleep(1000)
build_once(Path(sys.argv[1]), build)
"""
    target = tmp_path / "thing"
    with subprocess.Popen(python(code, target), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "building\n"
            monkeypatch.setattr("experiments.data.cache.LOCK_SECONDS", 6.0)
            with pytest.raises(DataError, match=rf"process {process.pid} on .* has held .*\.thing\.lock for more than"):
                build_once(target, lambda partial: None)
            said = capsys.readouterr().err
            assert said.startswith(f"waiting for process {process.pid} on ")
            assert said.count("\n") == 1
        finally:
            process.kill()
    build_once(target, lambda partial: None)  # the lock is that of a process, which is gone
    assert target.is_dir()


def test_without_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    target = tmp_path / "thing"

    def inner(partial):
        (partial / "value").write_text("first")

    def outer(partial):
        (partial / "value").write_text("second")
        build_once(target, inner)  # another process that was faster

    assert build_once(target, outer) == target
    assert (target / "value").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".thing.lock", "thing"]


def test_a_directory_is_built_once(tmp_path):
    calls = []
    for _ in range(3):
        build_once(tmp_path / "a" / "b", calls.append)
    assert len(calls) == 1


def test_a_failed_build_keeps_nothing_and_can_be_repeated(tmp_path):
    def failing(partial):
        (partial / "value").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "thing", failing)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert build_once(tmp_path / "thing", lambda partial: None).is_dir()


def test_errors_of_the_disk_are_explained_and_others_are_not(tmp_path):
    def raising(number):
        def build(partial):
            raise OSError(number, os.strerror(number))

        return build

    with pytest.raises(DataError, match=r"No space left on device. Free space or choose another place with data_dir"):
        build_once(tmp_path / "thing", raising(errno.ENOSPC))
    with pytest.raises(ConnectionResetError):
        build_once(tmp_path / "thing", raising(errno.ECONNRESET))


def test_a_place_that_is_a_file(source, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(DataError, match=r"could not be prepared: .* choose another place with data_dir"):
        load(TextData(source=source, data_dir=str(tmp_path / "data")))


@pytest.mark.parametrize("name", ["train.bin", "train.npz", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped byte"])
def test_damaged_prepared_files(tmp_path, name, damage):
    data_helpers.store(tmp_path, ["abc", "defg"])
    (path,) = tmp_path.glob(f"tokens/*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    if damage == "flipped byte":
        at = content.index(b"sha256") if name == "manifest.json" else len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DataError, match=rf"is missing or damaged \(.*\): delete the directory {path.parent} and run"):
        data_helpers.store(tmp_path, ["abc", "defg"])
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    assert len(data_helpers.store(tmp_path, ["abc", "defg"])) == 2


def test_a_flipped_byte_anywhere_is_noticed_or_changes_nothing(tmp_path):
    def read():
        store = data_helpers.store(tmp_path, ["abc", "defg"])
        return store.names.tolist(), [store.read(document).tolist() for document in range(len(store))]

    expected, noticed = read(), 0
    for path in tmp_path.glob("tokens/*/train.*"):
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            try:
                assert read() == expected, f"{path.name}, byte {at}"
            except DataError:
                noticed += 1
        path.write_bytes(content)
    assert noticed > 300  # others are dates and the like of the archive


def test_damaged_prepared_text(source, tmp_path):
    data = tmp_path / "data"
    load(TextData(source=source, data_dir=str(data)))
    (tokens,) = data.glob("tokens/[!.]*")
    tokens.rename(tmp_path / "away")
    (records,) = data.glob("corpora/[!.]*/text_corpus/*/*train.array_record*")
    records.write_bytes(records.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"text_corpus is missing or damaged \(.*\): delete the directory"):
        load(TextData(source=source, data_dir=str(data)))


def test_where_data_is_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("FAM_JAX_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TextData().directory == tmp_path / ".cache" / "fam_jax"
    monkeypatch.setenv("FAM_JAX_DATA", str(tmp_path / "elsewhere"))
    assert TextData().directory == tmp_path / "elsewhere"
    assert TextData(data_dir="~/mine").directory == tmp_path / "mine"


def test_opened_tokens_stay_on_the_disk(tmp_path):
    texts = ["x" * 2_000_000] * 10
    data_helpers.store(tmp_path, texts)
    source, tokenizer = data_helpers.Lines(tuple(texts)), ByteTokenizer()
    assert source.key
    tracemalloc.start()
    opened = tokenize(source, tokenizer, tmp_path).split("train")
    assert opened.read(3, 1_000_000, 1_000_010).tolist() == [ord("x")] * 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000

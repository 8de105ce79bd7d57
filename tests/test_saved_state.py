"""States in files: they go on bit for bit, and those of other models, torn or damaged files are refused."""

import json
import resource
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny_chat
import tiny_run

from experiments import generate as command
from experiments import saved_state
from experiments.checkpoint import load_model
from experiments.data import load_tokenizer
from experiments.saved_state import load_state, origin, save_state
from experiments.stored import find_checkpoint
from fam_jax import MemoryConfig

KINDS = {
    "fam": (tiny_run.FAM, {}),
    "window": (tiny_run.BSWA, {}),
    "full": (None, {}),
    "bfloat16": (tiny_run.FAM, {"dtype": "bfloat16"}),
    "autocompressor": (
        MemoryConfig(block_size=8, fam_length=2, kind="autocompressor", summaries=3),
        {"schedule": "block"},
    ),
}
TEXT = "The ship is called Marigold.\n" * 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A file with a state, and the model and origin it belongs to."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "text").write_text(TEXT)
    options = command.Options(run, context_file=(folder / "text",), save_state=folder / "state", chunk=16)
    assert command.run(options) is None
    model, *_ = load_model(run)
    return folder / "state", model, about(run)


def about(run, head=""):
    _, meta, config = find_checkpoint(run)
    return origin(meta, command.tokenizer_of(config, run)[0], head)


def main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments), "--max-new-tokens", "6", "--chunk", "16"])
    code = command.main()
    return code, *capsys.readouterr()


@pytest.mark.parametrize(("memory", "model"), KINDS.values(), ids=KINDS.keys())
def test_a_loaded_state_goes_on_bit_for_bit(memory, model, tmp_path, monkeypatch, capsys):
    run = tiny_chat.save(tmp_path / "run", memory, **model)
    (tmp_path / "text").write_text(TEXT)
    reading = {"context_file": (tmp_path / "text",), "chunk": 16, "max_new_tokens": 6}
    file = tmp_path / "new" / "state"
    straight = command.run(command.Options(run, prompt="Who?", save_state=file, **reading))
    # What it was trained in does not matter, nor where that is.
    shutil.move(run, tmp_path / "moved")
    later = command.run(command.Options(tmp_path / "moved", prompt="Who?", load_state=file, chunk=16, max_new_tokens=6))
    np.testing.assert_array_equal(straight.ids, later.ids)
    for one, other in zip(jax.tree.leaves(straight.state), jax.tree.leaves(later.state), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    if "dtype" in model:
        assert straight.state.fam.dtype == model["dtype"]
    assert [path.name for path in file.parent.iterdir()] == ["state"]
    code, out, err = main(
        monkeypatch, capsys, "--checkpoint", tmp_path / "moved", "--load-state", file, "--prompt=Who?"
    )
    assert (code, out) == (0, straight.text + "\n")
    tokenizer = load_tokenizer(str(tmp_path / "moved" / "tokenizer.json"))
    assert f"begins after {len(tokenizer.encode(TEXT))} tokens" in err


def test_states_of_a_text_and_of_a_chat_are_not_the_same(run, saved, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    common = ["--checkpoint", run, "--chat"]
    code, _, err = main(monkeypatch, capsys, *common, "--load-state", saved[0], "--prompt", "a")
    assert code == 2
    assert "belongs to another chat: chat is '' there and '<|im_start|>system" in err
    (tmp_path / "text").write_text(TEXT)
    files = ["--context-file", tmp_path / "text", "--save-state", tmp_path / "state"]
    question = ["--question", "Who?"]
    code, straight, err = main(monkeypatch, capsys, *common, *files, *question)
    assert code == 0, err
    code, later, err = main(monkeypatch, capsys, *common, "--load-state", tmp_path / "state", *question)
    assert (code, later) == (0, straight), err
    options = [*common, "--load-state", tmp_path / "state", "--system", "Be brief.", *question]
    code, _, err = main(monkeypatch, capsys, *options)
    assert code == 2
    assert "give the same --chat and --system" in err


def test_a_state_of_another_model_is_refused_by_name(saved, tmp_path, monkeypatch, capsys):
    file, *_ = saved
    model = tiny_chat.save(tmp_path / "model", qk_norm=True)
    again = tiny_chat.save(tmp_path / "again")  # the same parameters, of another training
    (tmp_path / "text").write_text(TEXT)
    own = tmp_path / "state"
    command.run(command.Options(again, context_file=(tmp_path / "text",), save_state=own, chunk=16))
    words = shutil.copytree(again, tmp_path / "words")
    tiny_chat.write_tokenizer(words, seed="other words")
    for run, state, message in (
        (model, file, "model: model.qk_norm is False there and True here"),
        (again, file, "checkpoint: parameters is"),
        (words, own, "tokenizer: tokenizer is"),
    ):
        code, out, err = main(monkeypatch, capsys, "--checkpoint", run, "--load-state", state, "--prompt", "a")
        assert (code, out) == (2, ""), message
        assert err.splitlines()[-1].startswith(f"error: --load-state='{state}' belongs to another {message}")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_torn_file_is_refused(saved, tmp_path, part):
    file, model, about = saved
    content = file.read_bytes()
    torn = tmp_path / "state"
    torn.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"--load-state='.*' is damaged, or no saved state .*; read the text again"):
        load_state(torn, model, about)


def test_no_changed_byte_changes_the_state(saved, tmp_path):
    """It is refused, or was one of those that nothing is read from."""
    file, model, about = saved
    want, _ = load_state(file, model, about)
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    places = {*rng.integers(0, len(content), 150), *range(80), *range(len(content) - 400, len(content), 3)}
    changed = tmp_path / "state"
    refused = same = 0
    for at in places:
        data = bytearray(content)
        data[at] ^= 1 << int(rng.integers(8))
        changed.write_bytes(data)
        try:
            state, _ = load_state(changed, model, about)
        except ValueError as error:
            refused += "is damaged" in str(error)
            continue
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)
        same += 1
    assert refused + same == len(places)
    assert refused > same


def test_other_files_are_refused(saved, tmp_path):
    file, model, about = saved
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text").write_text(TEXT)
    for name in ("other.npz", "array.npy", "text"):
        with pytest.raises(ValueError, match="is damaged, or no saved state"):
            load_state(tmp_path / name, model, about)
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / "missing", model, about)
    with np.load(file) as stored:
        arrays = dict(stored)
    found = json.loads(arrays["about"].tobytes()) | {"format": 2}
    np.savez(tmp_path / "newer.npz", **arrays | {"about": np.frombuffer(json.dumps(found).encode(), np.uint8)})
    with pytest.raises(ValueError, match="has format 2, this code reads 1"):
        load_state(tmp_path / "newer.npz", model, about)


def test_a_disk_that_is_full_leaves_what_was_there(saved, tmp_path):
    file, model, about = saved
    state, tokens = load_state(file, model, about)
    target = tmp_path / "state"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for old in (None, b"what was there"):
        if old is not None:
            target.write_bytes(old)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(ValueError, match=r"--save-state='.*' could not be written .*; make room"):
                save_state(target, state, about, tokens)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == ([] if old is None else [target])
    assert target.read_bytes() == b"what was there"
    save_state(target, state, about, tokens)
    assert load_state(target, model, about)[1] == tokens


def test_an_interrupted_write_leaves_nothing(saved, tmp_path, monkeypatch):
    file, model, about = saved
    state, tokens = load_state(file, model, about)

    def interrupt(file, *_, **__):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_state.np.lib.format, "write_array", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "state", state, about, tokens)
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_be_written_are_told_before_reading(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text(TEXT)
    for target, message in ((tmp_path, "is a folder"), (tmp_path / "text" / "state", "text is no folder")):
        common = ["--checkpoint", tmp_path / "nowhere", "--context-file", tmp_path / "text"]
        code, _, err = main(monkeypatch, capsys, *common, "--save-state", target)
        assert code == 2
        assert "--save-state=" in err
        assert message in err

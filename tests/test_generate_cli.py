"""The command that continues a text: prompts of any length, and a clear line about every wrong one."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from experiments import generate as command
from experiments.conversation import continue_text
from experiments.data import DataError
from experiments.data.tokenizers import ByteTokenizer
from fam_jax import generate

ROOT = Path(__file__).resolve().parent.parent
BYTES = ByteTokenizer()
MEMORIES = {"fam": tiny_run.FAM, "full": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run on bytes of text."""
    return tiny_run.save(tiny_run.text_config(), tmp_path_factory.mktemp("run"))


def main(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    code = command.main()
    return code, *capsys.readouterr()


def text_file(folder, content, name="prompt.txt"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_pieces_are_the_file(tmp_path, size):
    """However the cuts fall into characters of several bytes and into lines."""
    text = "one\ntwö 三\n\n" + "x" * 50 + "😀\nlast ß"
    pieces = list(command.text_pieces(text_file(tmp_path, text), size))
    assert "".join(pieces) == text
    assert all(pieces)
    assert "".join(command.text_pieces(text_file(tmp_path, b"\xef\xbb\xbf" + text.encode()), size)) == text


def test_pieces_of_a_long_file_stay_small(tmp_path):
    path = text_file(tmp_path, "a line of text\n" * 20_000 + "y" * 100_000)
    lengths = [len(piece) for piece in command.text_pieces(path, 1000)]
    assert sum(lengths) == path.stat().st_size
    assert max(lengths) <= 2000


@pytest.mark.parametrize("memory", [tiny_run.FAM, pytest.param(None, marks=pytest.mark.slow)], ids=["fam", "full"])
def test_a_streamed_prompt_is_continued_like_one_call(memory):
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    text = "".join(chr(97 + i * i % 26) for i in range(61))
    ids = BYTES.encode(text)
    whole = generate(model, variables, np.pad(ids, (0, 3))[None], 6, lengths=np.array([61]))
    for pieces in ([text], [text[:1], text[1:40], text[40:]], [*text[:32], text[32:]]):
        answer = continue_text(model, variables, BYTES, pieces, 6, chunk=16)
        assert answer.prompt_tokens == 61
        np.testing.assert_array_equal(answer.ids, np.asarray(whole.ids)[0])
        assert answer.text == BYTES.decode(whole.ids[0])
    if memory is not None:
        np.testing.assert_allclose(answer.state.fam, whole.state.fam, rtol=1e-5, atol=1e-5)
        assert int(answer.state.blocks[0]) == (61 + 6) // 8


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_every_prompt_length_leaves_something_to_ask(length, memory):
    """One program answers them all: the prompt's end is padded to the chunk, which may be more than the whole text."""
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    answer = continue_text(model, variables, BYTES, ["x" * length], 6, chunk=16)
    assert answer.prompt_tokens == length
    read = int(answer.state.blocks[0]) * 8 + int(answer.state.offset[0])
    assert read == length + len(answer.ids)


def test_state_does_not_grow_with_the_prompt():
    model, variables = tiny_run.init(tiny_run.model_config())
    sizes = set()
    for pieces in (["x"], ["some text\n"] * 1000):
        answer = continue_text(model, variables, BYTES, pieces, 6, chunk=16)
        sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(answer.state)))
    assert len(sizes) == 1


def test_an_end_of_text_ends_the_answer():
    model, variables = tiny_run.init(tiny_run.model_config())

    class Ending(ByteTokenizer):
        """Ends where the model's own second token stands."""

    first = continue_text(model, variables, BYTES, ["hello"], 6, chunk=16)
    tokenizer = Ending()
    tokenizer.separator = int(first.ids[1])
    stopped = continue_text(model, variables, tokenizer, ["hello"], 6, chunk=16)
    length = 1 + first.ids.tolist().index(tokenizer.separator)
    np.testing.assert_array_equal(stopped.ids, first.ids[:length])
    assert stopped.text == BYTES.decode(first.ids[: length - 1])


def test_ids_outside_the_vocabulary_are_found_before_the_model_reads_them():
    model, variables = tiny_run.init(tiny_run.model_config(vocab_size=100))
    with pytest.raises(ValueError, match=r"token id 1\d\d is outside the vocabulary of 100"):
        continue_text(model, variables, BYTES, ["abc", "xyz"], 4)


def test_command_answers_on_standard_output_only(run, tmp_path, monkeypatch, capsys):
    path = text_file(tmp_path, "def f(x):\n" * 50)
    code, out, err = main(
        monkeypatch, capsys, "--checkpoint", run, "--prompt-file", path, "--max-new-tokens", 6, "--chunk", 16
    )
    assert code == 0
    assert "read 500 tokens, wrote 6" in err
    model, variables = tiny_run.init(tiny_run.model_config())
    expected = continue_text(model, variables, BYTES, [path.read_text()], 6, chunk=16)
    assert out == expected.text + "\n"
    short = main(monkeypatch, capsys, "--checkpoint", run, "--prompt", "x", "--max-new-tokens", 6, "--chunk", 16)
    assert short[0] == 0
    assert "read 1 tokens" in short[2]


def test_a_pipe_is_a_prompt_too(run):
    """As typed: the standard input of a process of its own, which can be read only once."""
    model, variables = tiny_run.init(tiny_run.model_config())
    expected = continue_text(model, variables, BYTES, ["some text\n" * 20], 6, chunk=16)
    words = ["--checkpoint", run, "--prompt-file", "/dev/stdin", "--max-new-tokens", "6", "--chunk", "16"]
    for text, code, out, err in (
        ("some text\n" * 20, 0, expected.text.encode() + b"\n", b"read 200 tokens, wrote 6"),
        ("", 2, b"", b"error: /dev/stdin: empty; a prompt needs some text\n"),
    ):
        process = [sys.executable, "-m", "experiments.generate", *words]
        done = subprocess.run(process, cwd=ROOT, input=text.encode(), capture_output=True)
        assert (done.returncode, done.stdout) == (code, out)
        assert err in done.stderr


def test_sampling_repeats_with_its_seed(run, monkeypatch, capsys):
    options = ["--checkpoint", run, "--prompt", "abc", "--max-new-tokens", 12, "--chunk", 16]
    options += ["--temperature", 1.5, "--top-p", 0.99]
    answers = [main(monkeypatch, capsys, *options, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


def test_passkey_checkpoints_have_their_own_tokens(tmp_path, monkeypatch, capsys):
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    options = ["--checkpoint", run, "--max-new-tokens", 2, "--chunk", 16, "--prompt"]
    code, out, _ = main(monkeypatch, capsys, *options, "What is the pass key? The pass key is")
    assert code == 0
    assert len(out.split()) == 2
    code, _, err = main(monkeypatch, capsys, *options, "hello world")
    assert code == 2
    assert "the PassKey vocabulary has no" in err


BAD_FILES = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "empty; a prompt needs some text"),
    "blank": (b"\n \n", "empty; a prompt needs some text"),
    "binary": (b"\x7fELF\0\0\1", "binary, not text"),
    "latin": ("stra\xdfe".encode("latin-1"), "not UTF-8 text"),
    "cut": ("three 三".encode()[:-1], "not UTF-8 text"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_prompt_files_are_one_clear_line(run, tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "prompt" if content is None else text_file(tmp_path, content)
    with pytest.raises(DataError, match=message):
        list(command.text_pieces(path))
    code, out, err = main(monkeypatch, capsys, "--checkpoint", run, "--prompt-file", path)
    assert (code, out) == (2, "")
    assert message in err
    assert str(path) in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_bad_options_are_one_clear_line(run, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        ([], "give either --prompt TEXT, --prompt-file FILE"),
        (["--prompt", "a", "--prompt-file", "b"], "give either --prompt TEXT, --prompt-file FILE"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", 0], "max_new_tokens=0"),
        (["--prompt", "a", "--temperature", -1], "temperature=-1.0"),
        (["--prompt", "a", "--top-p", 0], "top_p=0.0"),
        (["--prompt", "a", "--top-k", 1000, "--temperature", 1], "top_k=1000"),
        (["--prompt", "a", "--min-p", 2], "min_p=2.0"),
        (["--prompt", "a", "--repetition-penalty", 0], "repetition_penalty=0.0"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--question", "a", ""], "--question is empty"),
        (["--question", "a", "--interactive"], "give either --prompt TEXT, --prompt-file FILE"),
        (["--prompt", "a", "--system", "b"], "--system is a message of a chat; add --chat"),
        (["--prompt", "a", "--chat"], "--chat needs a tokenizer.json, and a chat_template in"),
        (["--prompt", "a", "--save-state", tmp_path / "s"], "--save-state keeps what was read with --context-file"),
        (["--prompt", "a", "--load-state", tmp_path / "s"], "cannot be read"),
        (["--interactive", "--context-file", "/dev/stdin"], "/dev/stdin can be read only once"),
        (["--prompt-file", tmp_path], "cannot be read"),
    ):
        code, out, err = main(monkeypatch, capsys, "--checkpoint", run, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_bad_checkpoints_are_one_clear_line(tmp_path):
    """As typed: the exit code and no traceback, from a process of its own."""
    run = tiny_run.save(tiny_run.text_config(), tmp_path / "run")
    largest = max((run / "checkpoints" / "1" / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generate", "--checkpoint", run, "--prompt", "a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_questions_after_a_context(memory, tmp_path, monkeypatch, capsys):
    """Several files are one text; each question is answered as if it followed that alone; a stop text cuts."""
    run = tiny_run.save(tiny_run.text_config(memory), tmp_path / "run")
    first, second = (text_file(tmp_path, f"some {name} text\n" * 9, name) for name in ("first", "second"))
    text = f"{first.read_text()}\n{second.read_text()}"
    common = ["--checkpoint", run, "--chunk", 16, "--max-new-tokens", 6, "--context-file", first, second]
    questions = ["who?", "x", "who?"]
    code, out, err = main(monkeypatch, capsys, *common, "--question", *questions)
    assert code == 0, err
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    answers = [continue_text(model, variables, BYTES, [text, asked], 6, chunk=16) for asked in questions]
    assert out == "".join(answer.text + "\n" for answer in answers)
    assert f"read {len(text)} tokens of context" in err
    assert [line for line in err.splitlines() if line.startswith("[question: ")] == [
        f"[question: {q}]" for q in questions
    ]
    stop = answers[0].text[-1]
    code, out, _ = main(monkeypatch, capsys, *common, "--prompt", "who?", "--stop", "never", stop)
    assert (code, out) == (0, answers[0].text.partition(stop)[0] + "\n")


def test_a_conversation_about_a_text(run, tmp_path):
    """As typed, in a process of its own: lines of the standard input, until its end."""
    path = text_file(tmp_path, "some text ö\n" * 9)
    words = ["--checkpoint", run, "--context-file", path, "--interactive", "--max-new-tokens", "6", "--chunk", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generate", *words],
        cwd=ROOT,
        input="wer ö?\n\nand?\n".encode(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    model, variables = tiny_run.init(tiny_run.model_config())
    first = continue_text(model, variables, BYTES, [path.read_text(), "wer ö?\n"], 6, chunk=16)
    begun = np.concatenate([BYTES.encode(path.read_text() + "wer ö?\n"), first.ids, BYTES.encode("\nand?\n")])
    second = np.asarray(generate(model, variables, begun[None], 6, stop_tokens=(0,)).ids)[0]
    assert done.stdout.decode() == f"{first.text}\n{BYTES.decode(second)}\n"
    assert b"read 117 tokens of context" in done.stderr


def test_a_piped_context(run):
    words = ["--checkpoint", run, "--context-file", "/dev/stdin", "--prompt", "who?", "--max-new-tokens", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generate", *words, "--chunk", "16"],
        cwd=ROOT,
        input=b"some text\n" * 20,
        capture_output=True,
    )
    model, variables = tiny_run.init(tiny_run.model_config())
    expected = continue_text(model, variables, BYTES, ["some text\n" * 20, "who?"], 6, chunk=16)
    assert (done.returncode, done.stdout.decode()) == (0, expected.text + "\n")

"""Chat templates: what the model reads, and which tokens of it are special."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
import tiny_run

from experiments import generate as command
from experiments.chat import Chat, Plain, read_settings
from experiments.data import DataError, load_tokenizer
from experiments.data.tokenizers import ByteTokenizer, Literal, encode_pieces
from fam_jax import generate

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("jinja2")
END, START, STOP = range(3)  # <|endoftext|>, <|im_start|>, <|im_end|>
HEAD = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_chat.SETTINGS)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "tokenizer.json"))


def with_settings(folder, tokenizer, tmp_path, **changes):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tiny_chat.SETTINGS | changes))
    return read_settings(tokenizer, tmp_path)


def test_turns_are_the_template_of_the_whole_conversation(folder, tokenizer):
    chat = Chat(read_settings(tokenizer, folder))
    assert chat.first("Who?", document=False) == HEAD + "Who?" + TAIL
    assert chat.head() + "A text." + chat.first("Who?", document=True) == HEAD + "A text.\n\nWho?" + TAIL
    assert chat.later("And?", "") == "<|im_end|>\n<|im_start|>user\nAnd?" + TAIL
    assert chat.later("And?", "<|im_end|>") == "\n<|im_start|>user\nAnd?" + TAIL
    assert chat.later("And?", "<|endoftext|>") == chat.later("And?", "")
    polite = Chat(read_settings(tokenizer, folder), "Be brief.")
    assert polite.head() == HEAD.replace("kind", "brief")
    assert polite.later("And?", "") == chat.later("And?", "")
    plain = Plain()
    assert (plain.head(), plain.first("a", True), plain.later("b\n", "")) == ("", "a", "\nb\n")


def test_settings_of_a_tokenizer(folder, tokenizer, tmp_path):
    assert read_settings(tokenizer, folder).ends == (END, STOP)
    assert read_settings(tokenizer, folder).bos is None
    assert with_settings(folder, tokenizer, tmp_path, add_bos_token=True).bos == START
    assert with_settings(folder, tokenizer, tmp_path, eos_token=None).ends == (END,)
    assert with_settings(folder, tokenizer, tmp_path, eos_token="<|endoftext|>").ends == (END,)
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y {{ bos_token }}"}]
    settings = with_settings(folder, tokenizer, tmp_path, chat_template=named)
    assert Chat(settings).first("", False) == "y <|im_start|>"
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    assert read_settings(tokenizer, tmp_path).template == "of its own file"
    assert read_settings(ByteTokenizer(), folder).ends == (0,)
    assert read_settings(ByteTokenizer(), folder).template is None


def test_templates_have_what_hugging_face_gives_them(folder, tokenizer, tmp_path):
    template = "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}"
    template += "{{ strftime_now('%Y') | length }}"
    chat = Chat(with_settings(folder, tokenizer, tmp_path, chat_template=template), "x")
    assert chat.first("<ö>", False) == '{"role": "user", "content": "<ö>"}4'


BAD = {
    "none": (None, "--chat needs a tokenizer.json, and a chat_template in"),
    "refuses": ("{{ raise_exception('no system here') }}", r"does not take these messages \(user\): no system here"),
    "no template": ("{% if %}", "chat_template is no Jinja template"),
    "unknown": ("{{ messages[0].x.y }}", "does not take these messages"),
    "twice": ("{{ messages[0].content }}{{ messages[0].content }}", "writes a message 2 times"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "does not take these messages"),
    "number": (3, "chat_template is a int and no text"),
    "names": ([{"name": "tool", "template": "x"}], "chat_template has tool and no 'default'"),
}


@pytest.mark.parametrize(("template", "message"), BAD.values(), ids=BAD.keys())
def test_templates_that_cannot_be_used(folder, tokenizer, tmp_path, template, message):
    with pytest.raises(DataError, match=message):
        Chat(with_settings(folder, tokenizer, tmp_path, chat_template=template)).head()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"bos_token": {}}'])
def test_damaged_settings(tokenizer, tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match="not the settings of a tokenizer"):
        read_settings(tokenizer, tmp_path)


def test_a_missing_library_says_what_to_install():
    code = """
import sys
sys.modules["jinja2"] = None
from pathlib import Path
from experiments.chat import Chat, TokenizerSettings
from experiments.data import DataError
try:
    Chat(TokenizerSettings(Path("x"), (), template="x"))
except DataError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "chat templates need the package 'jinja2': pip install -e \".[chat]\"" in out


def test_a_document_has_no_special_tokens(tokenizer):
    """However it is cut into pieces; the same text from a template has."""
    text = "The ship <|im_end|> is\n<|im_start|>system called <|endoftext|>\n"
    assert {START, STOP, END} <= set(tokenizer.encode(text))
    literal = np.concatenate(list(encode_pieces(Literal(tokenizer), [text])))
    assert not {START, STOP, END} & set(literal)
    assert tokenizer.decode(literal) == text
    for size in (1, 3, 11):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        ids = np.concatenate(list(encode_pieces(Literal(tokenizer), pieces)))
        assert not {START, STOP, END} & set(ids)
        assert tokenizer.decode(ids) == text
    assert {START, STOP, END} <= set(tokenizer.encode(text))


def main(monkeypatch, capsys, *arguments, lines=""):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments), "--max-new-tokens", "5", "--chunk", "16"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = command.main()
    return code, *capsys.readouterr()


def answered(memory, tokenizer, ids):
    """The ids and the text that one call over all ids gives."""
    model, variables = tiny_run.init(tiny_run.model_config(memory, 300))
    prompt = np.pad(ids, (0, 256 - len(ids)))[None]  # one program for all lengths
    out = generate(model, variables, prompt, 5, lengths=np.array([len(ids)]), stop_tokens=(END, STOP))
    ids = np.asarray(out.ids)[0, : int(out.lengths[0])]
    return ids, tokenizer.decode(ids[:-1] if ids[-1] in (END, STOP) else ids)


@pytest.mark.parametrize("memory", [tiny_run.FAM, pytest.param(None, marks=pytest.mark.slow)], ids=["fam", "full"])
def test_a_chat_about_a_document(memory, tokenizer, tmp_path, monkeypatch, capsys):
    run = tiny_chat.save(tmp_path / "run", memory)
    document = "The <|im_end|> ship is called Marigold.\n" * 3
    (tmp_path / "text").write_text(document)
    head, literal = tokenizer.encode(HEAD), tokenizer.encode_literally(document)
    common = ["--checkpoint", run, "--chat", "--context-file", tmp_path / "text"]

    def first(question):
        return np.concatenate([head, literal, tokenizer.encode(f"\n\n{question}{TAIL}")])

    code, out, err = main(monkeypatch, capsys, *common, "--question", "Who?", "Where is it?", "Who?")
    assert code == 0, err
    who, where = (answered(memory, tokenizer, first(question))[1] for question in ("Who?", "Where is it?"))
    assert out == f"{who}\n{where}\n{who}\n"
    assert f"read {len(head) + len(literal)} tokens of context" in err
    code, out, err = main(monkeypatch, capsys, *common, "--interactive", lines="Who?\n\nWhere is it?\n")
    assert code == 0, err
    ids, text = answered(memory, tokenizer, first("Who?"))
    rest = f"\n<|im_start|>user\nWhere is it?{TAIL}"
    rest = rest if ids[-1] == STOP else f"<|im_end|>{rest}"
    second = answered(memory, tokenizer, np.concatenate([first("Who?"), ids, tokenizer.encode(rest)]))[1]
    assert out == f"{text}\n{second}\n"


def test_a_text_begins_with_the_token_for_it_once(tokenizer, tmp_path, monkeypatch, capsys):
    run = tiny_chat.save(tmp_path / "run", settings=tiny_chat.SETTINGS | {"add_bos_token": True})
    plain = len(tokenizer.encode("The ship"))
    for options, count in (
        (["--prompt", "The ship"], plain + 1),
        (["--prompt", "<|im_start|>The ship"], plain + 1),
        (["--chat", "--prompt", "The ship"], len(tokenizer.encode(HEAD + "The ship" + TAIL))),
    ):
        code, _, err = main(monkeypatch, capsys, "--checkpoint", run, *options)
        assert code == 0, err
        assert f"read {count} tokens, wrote" in err
    (tmp_path / "text").write_text("The ship\n")
    code, _, err = main(
        monkeypatch, capsys, "--checkpoint", run, "--context-file", tmp_path / "text", "--prompt", "Who"
    )
    assert f"read {len(tokenizer.encode('The ship' + chr(10))) + 1} tokens of context" in err
    assert f"read {len(tokenizer.encode('Who'))} tokens, wrote" in err

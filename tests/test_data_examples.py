"""Instruction data: examples of JSON lines become tokens of which only the answers count."""

import itertools
import json
import random

import numpy as np
import pytest
import tiny_chat

from experiments.chat import Chat, read_settings
from experiments.data import DataError, TextData, documents, load, load_tokenizer, manifest
from experiments.data.answers import PlainEncoder, example_encoder
from experiments.data.examples import chat_files, read_examples
from experiments.data.packed import REPEAT_PROMPT, Windows
from experiments.data.tokenizers import ByteTokenizer
from experiments.data.tokens import tokenize

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who keeps the parrot?"},
    {"role": "assistant", "content": "The ship."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "é"},
]
TALK_TEXT = "Be kind.\nWho keeps the parrot?\n[The ship.\0]\nWhy?\n[é\0]"


def pair(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def split_weights(text):
    """Bytes of a text, and which of them are in brackets."""
    pieces = [(piece[:-1].encode(), True) if piece[-1] == "]" else (piece.encode(), False) for piece in cut(text)]
    return b"".join(piece for piece, _ in pieces), np.concatenate([np.full(len(p), w) for p, w in pieces])


def cut(text):
    return [piece for part in text.split("[") for piece in part.replace("]", "]\1").split("\1") if piece]


def bytes_store(path, directory):
    tokenizer = ByteTokenizer()
    return tokenize(chat_files(str(path)), tokenizer, directory, PlainEncoder(tokenizer))


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"messages": TALK}, TALK_TEXT),
        ({"prompt": "2+2?", "completion": "4"}, "2+2?\n[4\0]"),
        ({"prompt": " 2\n", "response": " 4 ", "else": 1}, " 2\n\n[ 4 \0]"),
        ({"prompt": "a", "answer": "b", "group": "g"}, "a\n[b\0]"),
    ],
)
def test_both_forms_as_bytes(tmp_path, example, expected):
    path = write(tmp_path / "one.jsonl", ["", example])
    ((number, read),) = read_examples(path)
    ids, counts = PlainEncoder(ByteTokenizer()).encode(json.dumps(read.messages))
    data, weights = split_weights(expected)
    assert number == 2
    assert bytes(ids.tolist()) == data
    assert counts.tolist() == weights.tolist()


def test_without_a_separator_a_line_break_ends_an_answer():
    class NoSeparator(ByteTokenizer):
        separator = None

    ids, counts = PlainEncoder(NoSeparator()).encode(json.dumps(TALK))
    data, weights = split_weights("Be kind.\nWho keeps the parrot?\n[The ship.\n]Why?\n[é\n]")
    assert bytes(ids.tolist()) == data
    assert counts.tolist() == weights.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_chat.SETTINGS)


def with_template(folder, tmp_path, template):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tiny_chat.SETTINGS, "chat_template": template}))
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


def spelled(tokenizer, encoded):
    """The text of the tokens, with what counts in brackets."""
    groups = itertools.groupby(zip(*encoded, strict=True), lambda pair: pair[1])
    texts = ((counts, tokenizer.decode(np.array([i for i, _ in pairs]))) for counts, pairs in groups)
    return "".join(f"[{text}]" if counts else text for counts, text in texts)


def test_both_forms_with_a_chat_template(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    encoder = example_encoder(tokenizer, folder)
    assert spelled(tokenizer, encoder.encode(json.dumps(TALK))) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWho keeps the parrot?<|im_end|>\n<|im_start|>assistant\n[The ship.<|im_end|>]\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[é<|im_end|>]\n<|endoftext|>"
    )
    assert spelled(tokenizer, encoder.encode(json.dumps(pair("2+2?", "4")))) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[4<|im_end|>]\n<|endoftext|>"
    )


def test_what_counts_are_the_tokens_of_the_answers_and_what_is_before_is_what_a_model_reads(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    chat, encoder, plain = Chat(read_settings(tokenizer, folder)), example_encoder(tokenizer, folder), ByteTokenizer()
    draw = random.Random(0)
    for _ in range(100):
        turns = ["".join(draw.choices("The ship,\n 1.é<|im_end|>", k=draw.randint(1, 30))) + "." for _ in range(4)]
        turns[1] += draw.choice(("", "<|im_end|>"))  # spelled, and no token
        talk = json.dumps(pair(*turns[:2]) + pair(*turns[2:]))
        ids, counts = encoder.encode(talk)
        answers = [tokenizer.encode_literally(turn) for turn in turns[1::2]]
        assert counts.sum() == sum(answer.size + 1 for answer in answers)
        first = tokenizer.encode(chat.first(turns[0], document=False))
        later = tokenizer.encode(chat.later(turns[2], "<|im_end|>"))
        end, last = tokenizer.encode("<|im_end|>"), tokenizer.encode("\n<|endoftext|>")
        expected = [first, answers[0], end, later, answers[1], end, last]
        np.testing.assert_array_equal(ids, np.concatenate(expected))
        ids, counts = PlainEncoder(plain).encode(talk)
        assert bytes(ids.tolist()).decode() == "{}\n{}\0\n{}\n{}\0".format(*turns)
        assert counts.sum() == sum(len(turn.encode()) + 1 for turn in turns[1::2])


def test_a_tokenizer_without_a_template_writes_plain_lines_and_forges_nothing(folder, tmp_path):
    tokenizer = with_template(folder, tmp_path, None)
    encoded = example_encoder(tokenizer, tmp_path).encode(json.dumps(pair("<|endoftext|>?", "The ship.")))
    assert spelled(tokenizer, encoded) == "<|endoftext|>?\n[The ship.<|endoftext|>]"
    assert encoded.ids.tolist().count(tokenizer.separator) == 1


def test_templates_without_an_end_or_with_thoughts_before_the_answer(folder, tmp_path):
    asks = "{% if add_generation_prompt %}A:{% endif %}"
    roles = (
        "{% for m in messages %}{{ {'user': 'Q:', 'assistant': 'A:' + thought}[m.role] }}{{ m.content }}{% endfor %}"
    )
    tokenizer = with_template(folder, tmp_path, "{% set thought = '<|im_start|>' %}" + roles + asks)
    encoded = example_encoder(tokenizer, tmp_path).encode(json.dumps(pair("a", "b")))
    assert spelled(tokenizer, encoded) == "Q:aA:[<|im_start|>b<|endoftext|>]"


def test_a_template_that_ends_with_the_separator_gets_no_other(folder, tmp_path):
    tokenizer = with_template(folder, tmp_path, "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    encoded = example_encoder(tokenizer, tmp_path).encode(json.dumps(pair("a", "b")))
    assert spelled(tokenizer, encoded) == "a<|endoftext|>[b<|endoftext|>]"


def test_sentencepiece_puts_no_blank_into_the_middle(tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (tmp_path / "text.txt").write_text(tiny_chat.TEXT * 20)
    names = {"input": str(tmp_path / "text.txt"), "model_prefix": str(tmp_path / "tiny")}
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    trainer.train(**names, **kept, vocab_size=300, byte_fallback=True, minloglevel=2, hard_vocab_limit=False)
    tokenizer = load_tokenizer(str(tmp_path / "tiny.model"))
    ids, counts = example_encoder(tokenizer, tmp_path).encode(json.dumps(pair("Who keeps?", "The parrot.")))
    text = "Who keeps?\nThe parrot."
    np.testing.assert_array_equal(ids, [*tokenizer.encode(text), tokenizer.separator])
    assert tokenizer.decode(ids[counts]) == "The parrot."
    assert counts[-1]


def test_templates_that_write_a_date_write_the_same_one_always(folder, tmp_path):
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = with_template(folder, tmp_path, template)
    encoded = example_encoder(tokenizer, tmp_path).encode(json.dumps(pair("a", "b")))
    assert spelled(tokenizer, encoded).startswith("2024a [b")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content }}", "chat_template writes 0 answers of a conversation that has 1"),
        ("{{ raise_exception('no') }}", r"chat_template does not take these messages \(user, assistant\): no"),
    ],
)
def test_a_template_that_cannot_be_used_names_the_document(folder, tmp_path, template, said):
    with_template(folder, tmp_path, template)
    path = write(tmp_path / "chat.jsonl", [{"prompt": str(i), "answer": "b"} for i in range(2)])
    config = TextData(f"chat:{path}", str(tmp_path / "tokenizer.json"), data_dir=str(tmp_path / "data"))
    with pytest.raises(DataError, match=rf"document 'chat.jsonl/000000\d' of chat:.*: .*{said}"):
        load(config)


ERRORS = {
    "{": "no JSON (",
    "[" * 200_000: "nested too deeply",
    "[]": "a list and no object",
    '{"text": "a"}': "it has 'text'; give it 'messages', or 'prompt' and one of 'completion', 'response', 'answer'",
    '{"prompt": "a"}': "it has 'prompt'; give it",
    '{"prompt": "a", "answer": "b", "response": "c"}': "it has 'prompt', 'answer', 'response'; give it",
    '{"prompt": "a", "answer": " "}': "answer is empty; give it text, or remove the line",
    '{"prompt": "a", "answer": 3}': "answer is a int; give it a text",
    '{"prompt": null, "answer": "b"}': "prompt is missing; give it a text",
    '{"prompt": "a\\u0000", "answer": "b"}': "prompt has a NUL",
    '{"prompt": "a", "answer": "\\ud800"}': "answer has a NUL or half of a surrogate pair",
    '{"prompt": "a", "answer": "b", "group": 1}': "group is a int",
    '{"messages": []}': "'messages' holds no messages",
    '{"messages": ["a"]}': "message 0 is a str",
    '{"messages": [{"role": "tool", "content": "a"}]}': "message 0 has the role 'tool': must be system",
    '{"messages": [{"role": "user"}]}': "content of message 0 (user) is missing",
    '{"messages": [{"role": "user", "content": "a"}]}': "no message has the role 'assistant', so there is no answer",
    json.dumps({"messages": TALK[:-1]}): "the last message has the role 'user': its answer is missing",
    json.dumps({"messages": TALK[2:3]}): "no message of the role 'user' is before the first answer",
    json.dumps({"messages": TALK[1:3] + TALK[:3]}): "message 2 has the role 'system': must be system (the first",
}


@pytest.mark.parametrize("line", ERRORS)
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    path = write(tmp_path / "wrong.jsonl", [{"messages": TALK}, line])
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert f"{path}, line 2: " in str(caught.value)
    assert ERRORS[line] in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'\n"caf\xe9"\n')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: not UTF-8 text \(byte 4\)"):
        load(TextData(f"chat:{tmp_path}", data_dir=str(tmp_path / "data")))
    with pytest.raises(DataError, match=r"source='chat:.*/none': no file matches; check the path"):
        load(TextData(f"chat:{tmp_path}/none", data_dir=str(tmp_path / "data")))
    with pytest.raises(ValueError, match=r"source='chat:': must be .*chat:GLOB, instructions"):
        TextData("chat:")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two files of forty examples, two of each group."""
    home = tmp_path_factory.mktemp("many")
    for name in ("a", "b/c"):
        examples = [{"prompt": f"{name} {i // 2}", "answer": "!" * (i + 3), "group": str(i // 2)} for i in range(20)]
        write(home / "chats" / f"{name}.jsonl", examples)
    return home


def config_of(many, **settings):
    return TextData(f"chat:{many}/chats", data_dir=str(many / "data"), batch_size=2, **settings)


def test_a_tenth_of_the_groups_is_for_validation(many):
    config = config_of(many)
    train, validation = documents(config, "train"), documents(config, "validation")
    assert (len(train), len(validation)) == (36, 4)
    assert {name.split("/")[0] for name in validation.names} == {"a.jsonl", "b"}
    groups = [{bytes(d.tokens.tolist()).split(b"\n")[0].split()[1] for d in part} for part in (train, validation)]
    assert not groups[0] & groups[1]
    assert manifest(config)["splits"]["train"]["weights_sha256"]


def test_packed_rows_have_the_weights_of_what_they_predict_also_where_an_answer_is_cut(many):
    store = bytes_store(many / "chats", many / "data").split("train")
    windows = Windows(store, 0, 16, seed=5)
    order = windows._order
    ids = np.concatenate([store.read(i) for i in order])
    weights = np.concatenate([store.read_weights(i) for i in order])
    assert weights.sum() == sum(len(text[text.index(b"\n") + 1 :]) for text in split_documents(store))
    cuts = 0
    for number in range(len(windows)):
        window, counts = windows[number]
        np.testing.assert_array_equal(window, ids[16 * number : 16 * number + 17])
        np.testing.assert_array_equal(counts, weights[16 * number : 16 * number + 17])
        cuts += counts[-1] == 1 and window[-1] != 0
    assert len(windows) == (ids.size - 1) // 16
    assert cuts
    known = {tuple(windows[i][0].tolist()): windows[i][1] for i in range(len(windows))}
    data = load(config_of(many, mode="packed", length=16, seed=5))
    for batch in (next(data) for _ in range(8)):
        rows = (batch[name] for name in ("tokens", "targets", "weights"))
        for tokens, targets, found in zip(*rows, strict=True):
            np.testing.assert_array_equal(found, known[(int(tokens[0]), *targets.tolist())][1:])


def split_documents(store):
    return [bytes(store.read(i).tolist()) for i in range(len(store))]


def test_the_repeated_segment_follows_the_weights_of_the_window(many):
    data = load(config_of(many, mode="packed", length=64, repeat_tokens=8, repeat_weight=0.25))
    for batch in (next(data) for _ in range(5)):
        prompt = len(REPEAT_PROMPT)
        assert (batch["weights"][:, -8:] == 0.25).all()
        assert (batch["weights"][:, -8 - prompt : -8] == 0).all()
        window = batch["weights"][:, : -8 - prompt]
        np.testing.assert_array_equal(window == 1, np.isin(batch["targets"][:, : window.shape[1]], [0, ord("!")]))


def test_streams_have_the_weights_of_what_they_predict(many):
    data = load(config_of(many, mode="stream", length=16, block_size=4))
    for batch in (next(data) for _ in range(40)):
        # After a separator nothing is predicted: there a document ends, and its padding begins.
        answers = np.isin(batch["targets"], [0, ord("!")]) & (batch["tokens"] != 0)
        np.testing.assert_array_equal(batch["weights"], answers)


@pytest.mark.parametrize(
    "settings", [{"mode": "packed", "length": 64, "repeat_tokens": 8}, {"length": 16, "block_size": 4}]
)
def test_resumes_exactly(many, settings):
    data = load(config_of(many, **settings))
    states, batches = [data.get_state()], []
    for _ in range(20):
        batches.append(next(data))
        states.append(data.get_state())
    for step in range(20):
        again = load(config_of(many, **settings))
        again.set_state(json.loads(json.dumps(states[step])))
        for key, value in next(again).items():
            np.testing.assert_array_equal(value, batches[step][key], key)


def test_a_position_of_other_examples_or_of_another_template_is_refused(folder, tmp_path):
    def state(lines, tokenizer="bytes"):
        path = write(tmp_path / "chat.jsonl", lines)
        return load(TextData(f"chat:{path}", tokenizer, "packed", 1, 8, data_dir=str(tmp_path / "data")))

    lines = [{"prompt": f"question {i}", "answer": "a"} for i in range(4)]
    before = state(lines)
    with pytest.raises(DataError, match="saved with another text or tokenizer"):
        state([{**line, "answer": "b"} for line in lines]).set_state(before.get_state())
    with_template(folder, tmp_path, tiny_chat.TEMPLATE)
    before = state(lines, str(tmp_path / "tokenizer.json"))
    with_template(folder, tmp_path, tiny_chat.TEMPLATE.replace("kind", "brief"))
    with pytest.raises(DataError, match="saved with another text or tokenizer"):
        state(lines, str(tmp_path / "tokenizer.json")).set_state(before.get_state())


def test_damaged_weights_are_noticed(many, tmp_path):
    opened = bytes_store(many / "chats", tmp_path)
    opened.split("train")
    (path,) = (tmp_path / "tokens").glob("*/train.weights")
    data = path.read_bytes()
    path.write_bytes(bytes([1 - data[0]]) + data[1:])
    with pytest.raises(DataError, match="its tokens are not those that were written"):
        opened.split("train")
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="not all of the tokens are there"):
        opened.split("train")

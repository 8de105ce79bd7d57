import json
import subprocess
import sys

import data_helpers
import numpy as np
import pytest

from experiments.data import DataError, load_tokenizer
from experiments.data.passkey import KEY, QUESTION, TASK, Passkey, PasskeyData, PasskeyTokenizer
from experiments.data.tokenizers import encode_pieces
from fam_jax.call import check_ids

TEXT = "def tokenise(text):\n    return [piece for piece in text.split() if piece]\n\n# Größe, naïve 漢字 🙂\n"


def train_sentencepiece(folder, **settings):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (folder / "text.txt").write_text(TEXT * 20, "utf-8")
    trainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tiny"),
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return folder / "tiny.model"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    return train_sentencepiece(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    library = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    # What the file says about lengths must not cut documents.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4096)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece_model", "tokenizer_json"])
def test_pass_keys_in_the_ids_of_a_pretrained_model(kind, request):
    config = PasskeyData(block_size=16, blocks=(60,), tokenizer=str(request.getfixturevalue(kind)), depth="first")
    task = Passkey(config)
    batch = task.sample(np.random.default_rng(0), 2, config.shortest + 2)
    for tokens, targets, weights in zip(*(batch[name] for name in ("tokens", "targets", "weights")), strict=True):
        text = task.tokenizer.decode([*tokens, targets[-1]])
        key = text[-5:]
        assert text.startswith(f"{TASK} {KEY.format(key=key)} The grass is green. The sky")
        assert text.endswith(f" {QUESTION} {key}")
        assert task.tokenizer.decode(targets[weights > 0]).strip() == key


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.separator) == ("bytes", 256, 0)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == TEXT.encode()
    np.testing.assert_array_equal(ids, tokenizer.encode(TEXT.encode()))
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.encode("").shape == (0,)


def test_sentencepiece(sentencepiece_model):
    tokenizer = load_tokenizer(str(sentencepiece_model))
    ids = tokenizer.encode("return text 🙂")
    assert ids.dtype == np.int32
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == "return text 🙂"
    assert tokenizer.decode(ids.tolist()) == "return text 🙂"
    np.testing.assert_array_equal(ids, tokenizer.encode("return text 🙂".encode()))
    assert tokenizer.separator == 2  # </s> of the trainer's defaults
    assert tokenizer.name == "tiny.model"


def test_hugging_face(tokenizer_json):
    tokenizer = load_tokenizer(str(tokenizer_json))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert 4 < ids.size < len(TEXT.encode())
    assert ids.max() < tokenizer.vocab_size == 300
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.separator == 1  # <|endoftext|>
    assert tokenizer.separator not in ids


def test_hugging_face_without_an_end_token(tokenizer_json, tmp_path):
    described = json.loads(tokenizer_json.read_text())
    described["added_tokens"] = []
    del described["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.separator is None
    assert tokenizer.vocab_size == 300  # there is a hole, but ids go to 299


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece_model", "tokenizer_json"])
def test_a_text_in_pieces_is_the_text_at_once(request, kind):
    """Wherever it is cut: at the end of a line, in a word, in blanks, into pieces that are nothing but blanks."""
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(request.getfixturevalue(kind)))
    text = (TEXT + "   indented\n\n\n\tlast " + "x" * 50) * 5
    whole, random = tokenizer.encode(text), np.random.default_rng(0)
    assert tokenizer.decode(whole) == text
    lines = text.splitlines(keepends=True)
    cuts = [sorted(random.integers(0, len(text), 9)) for _ in range(50)]
    cut = [[text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)] for at in cuts]
    for pieces in (lines, [*text], [text], *cut):
        ids = [np.zeros(0, np.int32), *encode_pieces(tokenizer, pieces)]
        np.testing.assert_array_equal(np.concatenate(ids), whole)
    assert list(encode_pieces(tokenizer, [])) == []


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("remove", [False, True])
def test_lines_of_any_sentencepiece_model_are_the_text_at_once(tmp_path, rule, remove):
    """Models that read the end of a line as a blank, and those that keep one of several blanks."""
    tokenizer = load_tokenizer(
        str(train_sentencepiece(tmp_path, normalization_rule_name=rule, remove_extra_whitespaces=remove))
    )
    text = TEXT * 3
    ids = np.concatenate(list(encode_pieces(tokenizer, text.splitlines(keepends=True))))
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_pieces_whose_words_join_with_blanks_lose_nothing():
    class Joining(type(load_tokenizer("bytes"))):
        """Has one token for a full stop and the end of its line, as many vocabularies do."""

        def encode(self, text):
            return super().encode(text.replace(".\n", "\1"))

        def decode(self, ids):
            return super().decode(ids).replace("\1", ".\n")

    text = "One. \nTwo.\nThree four.\n"
    tokenizer = Joining()
    for size in range(1, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert tokenizer.decode(np.concatenate(list(encode_pieces(tokenizer, pieces)))) == text


def test_words_are_not_cut():
    tokenizer = PasskeyTokenizer()
    text = "The pass key is 90210. Remember it."
    whole = tokenizer.encode(text)
    for at in range(len(text)):
        ids = np.concatenate(list(encode_pieces(tokenizer, [text[:at], text[at:]])))
        np.testing.assert_array_equal(ids, whole)


def test_another_vocabulary_is_other_data(tmp_path, sentencepiece_model, tokenizer_json):
    tokenizers = [load_tokenizer(str(spec)) for spec in ("bytes", sentencepiece_model, tokenizer_json)]
    stores = [data_helpers.store(tmp_path, [TEXT, "text"], tokenizer=t) for t in tokenizers]
    assert len({t.hash for t in tokenizers}) == len({s.sha256 for s in stores}) == 3
    for tokenizer, store in zip(tokenizers, stores, strict=True):
        np.testing.assert_array_equal(store.read(0), tokenizer.encode(TEXT))
        np.testing.assert_array_equal(store.read(1, 1), tokenizer.encode("text")[1:])


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"nonsense \xff", "not a ")])
def test_damaged_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


def test_missing_or_unknown_files(tmp_path):
    with pytest.raises(DataError, match="there is no such file; check the path"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"must be bytes, or the path of a SentencePiece \.model"):
        load_tokenizer("gpt2")


@pytest.mark.parametrize(("library", "suffix"), [("sentencepiece", "model"), ("tokenizers", "json")])
def test_a_missing_library_says_what_to_install(tmp_path, library, suffix):
    path = tmp_path / f"tokenizer.{suffix}"
    path.write_bytes(b"x")
    code = f"""
import sys
sys.modules[{library!r}] = None
from experiments.data import DataError, load_tokenizer
from experiments.data.passkey import PasskeyTokenizer
from experiments.data.tokenizers import encode_pieces
from fam_jax.call import check_ids
try:
    load_tokenizer({str(path)!r})
except DataError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"needs the package '{library}': pip install -e \".[tokenizers]\"" in out


def test_ids_outside_the_vocabulary():
    assert check_ids([[0, 255]], 256).tolist() == [[0, 255]]
    assert check_ids(np.zeros((2, 0)), 256).shape == (2, 0)
    with pytest.raises(ValueError, match="prompt: token id 256 is outside the vocabulary of 256 ids"):
        check_ids(np.array([3, 256]), 256, "prompt")
    with pytest.raises(ValueError, match="token id -1 is outside"):
        check_ids([-1, 300], 256)
    with pytest.raises(ValueError, match="must be integers, not float64"):
        check_ids([0.5], 256)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        load_tokenizer("bytes").decode([300])


def test_a_tokenizer_with_ids_outside_its_vocabulary_prepares_nothing(tmp_path):
    class Wrong(type(load_tokenizer("bytes"))):
        hash = "wrong"
        vocab_size = 100

    with pytest.raises(ValueError, match="document '001' of lines: token id 122 is outside"):
        data_helpers.store(tmp_path, ["AAA", "zzz"], tokenizer=Wrong())
    assert not list((tmp_path / "tokens").glob("lines*"))

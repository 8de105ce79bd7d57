"""Text to token ids and back: bytes, SentencePiece, Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.data.protocol import DataError
from experiments.files import is_remote, location
from fam_jax.call import check_ids

# What vocabularies call "the text ends here"; a tokenizer.json does not say which of its tokens that is.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]", "<|im_end|>")


class Tokenizer(Protocol):
    """A reversible map between text and ids 0 ... vocab_size - 1.

    Attributes:
      name: what results call it; never a path.
      hash: identity of the vocabulary.
      vocab_size: number of ids.
      separator: the id put between packed documents, or None.
    """

    name: str
    hash: str
    vocab_size: int
    separator: int | None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32 [t]; nothing is added at its ends."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255. The NUL byte, which no text contains, separates packed documents."""

    name = "bytes"
    hash = "bytes"
    vocab_size = 256
    separator: int | None = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return check_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece `.model`; its end-of-text piece, or else that of the beginning, is the separator."""

    def __init__(self, path: Path):
        module = _library("sentencepiece", path)
        data = _read(path)
        self._model: Any = module.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except Exception as error:
            raise DataError(
                f"{path}: not a SentencePiece model ({error}); give the .model file that training wrote"
            ) from None
        self.name = path.name
        self.hash = hashlib.sha256(data).hexdigest()
        self.vocab_size = int(self._model.GetPieceSize())
        ends = (int(self._model.eos_id()), int(self._model.bos_id()))
        self.separator: int | None = next((i for i in ends if i >= 0), None)

    def encode(self, text: str | bytes) -> np.ndarray:
        return check_ids(np.asarray(self._model.EncodeAsIds(_text(text)), np.int64), self.vocab_size, self.name)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None if there is no such token."""
        found = int(self._model.PieceToId(token))
        return found if self._model.IdToPiece(found) == token else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(self._model.DecodeIds(check_ids(ids, self.vocab_size).tolist()))


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`; the first of END_TOKENS that it knows separates documents."""

    def __init__(self, path: Path):
        module = _library("tokenizers", path)
        data = _read(path)
        try:
            self._model: Any = module.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:
            raise DataError(
                f"{path}: not a Hugging Face tokenizer.json ({error}); give the file that `Tokenizer.save` wrote"
            ) from None
        self._model.no_truncation()
        self._model.no_padding()
        self.name = path.name
        self.hash = hashlib.sha256(data).hexdigest()
        # Ids need not be dense: the size is what an embedding needs, not the number of tokens.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = (self._model.token_to_id(token) for token in END_TOKENS)
        self.separator: int | None = next((i for i in ids if i is not None), None)

    def encode(self, text: str | bytes) -> np.ndarray:
        ids = self._model.encode(_text(text), add_special_tokens=False).ids
        return check_ids(np.asarray(ids, np.int64), self.vocab_size, self.name)

    def encode_literally(self, text: str) -> np.ndarray:
        """Ids of a text that is nothing but text: one that spells a special token does not become it."""
        self._model.encode_special_tokens = True
        try:
            return self.encode(text)
        finally:
            self._model.encode_special_tokens = False

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None if there is no such token."""
        found: int | None = self._model.token_to_id(token)
        return found

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(self._model.decode(check_ids(ids, self.vocab_size).tolist(), skip_special_tokens=False))


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `TextData.tokenizer` names.

    Args:
      spec: `bytes`, or the path of a SentencePiece `.model` or of a Hugging Face `.json`.

    Raises:
      DataError: the file is missing or not what its name says, or its library is not installed.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = location(spec)
    if path.suffix not in (".model", ".json"):
        raise DataError(
            f"tokenizer={spec!r}: must be bytes, or the path of a SentencePiece .model or of a Hugging "
            "Face tokenizer.json"
        )
    if not (path.exists() if is_remote(path) else path.is_file()):
        raise DataError(f"tokenizer={spec!r}: there is no such file; check the path")
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HuggingFaceTokenizer(path)


class Encodes(Protocol):
    """What `encode_pieces` needs of a tokenizer."""

    def encode(self, text: str) -> np.ndarray: ...


class Literal:
    """A tokenizer for texts whose author is not to have special tokens, such as documents."""

    def __init__(self, tokenizer: Encodes):
        self.encode: Callable[[str], np.ndarray] = getattr(tokenizer, "encode_literally", tokenizer.encode)


def encode_pieces(tokenizer: Encodes, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Encodes a text that comes in pieces as if it came at once.

    A tokenizer may treat the beginning of a text in its own way: SentencePiece, say, puts a blank before it, which in
    the middle of a text would be one that is not there. So what follows the first piece is encoded together with the
    word before it. The pieces are cut anew before blanks, where tokens end; those that are given may end in the middle
    of a word. What has no blank and no end of a line is held in memory until one comes, but for bytes.

    Args:
      tokenizer: of the text.
      texts: the pieces; joined they are the text.

    Yields:
      Ids, int32 [t]; joined they are those of the text. Where the tokenizer has one token for the end of a word and the
      blank after it, a piece is encoded by itself, and only its text is the same.
    """
    if (
        getattr(tokenizer.encode, "__func__", None) is ByteTokenizer.encode
    ):  # any cut will do, and a file without a blank need not fit into memory
        yield from map(tokenizer.encode, texts)
        return
    before = held = ""
    for text in texts:
        held += text
        parts = held.rsplit(None, 1)
        if len(parts) == 2:
            yield encode_after(tokenizer, before, parts[0])
            before, held = parts[0].rsplit(None, 1)[-1], held[len(parts[0]) :]
    if held:
        yield encode_after(tokenizer, before, held)


def encode_after(tokenizer: Encodes, before: str, text: str) -> np.ndarray:
    """Ids of what follows a word, int32 [t]; those of a text of its own if the word has other tokens with it."""
    word, both = tokenizer.encode(before), tokenizer.encode(before + text)
    return both[word.size :] if np.array_equal(both[: word.size], word) else tokenizer.encode(text)


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f'tokenizer={str(path)!r} needs the package {name!r}: pip install -e ".[tokenizers]"'
        ) from error


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path}: the file is empty; copy it again")
    return data


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", errors="replace")

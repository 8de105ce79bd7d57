"""Small corpora for the tests of the data pipeline."""

from __future__ import annotations

import dataclasses
import functools
import signal
from pathlib import Path

from experiments.data import TextData
from experiments.data.cache import digest
from experiments.data.corpus import Corpus, Text
from experiments.data.identity import Identity
from experiments.data.packed import PackedBatches
from experiments.data.stream import StreamBatches
from experiments.data.tokenizers import ByteTokenizer
from experiments.data.tokens import Tokens, TokenStore, tokenize


@dataclasses.dataclass(frozen=True)
class Lines:
    """A source of given documents that needs no preparation; its splits are the same unless told otherwise."""

    texts: tuple[str, ...]
    validation: tuple[str, ...] | None = None
    name: str = "lines"
    folder: str = "lines"

    @functools.cached_property
    def key(self) -> str:
        return digest(self.texts, self.validation)

    def open(self, directory: Path) -> Corpus:
        texts = {"train": self.texts, "validation": self.texts if self.validation is None else self.validation}

        def read(split):
            return (Text(f"{i:03d}", text) for i, text in enumerate(texts[split]))

        counts = {split: len(documents) for split, documents in texts.items()}
        splits = {split: {"documents": count} for split, count in counts.items()}
        return Corpus({"source": self.name, "key": self.key, "splits": splits}, counts, read)


def tokens(directory: Path, texts, validation=None, tokenizer=None) -> Tokens:
    """The documents as tokens; bytes unless told otherwise."""
    lines = Lines(tuple(texts), None if validation is None else tuple(validation))
    return tokenize(lines, tokenizer or ByteTokenizer(), directory)


def store(directory: Path, texts, split: str = "train", tokenizer=None) -> TokenStore:
    return tokens(directory, texts, tokenizer=tokenizer).split(split)


def stream(directory: Path, texts, split: str = "train", validation=None, **settings) -> StreamBatches:
    data, config = tokens(directory, texts, validation), TextData(**settings)
    return StreamBatches(data.split(split), config, Identity.of(config, split, data))


def packed(directory: Path, texts, split: str = "train", validation=None, tokenizer=None, **settings) -> PackedBatches:
    tokenizer = tokenizer or ByteTokenizer()
    data, config = tokens(directory, texts, validation, tokenizer), TextData(mode="packed", **settings)
    return PackedBatches(data.split(split), tokenizer, config, Identity.of(config, split, data))


def heed_interrupts():
    """For `preexec_fn`: a process begun in the background of a script would ignore SIGINT, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def small_books(folder):
    """Writes books and returns settings of data that reads them."""
    (folder / "books").mkdir()
    for number in range(20):
        lines = (f"{line} lines before this one in book {number}\n" for line in range(5 + 9 * number))
        (folder / "books" / f"{number}.txt").write_text("".join(lines))
    return {"source": f"text:{folder}/books", "data_dir": str(folder / "prepared")}

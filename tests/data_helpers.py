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
from experiments.data.tokens import TokenStore, tokenize


@dataclasses.dataclass(frozen=True)
class Lines:
    """A source of given documents that needs no preparation."""

    texts: tuple[str, ...]
    name: str = "lines"
    folder: str = "lines"

    @functools.cached_property
    def key(self) -> str:
        return digest(self.texts)

    def open(self, directory: Path) -> Corpus:
        def read(split):
            return (Text(f"{i:03d}", text) for i, text in enumerate(self.texts))

        splits = {"train": {"documents": len(self.texts)}, "validation": {"documents": len(self.texts)}}
        counts = {split: len(self.texts) for split in splits}
        return Corpus({"source": self.name, "key": self.key, "splits": splits}, counts, read)


def store(directory: Path, texts, split: str = "train", tokenizer=None) -> TokenStore:
    """The documents as tokens; bytes unless told otherwise."""
    return tokenize(Lines(tuple(texts)), tokenizer or ByteTokenizer(), directory).split(split)


def stream(directory: Path, texts, split: str = "train", **settings) -> StreamBatches:
    tokens, config = store(directory, texts, split), TextData(**settings)
    return StreamBatches(tokens, config, Identity.of(config, split, tokens))


def packed(directory: Path, texts, split: str = "train", tokenizer=None, **settings) -> PackedBatches:
    tokenizer = tokenizer or ByteTokenizer()
    tokens, config = store(directory, texts, split, tokenizer), TextData(mode="packed", **settings)
    return PackedBatches(tokens, tokenizer, config, Identity.of(config, split, tokens))


def heed_interrupts():
    """For `preexec_fn`: a process begun in the background of a script would ignore SIGINT, and so its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

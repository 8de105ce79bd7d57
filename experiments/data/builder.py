"""The tensorflow-datasets builder that stores documents as array_record files.

Import this module only when text is prepared or read: it imports tensorflow-datasets.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.data.corpus import Text


class TextCorpus(tfds.core.GeneratorBasedBuilder):
    """Documents with an id and a text. The id is the key, whose hash decides the order of the records."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded here. Without this, tensorflow-datasets looks for checksums of downloads, for
    # which it imports a package that it does not ask for.
    url_infos = None

    def __init__(self, *, splits: Mapping[str, Iterable[Text]], data_dir: Path) -> None:
        self._documents = splits
        # TFRecord, the default format, can be neither written nor read at random without TensorFlow.
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        del dl_manager  # sources fetch what they need themselves
        return {split: self._generate_examples(texts) for split, texts in self._documents.items()}

    def _generate_examples(self, texts: Iterable[Text]) -> Iterator[tuple[str, dict[str, str]]]:
        for text in texts:
            yield text.name, {"id": text.name, "text": text.text}


def write(directory: Path, splits: Mapping[str, Iterable[Text]]) -> None:
    """Writes the documents of all splits under a directory."""
    tfds.disable_progress_bar()  # the sources show one that knows what it counts
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            TextCorpus(splits=splits, data_dir=directory).download_and_prepare()
    finally:
        tfds.enable_progress_bar()


def read(directory: Path, split: str) -> Sequence[dict[str, bytes]]:
    """Opens the documents of a split, `{"id": bytes, "text": bytes}` each, for random access."""
    home = directory / TextCorpus.name / str(TextCorpus.VERSION)
    return tfds.builder_from_directory(home).as_data_source(split)

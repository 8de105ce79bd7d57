"""Text from any dataset of tensorflow-datasets that is stored as array_record."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data.cache import digest
from experiments.data.corpus import CORPUS_FORMAT, Corpus, Text
from experiments.data.protocol import DataError

VALIDATION_PERCENT = 10  # of the training split of a dataset that has no other split


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A dataset by name; read where it lies, since it is prepared already.

    Attributes:
      dataset: `NAME`, `NAME/CONFIG`, `NAME:VERSION` or `NAME/CONFIG:VERSION`.
      data_dir: where tensorflow-datasets keeps its data; None: its own default.
      feature: the feature that holds the text.
    """

    dataset: str
    data_dir: str | None
    feature: str

    @property
    def name(self) -> str:
        return f"tfds:{self.dataset}"

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", f"tfds-{self.dataset}")

    @functools.cached_property
    def key(self) -> str:
        """Changes when the dataset, its version or its files do."""
        home = Path(self._builder.data_dir)
        files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in home.iterdir() if p.is_file())
        return digest(CORPUS_FORMAT, self._builder.info.full_name, self.feature, files)

    def open(self, directory: Path) -> Corpus:
        """Opens the dataset, which is prepared first if it is not; `directory` is not used.

        Raises:
          DataError: it is neither prepared nor can it be prepared here, or it has no such feature.
        """
        del directory
        splits = self._splits()
        counts = {split: self._builder.info.splits[name].num_examples for split, name in splits.items()}
        manifest = {
            "source": self.name,
            "key": self.key,
            "dataset": self._builder.info.full_name,
            "splits": {split: {"tfds_split": splits[split], "documents": counts[split]} for split in splits},
        }
        return Corpus(manifest, counts, lambda split: self._texts(splits[split]))

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import read_only_builder

        try:
            # Files first: data that is there is read whatever the version of the code that made it.
            builder: Any = read_only_builder.builder_from_files(self.dataset, data_dir=self.data_dir)
        except tfds.core.registered.DatasetNotFoundError:
            builder = self._prepare()
        if self.feature not in builder.info.features or not _is_text(builder.info.features[self.feature]):
            found = [name for name, feature in builder.info.features.items() if _is_text(feature)]
            raise DataError(
                f"tfds_feature={self.feature!r}: {self.dataset} has no such text feature; "
                + (f"it has {', '.join(found)}" if found else "it has no text at all: choose another dataset")
            )
        try:
            builder.as_data_source(next(iter(builder.info.splits)))
        except Exception as error:
            raise DataError(
                f"source={self.name!r}: {builder.data_dir} cannot be read at random ({_first_line(error)}). "
                "Prepare the dataset again as array_record: "
                f"tfds.builder({self.dataset!r}).download_and_prepare(file_format='array_record')"
            ) from error
        return builder

    def _prepare(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self.dataset, data_dir=self.data_dir, file_format="array_record")
            builder.download_and_prepare()
            return builder
        except Exception as error:
            raise DataError(
                f"source={self.name!r}: not prepared in {self.data_dir or 'the default directory'}, and "
                f"preparing it failed ({type(error).__name__}: {_first_line(error)}). Check the name and "
                "the network. Datasets that need TensorFlow to be prepared: "
                'pip install -e ".[tensorflow]". Data that was prepared elsewhere with '
                "file_format='array_record' is read from tfds_dir without TensorFlow"
            ) from error

    def _splits(self) -> dict[str, str]:
        """Our split names to what tensorflow-datasets understands."""
        names = list(self._builder.info.splits)
        if "train" not in names:
            raise DataError(f"source={self.name!r}: it has no train split, only {', '.join(names)}; choose another")
        held_out = next((n for n in ("validation", "valid", "dev", "test") if n in names), None)
        if held_out is not None:
            return {"train": "train", "validation": held_out} | ({"test": "test"} if "test" in names else {})
        cut = 100 - VALIDATION_PERCENT
        return {"train": f"train[:{cut}%]", "validation": f"train[{cut}%:]"}

    def _texts(self, split: str) -> Iterator[Text]:
        records = self._builder.as_data_source(split)
        digits = len(str(len(records)))
        for i, record in enumerate(records):
            yield Text(f"{i:0{digits}d}", record[self.feature].decode("utf-8", errors="replace"))


def _is_text(feature: Any) -> bool:
    return type(feature).__name__ == "Text"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")

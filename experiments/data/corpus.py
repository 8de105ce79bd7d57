"""Sources of text and their one-time preparation as an array_record dataset of tensorflow-datasets.

Nothing here needs TensorFlow. tensorflow-datasets itself is imported only when text is prepared or read, not
when prepared tokens are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.data.cache import build_once, damaged, read_json, write_json
from experiments.data.protocol import DataError

CORPUS_FORMAT = 1  # raise it when prepared corpora of older code must not be read any more


class Text(NamedTuple):
    """A document as text. The name is unique in its source and the same on every machine."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Text that can be read once, to be prepared.

    Attributes:
      name: what results call it.
      folder: a name for its directory.
      key: changes whenever the text may have changed; cheap to compute.
      splits: `train`, `validation` and what else there is.
      texts: the documents of a split. Called once per preparation; errors are DataError.
      packages: for text that comes from installed packages: metadata by package. The name of every
        document then begins with `PACKAGE/`, and the manifest adds documents, characters and hash of each.
    """

    name: str
    folder: str
    key: str
    splits: tuple[str, ...]
    texts: Callable[[str], Iterable[Text]]
    packages: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    def open(self, directory: Path) -> Corpus:
        """Prepares the source, once, under `directory`, and opens it.

        Raises:
          DataError: the source has no usable text, or the disk is full; nothing half-made is kept.
        """
        target = build_once(
            directory / "corpora" / f"{self.folder}-{self.key[:16]}", lambda partial: _build(self, partial)
        )
        manifest = read_json(target / "manifest.json")
        return Corpus(
            manifest=manifest,
            counts={split: value["documents"] for split, value in manifest["splits"].items()},
            texts=lambda split: _read(target, split),
        )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Prepared text.

    Attributes:
      manifest: what it is made of; JSON-able.
      counts: documents of every split.
      texts: the documents of a split, in a fixed order.
    """

    manifest: Mapping[str, Any]
    counts: Mapping[str, int]
    texts: Callable[[str], Iterator[Text]]


class Content:
    """Sizes and hashes of documents, independent of the order in which they come."""

    def __init__(self) -> None:
        self._documents: dict[str, tuple[str, int]] = {}

    def add(self, text: Text) -> None:
        sha = hashlib.sha256(text.text.encode("utf-8")).hexdigest()
        self._documents[text.name] = (sha, len(text.text))

    def summary(self, prefix: str = "") -> dict[str, Any]:
        """Documents, characters and hash of the documents whose names begin with `prefix`."""
        chosen = sorted((n, *value) for n, value in self._documents.items() if n.startswith(prefix))
        total = hashlib.sha256("".join(f"{name}\0{sha}\n" for name, sha, _ in chosen).encode("utf-8"))
        return {
            "documents": len(chosen),
            "characters": sum(c for _, _, c in chosen),
            "sha256": total.hexdigest(),
        }


def _build(source: Source, directory: Path) -> None:
    from experiments.data import builder

    contents: dict[str, Content] = defaultdict(Content)
    problems: list[Exception] = []

    def examples(split: str) -> Iterator[Text]:
        try:
            for text in tqdm(source.texts(split), f"{source.name}: {split}", unit=" documents", disable=None):
                contents[split].add(text)
                yield text
            if split not in contents:
                raise DataError(f"source={source.name!r}: its {split} split has no text; give it more")
        except Exception as error:
            problems.append(error)
            raise

    try:
        builder.write(directory, {split: examples(split) for split in source.splits})
    except Exception as error:
        if problems:  # our own, which tensorflow-datasets may have wrapped
            raise problems[0] from None
        if isinstance(error, OSError):
            raise
        raise DataError(
            f"source={source.name!r}: writing to {directory.parent} failed ({error}). Check the disk and its "
            "free space, and run the same command again; nothing half-made was kept"
        ) from error
    splits = {split: contents[split].summary() for split in source.splits}
    # What a full disk swallowed without an error would be missed here, before the corpus counts as complete.
    for split, expected in splits.items():
        written = Content()
        for text in _read(directory, split):
            written.add(text)
        if written.summary() != expected:
            raise DataError(
                f"source={source.name!r}: what was written to {directory.parent} reads back differently; "
                "check the disk and its free space, and run the same command again"
            )
    manifest: dict[str, Any] = {"source": source.name, "key": source.key, "splits": splits}
    if source.packages:
        everything = [(split, package) for split in source.splits for package in source.packages]
        summaries = [(s, p, contents[s].summary(f"{p}/")) for s, p in everything]
        manifest["packages"] = [
            {"package": package, **source.packages[package], "split": split, **summary}
            for split, package, summary in summaries
            if summary["documents"]
        ]
    write_json(directory / "manifest.json", manifest)


def _read(directory: Path, split: str) -> Iterator[Text]:
    from experiments.data import builder

    try:
        for record in builder.read(directory, split):
            yield Text(record["id"].decode("utf-8"), record["text"].decode("utf-8"))
    except Exception as error:  # whatever the readers make of a damaged file
        raise damaged(directory / "text_corpus", error) from error

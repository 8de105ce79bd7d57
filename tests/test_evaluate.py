"""Measures of a model against plain loops over single calls, and the command that makes result files."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from experiments import evaluate, measures, results
from experiments.checkpoint import run_folder
from experiments.data.arithmetic import ArithmeticData
from experiments.data.passkey import Passkey, PasskeyData
from experiments.data.prosqa import ProsqaData
from experiments.measures import answer_accuracy, loss_by_position, passkey_accuracy
from experiments.train import train
from fam_jax import GenerateOutput, generate

ROOT = Path(__file__).resolve().parent.parent
MEMORIES = {"fam": tiny_run.FAM, "bswa": tiny_run.BSWA, "full": None}
TASK = Passkey(PasskeyData(block_size=8, blocks=(9, 10), digits=1))


def texts(*lengths, vocab=256):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length) for length in lengths]


def plain_logits(model, variables, tokens):
    """Logits of a single call on rows [b, t], padded on the right, which nothing before it sees."""
    padded = np.pad(tokens, ((0, 0), (0, 96 - tokens.shape[1]))).astype(np.int32)
    return np.asarray(apply(model, variables, padded).logits)[:, : tokens.shape[1]]


@partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens, state=None):
    return model.apply(variables, tokens, state)


def losses_of(logits, targets):
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def plain_losses(model, variables, text):
    """Loss of each token but the first."""
    return losses_of(plain_logits(model, variables, text[None, :-1])[0], text[1:])


def digit_model(memory=tiny_run.FAM):
    """An untrained model that answers with digits, so that it is right about one time in ten."""
    model, variables = tiny_run.init(tiny_run.model_config(memory, TASK.tokenizer.vocab_size))
    embed = variables["params"]["embed"]
    params = variables["params"] | {"embed": embed.at[:10].multiply(20.0)}
    return model, {"params": params}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_loss_by_position_is_that_of_single_calls(memory):
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    documents = texts(50, 1, 83, 16, 0, 17, 2)
    edges = [8, 16, 40, 80]
    curve = loss_by_position(model, variables, documents, batch_size=2, chunk=16, edges=edges, progress=False)
    per_bin = [[], [], [], [], []]
    for text in documents:
        if len(text) > 1:
            for index, loss in enumerate(plain_losses(model, variables, text)):
                per_bin[np.searchsorted(edges, index + 2)].append(loss)
    assert curve["position"] == edges
    assert curve["tokens"] == [len(losses) for losses in per_bin[:-1]]
    np.testing.assert_allclose(curve["loss"], [np.mean(losses) for losses in per_bin[:-1]], rtol=1e-5)
    assert curve["document_tokens"] == [49, 0, 82, 15, 0, 16, 1]
    for text, loss in zip(documents, curve["document_loss"], strict=True):
        if len(text) > 1:
            assert loss == pytest.approx(plain_losses(model, variables, text).mean(), rel=1e-5)
        else:
            assert np.isnan(loss)


def test_default_edges_double_up_to_the_longest_document():
    model, variables = tiny_run.init(tiny_run.model_config())
    curve = loss_by_position(model, variables, texts(70, 20), batch_size=2, chunk=16, progress=False)
    assert curve["position"] == [8, 16, 32, 64, 128]
    assert sum(curve["tokens"]) == 69 + 19


def test_one_program_serves_all_lengths():
    model, variables = tiny_run.init(tiny_run.model_config())
    before = measures._read._cache_size()
    for lengths in ((30, 10), (200, 150, 70, 5, 3), (2,)):
        loss_by_position(model, variables, texts(*lengths), batch_size=3, chunk=24, progress=False)
    passkey_accuracy(*digit_model(), TASK, [9, 30], trials=3, batch_size=3, chunk=24, progress=False)
    assert measures._read._cache_size() == before + 2  # one per model


@pytest.mark.parametrize("memory", [tiny_run.FAM, None], ids=["fam", "full"])
def test_passkey_accuracy_is_that_of_single_calls(memory):
    """All digits must be the most likely ones, which is when greedy decoding writes them."""
    model, variables = digit_model(memory)
    task = Passkey(PasskeyData(block_size=8, blocks=(9,), digits=2))
    sizes = {"trials": 90, "batch_size": 40, "chunk": 16}
    curve = passkey_accuracy(model, variables, task, [9, 12], **sizes, progress=False)
    for blocks, correct in zip(curve["blocks"], curve["correct"], strict=True):
        right = 0
        for number, rows in enumerate((40, 40, 10)):
            rng = np.random.default_rng([measures._EVALUATION, 0, blocks, number])
            batch = task.sample(rng, 40, blocks)
            answers = plain_logits(model, variables, batch["tokens"])[:rows, -2:].argmax(-1)
            right += (answers == batch["targets"][:rows, -2:]).all(-1).sum()
        assert correct == right
    assert curve["blocks"] == [9, 12]
    assert curve["trials"] == [90, 90]
    assert curve["accuracy"] == [correct / 90 for correct in curve["correct"]]


def test_chance_level_is_not_zero_for_a_single_digit():
    """The comparison above would hold if both sides were always zero; here they are not."""
    curve = passkey_accuracy(*digit_model(), TASK, [9], trials=320, batch_size=40, chunk=16, progress=False)
    assert 3 <= curve["correct"][0] <= 90


def test_samples_depend_on_the_seed_and_not_on_other_lengths():
    model, variables = digit_model()

    def correct(*lengths, **options):
        options = {"trials": 120, "batch_size": 40, "chunk": 16, "progress": False} | options
        return passkey_accuracy(model, variables, TASK, lengths, **options)["correct"]

    assert correct(9, 11) == correct(9) + correct(11)
    assert correct(9) == correct(9)
    assert len({tuple(correct(9, 11, seed=seed)) for seed in range(4)}) > 1
    assert correct(11, 11)[0] == correct(11, chunk=24)[0]


def read(model, variables, tokens, zero_memory=False, size=16):
    """Losses of whole rows [b, t - 1]."""
    steps = measures._read_in_chunks(model, variables, tokens[:, :-1], tokens[:, 1:], size, zero_memory)
    return np.concatenate([nll for _, nll, _ in steps], axis=1)


def test_zeroed_memory_is_a_loop_that_zeroes_the_fam_after_every_block():
    model, variables = tiny_run.init(tiny_run.model_config())
    tokens = np.stack(texts(65, 65)).astype(np.int32)
    state, losses = model.init_state(2), []
    for start in range(0, 64, 8):
        out = apply(model, variables, tokens[:, start : start + 8], state)
        state = out.state.replace(fam=np.zeros_like(out.state.fam))
        losses.append(losses_of(out.logits, tokens[:, start + 1 : start + 9]))
    zeroed = read(model, variables, tokens, zero_memory=True)
    np.testing.assert_allclose(zeroed, np.concatenate(losses, axis=1), rtol=2e-5, atol=2e-5)
    kept = read(model, variables, tokens)
    np.testing.assert_allclose(zeroed[:, :8], kept[:, :8], rtol=2e-5)
    assert np.abs(zeroed - kept)[:, 16:].max() > 1e-3


def test_nothing_passes_through_a_zeroed_memory():
    """Beyond the reach of the segments, the first block changes losses only if the memory is kept."""
    model, variables = tiny_run.init(tiny_run.model_config())
    tokens = np.stack(texts(65, 65)).astype(np.int32)
    other = tokens.copy()
    other[:, :8] = 255 - other[:, :8]
    late = slice(8 * (model.config.num_layers + 1), None)  # each layer looks back one block
    zeroed = [read(model, variables, ids, zero_memory=True)[:, late] for ids in (tokens, other)]
    np.testing.assert_array_equal(*zeroed)
    kept = [read(model, variables, ids)[:, late] for ids in (tokens, other)]
    assert np.abs(kept[0] - kept[1]).max() > 1e-6


QUESTIONS = {
    "arithmetic": ArithmeticData(operands=(2, 3), samples=40, test_samples=11),
    "prosqa": ProsqaData(steps=(2, 3), classes=8, samples=40, test_samples=11),
}


@pytest.mark.parametrize("data", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_answers_are_read_from_what_the_model_writes(monkeypatch, data):
    """A model that writes the reference, or what is made of it, in turn."""
    task = data.task()
    questions, end = task.questions("test"), task.tokenizer.separator
    before = task.tokenizer.encode("1 =" if data is QUESTIONS["arithmetic"] else "or or .")
    writes = [
        (lambda ids: ids, True),
        (lambda ids: np.concatenate([before, ids]), True),  # the way to the answer is not marked
        (lambda ids: np.where(ids == task.answer(ids), task.answer(ids) + 1, ids), False),
        (lambda ids: ids[:-1], False),  # no end
        (lambda ids: ids[-1:], False),
        (lambda ids: np.arange(data.vocab_size), False),
    ]
    asked = []

    def write(model, variables, prompt, new, *, lengths, stop_tokens, **_):
        assert stop_tokens == (end,)
        ids, counts = np.full((len(prompt), data.vocab_size), end), []
        for row in range(len(prompt)):
            place = len(asked) % len(questions)
            reference = questions.ids[place, : questions.ends[place]]
            start = questions.prompt[place]
            np.testing.assert_array_equal(prompt[row, : lengths[row]], reference[:start])
            text = writes[place % len(writes)][0](reference[start:])
            assert len(reference) - start <= new
            ids[row, : len(text)] = text
            counts.append(len(text))
            asked.append(place)
        return GenerateOutput(ids=ids, lengths=np.array(counts), state=None)

    monkeypatch.setattr(measures, "generate", write)
    model, variables = tiny_run.init(tiny_run.model_config(None, data.vocab_size))
    curve = answer_accuracy(model, variables, task, batch_size=4, progress=False)
    assert asked == [*range(22), 0, 1]  # the last batch is filled up
    right = [writes[place % len(writes)][1] for place in range(22)]
    correct = [sum(right[:11]), sum(right[11:])]
    accuracy = [count / 11 for count in correct]
    assert curve == {"level": [2, 3], "accuracy": accuracy, "correct": correct, "trials": [11, 11]}


def test_answers_are_those_of_single_calls(monkeypatch):
    config = tiny_run.arithmetic_config()
    task = config.data.task()
    questions, read = task.questions("test"), []
    monkeypatch.setattr(task, "answer", lambda ids: read.append(ids.tolist()))
    model, variables = tiny_run.init(config.model)
    answer_accuracy(model, variables, task, batch_size=9, progress=False)
    written = read[1::2]  # after each reference
    assert len(written) == len(questions)
    end, new = task.tokenizer.separator, questions.longest_answer
    for row in range(0, len(questions), 4):
        prompt, length = questions.ids[row : row + 1, :10], questions.prompt[row : row + 1]
        out = generate(model, variables, prompt, new, lengths=length, stop_tokens=(end,))
        assert written[row] == np.asarray(out.ids)[0, : int(out.lengths[0])].tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v: loss_by_position(m, v, texts(1, 0)), "none of the 2 documents has two tokens"),
        (lambda m, v: loss_by_position(m, v, [np.array([1, 256])]), "token id 256 is outside the vocabulary"),
        (lambda m, v: loss_by_position(m, v, texts(9), chunk=0), "chunk=0 is not allowed"),
        (lambda m, v: loss_by_position(m, v, texts(9), edges=[4, 4]), r"edges=\[4, 4\] is not allowed"),
        (lambda m, v: passkey_accuracy(m, v, TASK, []), r"lengths=\[\]"),
        (lambda m, v: passkey_accuracy(m, v, TASK, [9, 2]), "must be at least"),
        (lambda m, v: passkey_accuracy(m, v, TASK, [9], trials=0), "trials=0"),
        (lambda m, v: answer_accuracy(m, v, QUESTIONS["prosqa"].task(), batch_size=0), "batch_size=0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    model, variables = tiny_run.init(tiny_run.model_config())
    with pytest.raises(ValueError, match=message):
        call(model, variables)


def test_passkey_needs_the_vocabulary_and_a_memory_to_zero():
    model, variables = tiny_run.init(tiny_run.model_config(vocab_size=12))
    with pytest.raises(ValueError, match="vocab_size=12 is too small for PassKey"):
        passkey_accuracy(model, variables, TASK, [9])
    with pytest.raises(ValueError, match="vocab_size=12 is too small for the prosqa task, which has 68"):
        answer_accuracy(model, variables, QUESTIONS["prosqa"].task())
    model, variables = digit_model(tiny_run.BSWA)
    with pytest.raises(ValueError, match="this model has no FAM"):
        passkey_accuracy(model, variables, TASK, [9], zero_memory=True)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


def test_command_measures_passkey_with_its_control(tmp_path, monkeypatch, capsys):
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    out = tmp_path / "out"
    options = ["--checkpoint", run, "--output", out, "--trials", 20, "--lengths", 9, 12, "--zero-memory"]
    assert command(monkeypatch, *options, "--depth", "first") == 0
    printed = capsys.readouterr().out
    result = results.read(out / "tiny-passkey-passkey.json")
    kept, zeroed = result.values["curves"]
    assert (kept["label"], zeroed["label"]) == ("tiny-passkey", "tiny-passkey, memory zeroed")
    assert kept["blocks"] == zeroed["blocks"] == [9, 12]
    assert kept["depth"] == "first"
    assert kept["trials"] == [20, 20]
    assert result.values["marks"] == [{"x": 10, "label": "longest trained"}]
    assert result.config["evaluate"]["trials"] == 20
    assert result.config["train"]["model"]["memory"]["fam_length"] == 2
    assert result.seeds == [3, 0]
    assert (out / "tiny-passkey-passkey.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny-passkey, memory zeroed" in printed
    assert "tiny-passkey-passkey.json" in printed


def test_command_measures_loss_by_position_of_text(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"document {number}\n" * (number + 3))
    config = tiny_run.text_config(source=f"text:{folder}", data_dir=str(tmp_path / "data"))
    run = tiny_run.save(config, tmp_path / "run")
    arguments = [
        "--checkpoint",
        run,
        "--output",
        tmp_path,
        "--max-tokens",
        60,
        "--documents",
        1,
        "--name",
        "x",
    ]
    assert command(monkeypatch, *arguments) == 0
    result = results.read(tmp_path / "x.json")
    (curve,) = result.values["curves"]
    assert result.kind == "loss-by-position"
    assert len(curve["documents"]) == 1
    assert sum(curve["tokens"]) == curve["document_tokens"][0] <= 59
    assert result.data is not None
    assert "validation" in json.dumps(result.data)
    assert 4 < curve["loss"][0] < 8  # an untrained model, about log(256)


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/1"])
def test_results_go_to_the_run_unless_told_otherwise(tmp_path, monkeypatch, capsys, given):
    """A run of the same name as one of ours must not overwrite a result that the repository keeps."""
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    (run / "run.json").touch()
    tracked = set(results.DIRECTORY.iterdir())
    assert command(monkeypatch, "--checkpoint", tmp_path / given, "--trials", 2, "--lengths", 9) == 0
    file = run / "results" / "tiny-passkey-passkey.json"
    assert f"wrote {file} and" in capsys.readouterr().out
    assert results.find([run]) == [run, file]
    assert set(results.DIRECTORY.iterdir()) == tracked


def test_the_run_of_a_checkpoint(tmp_path):
    """Whatever is above it is called, and if it was copied elsewhere."""
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "checkpoints" / "mine")
    assert run_folder(run) == run_folder(run / "checkpoints") == run_folder(run / "checkpoints" / "1") == run
    copy = shutil.copytree(run / "checkpoints" / "1", tmp_path / "copy")
    assert run_folder(copy) == copy


def test_command_measures_answers_of_a_run_and_of_several_of_its_checkpoints(tmp_path, monkeypatch, capsys):
    changes = {"steps": 2, "checkpoint_every": 1, "eval_every": 1, "eval_steps": 2, "work_dir": str(tmp_path / "run")}
    config = dataclasses.replace(tiny_run.arithmetic_config(), **changes)
    done = train(config, progress=False)
    assert set(done.validation) == {"loss", "accuracy"}
    arguments = ["--checkpoint", tmp_path / "run", "--output", tmp_path, "--batch-size", 9]
    assert command(monkeypatch, *arguments) == 0
    assert command(monkeypatch, *arguments, "--steps", 1, 2) == 0
    printed = capsys.readouterr().out
    assert "operands, or steps of the reasoning" in printed
    assert "tiny-arithmetic, level 3" in printed
    one, many = (results.read(tmp_path / f"tiny-arithmetic-{kind}.json") for kind in ("answers", "answers-by-step"))
    assert (one.kind, many.kind) == ("answers", "answers-by-step")
    assert one.seeds == many.seeds == [3]
    (curve,) = one.values["curves"]
    assert curve["level"] == [2, 3]
    assert curve["trials"] == [11, 11]
    for place, by_step in enumerate(many.values["curves"]):
        assert by_step["step"] == [1, 2]
        assert by_step["correct"][1] == curve["correct"][place]
        assert by_step["trials"] == [11, 11]
    assert (tmp_path / "tiny-arithmetic-answers-by-step.png").read_bytes().startswith(b"\x89PNG")
    assert command(monkeypatch, *arguments, "--steps", 5) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err
    single = ["--checkpoint", tmp_path / "run" / "checkpoints" / "1", "--output", tmp_path, "--steps", 1]
    assert command(monkeypatch, *single) == 2
    assert "give the folder of the run" in capsys.readouterr().err


def test_command_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    run = tiny_run.save(tiny_run.passkey_config(), tmp_path / "run")
    text = tiny_run.save(tiny_run.text_config(source="text:nowhere/*"), tmp_path / "text")
    questions = tiny_run.save(tiny_run.arithmetic_config(), tmp_path / "questions")
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--checkpoint", run, "--task", "loss-by-position"], "was trained on PassKey"),
        (["--checkpoint", text, "--task", "passkey"], "was trained on text"),
        (["--checkpoint", questions, "--task", "passkey"], "was trained on questions; use task=answers"),
        (["--checkpoint", text, "--task", "answers"], "was trained on text; use task=loss-by-position"),
        (["--checkpoint", text], "no file matches"),
        (["--checkpoint", run, "--trials", "0"], "trials=0"),
        (["--checkpoint", tmp_path / "none"], "no checkpoint in"),
        (["--checkpoint", run, "--steps", 5], "steps=(5,) is for task=answers, but the run 'tiny-passkey' was trained"),
        (["--checkpoint", run, "--source", "pg19"], "source='pg19' is for task=loss-by-position"),
        (["--checkpoint", text, "--zero-memory"], "zero_memory=True is for task=passkey"),
        (["--checkpoint", text, "--lengths", 9], "lengths=(9,) is for task=passkey"),
        (["--checkpoint", questions, "--depth", "first"], "depth='first' is for task=passkey"),
        (["--checkpoint", questions, "--chunk", 9], "chunk=9 is for task=loss-by-position and task=passkey"),
        (["--checkpoint", run, "--output", tmp_path / "file"], "file' cannot be used"),
        (["--checkpoint", run, "--output", tmp_path / "file" / "x"], "file is no folder; give another folder"),
        (["--checkpoint", run, "--output", tmp_path / "x.json"], "x.json' names a file; give a folder"),
    ):
        assert command(monkeypatch, "--output", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not list((tmp_path / "out").iterdir())  # the folder is made before measuring, to know that it can be


def test_unknown_option_is_an_error_of_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", "--checkpoint", ".", "--trails", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--trails" in done.stderr

"""Measures of a model against plain loops over single calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from experiments import measures
from experiments.data.arithmetic import ArithmeticData
from experiments.data.pairs import PairsData
from experiments.data.passkey import Passkey, PasskeyData
from experiments.data.prosqa import ProsqaData
from experiments.data.tracking import TrackingData
from experiments.measures import answer_accuracy, loss_by_position, recall_accuracy
from fam_jax import GenerateOutput, generate

MEMORIES = {"fam": tiny_run.FAM, "bswa": tiny_run.BSWA, "full": None}
LEVELS = {
    "pairs": tiny_run.pairs_config().data,
    "remember": PairsData(block_size=8, pairs=(1,), per_block=1, live=2, symbols=2, value_length=1),
    "tracking": TrackingData(blocks=(1,)),
}
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


def plain_hits(model, variables, text):
    """Whether each token but the first is the most likely one."""
    return plain_logits(model, variables, text[None, :-1])[0].argmax(-1) == text[1:]


def digit_model(memory=tiny_run.FAM):
    """An untrained model that answers with digits, so that it is right about one time in ten."""
    model, variables = tiny_run.init(tiny_run.model_config(memory, TASK.tokenizer.vocab_size))
    embed = variables["params"]["embed"]
    params = variables["params"] | {"embed": embed.at[:10].multiply(20.0)}
    return model, {"params": params}


@pytest.mark.parametrize(
    "memory", [tiny_run.FAM, pytest.param(tiny_run.BSWA, marks=pytest.mark.slow), None], ids=["fam", "bswa", "full"]
)
def test_loss_by_position_is_that_of_single_calls(memory):
    model, variables = tiny_run.init(tiny_run.model_config(memory, 8))
    documents = texts(50, 1, 83, 16, 0, 17, 2, vocab=8)
    edges = [8, 16, 40, 80]
    curve = loss_by_position(model, variables, documents, batch_size=2, chunk=16, edges=edges, progress=False)
    per_bin, hits = [[], [], [], [], []], [[], [], [], [], []]
    for text in documents:
        if len(text) > 1:
            each = zip(plain_losses(model, variables, text), plain_hits(model, variables, text), strict=True)
            for index, (loss, hit) in enumerate(each):
                per_bin[np.searchsorted(edges, index + 2)].append(loss)
                hits[np.searchsorted(edges, index + 2)].append(hit)
    assert curve["position"] == edges
    assert curve["tokens"] == [len(losses) for losses in per_bin[:-1]]
    np.testing.assert_allclose(curve["loss"], [np.mean(losses) for losses in per_bin[:-1]], rtol=1e-5)
    np.testing.assert_allclose(curve["accuracy"], [np.mean(found) for found in hits[:-1]], rtol=1e-12)
    assert 0 < min(curve["accuracy"]) < max(curve["accuracy"]) < 1
    assert curve["document_tokens"] == [49, 0, 82, 15, 0, 16, 1]
    for text, loss, accuracy in zip(documents, curve["document_loss"], curve["document_accuracy"], strict=True):
        if len(text) > 1:
            assert loss == pytest.approx(plain_losses(model, variables, text).mean(), rel=1e-5)
            assert accuracy == pytest.approx(plain_hits(model, variables, text).mean())
        else:
            assert np.isnan(loss)
            assert np.isnan(accuracy)


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
    recall_accuracy(*digit_model(), TASK, [9, 30], trials=3, batch_size=3, chunk=24, progress=False)
    assert measures._read._cache_size() == before + 2  # one per model


@pytest.mark.parametrize("memory", [tiny_run.FAM, pytest.param(None, marks=pytest.mark.slow)], ids=["fam", "full"])
def test_recall_accuracy_is_that_of_single_calls(memory):
    """All digits must be the most likely ones, which is when greedy decoding writes them."""
    model, variables = digit_model(memory)
    task = Passkey(PasskeyData(block_size=8, blocks=(9,), digits=2))
    sizes = {"trials": 90, "batch_size": 40, "chunk": 16}
    curve = recall_accuracy(model, variables, task, [9, 12], **sizes, progress=False)
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
    curve = recall_accuracy(*digit_model(), TASK, [9], trials=320, batch_size=40, chunk=16, progress=False)
    assert 3 <= curve["correct"][0] <= 90


@pytest.mark.parametrize("data", LEVELS.values(), ids=LEVELS.keys())
def test_recall_is_that_of_single_calls_and_of_an_untrained_model_chance(data):
    """An untrained model that names one of two things is right about half of the time."""
    task = data.task("validation")
    model, variables = tiny_run.init(tiny_run.model_config(tiny_run.FAM, 8))
    embed = variables["params"]["embed"]
    embed = embed.at[:2].set(20.0 * jnp.stack([embed[0], -embed[0]]))  # one of the two is always the most likely
    variables = {"params": variables["params"] | {"embed": embed}}
    levels = [1, 4]
    curve = recall_accuracy(model, variables, task, levels, trials=150, batch_size=60, chunk=32, progress=False)
    assert set(curve) == {data.counted, "accuracy", "correct", "trials"}
    assert curve[data.counted] == levels
    for level, correct in zip(levels, curve["correct"], strict=True):
        right = 0
        for number, rows in enumerate((60, 60, 30)):
            batch = task.sample(np.random.default_rng([measures._EVALUATION, 0, level, number]), 60, level)
            hits = plain_logits(model, variables, batch["tokens"]).argmax(-1) == batch["targets"]
            right += (hits | (batch["weights"] == 0)).all(-1)[:rows].sum()
        assert correct == right
        assert 50 <= correct <= 100
    assert curve["accuracy"] == [correct / 150 for correct in curve["correct"]]


def test_samples_depend_on_the_seed_and_not_on_other_lengths():
    model, variables = digit_model()

    def correct(*lengths, **options):
        options = {"trials": 120, "batch_size": 40, "chunk": 16, "progress": False} | options
        return recall_accuracy(model, variables, TASK, lengths, **options)["correct"]

    assert correct(9, 11) == correct(9) + correct(11)
    assert correct(9) == correct(9)
    assert len({tuple(correct(9, 11, seed=seed)) for seed in range(4)}) > 1
    assert correct(11, 11)[0] == correct(11, chunk=24)[0]


def read(model, variables, tokens, control=None, size=16):
    """Losses of whole rows [b, t - 1]."""
    steps = measures._read_in_chunks(model, variables, tokens[:, :-1], tokens[:, 1:], size, control)
    return np.concatenate([nll for _, nll, _ in steps], axis=1)


def test_zeroed_memory_is_a_loop_that_zeroes_the_fam_after_every_block():
    model, variables = tiny_run.init(tiny_run.model_config())
    tokens = np.stack(texts(65, 65)).astype(np.int32)
    state, losses = model.init_state(2), []
    for start in range(0, 64, 8):
        out = apply(model, variables, tokens[:, start : start + 8], state)
        state = out.state.replace(fam=np.zeros_like(out.state.fam))
        losses.append(losses_of(out.logits, tokens[:, start + 1 : start + 9]))
    zeroed = read(model, variables, tokens, control="zeroed")
    np.testing.assert_allclose(zeroed, np.concatenate(losses, axis=1), rtol=2e-5, atol=2e-5)
    kept = read(model, variables, tokens)
    np.testing.assert_allclose(zeroed[:, :8], kept[:, :8], rtol=2e-5)
    assert np.abs(zeroed - kept)[:, 16:].max() > 1e-3
    measured = [
        measures.loss_by_position(model, variables, list(tokens), chunk=16, edges=[65], control=control)["loss"][0]
        for control in ("zeroed", None)
    ]
    np.testing.assert_allclose(measured, [zeroed.mean(), kept.mean()], rtol=1e-5)


@pytest.mark.parametrize("control", ["zeroed", "reset"])
def test_nothing_passes_through_a_control(control):
    """Beyond the reach of the segments, the first block changes losses only if the memory is kept."""
    model, variables = tiny_run.init(tiny_run.model_config())
    tokens = np.stack(texts(65, 65)).astype(np.int32)
    other = tokens.copy()
    other[:, :8] = 255 - other[:, :8]
    late = slice(8 * (model.config.num_layers + 1), None)  # each layer looks back one block
    cut = [read(model, variables, ids, control=control)[:, late] for ids in (tokens, other)]
    np.testing.assert_array_equal(*cut)
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
        (lambda m, v: recall_accuracy(m, v, TASK, []), r"blocks=\[\]"),
        (lambda m, v: recall_accuracy(m, v, TASK, [9, 2]), "must be at least"),
        (lambda m, v: recall_accuracy(m, v, TASK, [9], trials=0), "trials=0"),
        (lambda m, v: answer_accuracy(m, v, QUESTIONS["prosqa"].task(), batch_size=0), "batch_size=0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    model, variables = tiny_run.init(tiny_run.model_config())
    with pytest.raises(ValueError, match=message):
        call(model, variables)


def test_passkey_needs_the_vocabulary_and_a_memory_to_zero():
    model, variables = tiny_run.init(tiny_run.model_config(vocab_size=12))
    with pytest.raises(ValueError, match="vocab_size=12 is too small for the PassKey task"):
        recall_accuracy(model, variables, TASK, [9])
    with pytest.raises(ValueError, match="vocab_size=12 is too small for the prosqa task, which has 68"):
        answer_accuracy(model, variables, QUESTIONS["prosqa"].task())
    model, variables = digit_model(tiny_run.BSWA)
    with pytest.raises(ValueError, match="this model has no FAM"):
        recall_accuracy(model, variables, TASK, [9], control="zeroed")

"""Our models in the lm-evaluation-harness against single calls of the model; needs the extra `lm-eval`."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from experiments import scoring
from experiments.data.tokenizers import ByteTokenizer
from experiments.scoring import Reader
from fam_jax import generate

api = pytest.importorskip("lm_eval.api.instance", reason='needs pip install -e ".[lm-eval]"')
from experiments.lm_eval_model import HarnessModel  # noqa: E402

both = pytest.mark.parametrize("memory", [tiny_run.FAM, None], ids=["fam", "full"])
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom. "  # 79 bytes, 10 blocks
PAIRS = [
    ("Once upon", " a time"),
    ("Once upon", " a midnight dreary, while I pondered, weak and weary,"),  # several blocks
    ("", "No context"),
    (LONG, "It was"),
    (LONG, " the age of foolishness"),
    ("a", "b"),
    ("a", ""),
    ("Two blanks  ", "end"),
    ("   ", "nothing else"),
    ("12345678", "90"),  # a block
    ("1234567", "8"),
    ("", LONG),
    (LONG[:71], "é"),
]


def wrap(memory=tiny_run.FAM, **options):
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    options = {"batch_size": 3, "chunk": 16, "progress": False} | options
    return HarnessModel(model, variables, ByteTokenizer(), **options)


def requests(kind, many):
    return [api.Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(many)]


def likelihoods(lm, pairs=PAIRS):
    return lm.loglikelihood(requests("loglikelihood", pairs))


def log_probabilities(memory, ids):
    """Of each token but the first, from a single call without padding; and whether each is the most likely."""
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    padded = np.zeros(200, np.int32)  # on the right, where nothing that counts sees it: one program for all
    padded[: len(ids)] = ids
    logits = np.asarray(apply(model, variables, padded[None]))[0, : len(ids) - 1]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return log_p[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == ids[1:]


@partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens):
    return model.apply(variables, tokens).logits


def direct(memory, context, continuation):
    """Log-likelihood and greediness of bytes; blanks at the end of a context are the continuation's."""
    whole = np.frombuffer(b"\0" + (context + continuation).encode(), np.uint8).astype(np.int32)
    kept = len(context.rstrip().encode())
    ids = whole[1:] if kept else whole  # the separator stands for no context
    log_p, hit = log_probabilities(memory, ids)
    first = max(kept - 1, 0)
    return log_p[first:].sum(dtype=np.float64), bool(hit[first:].all())


@pytest.mark.parametrize("memory", [tiny_run.FAM, tiny_run.BSWA, None], ids=["fam", "bswa", "full"])
def test_likelihoods_are_those_of_single_calls(memory):
    got = likelihoods(wrap(memory), [pair for pair in PAIRS if pair[1]])
    want = [direct(memory, *pair) for pair in PAIRS if pair[1]]
    np.testing.assert_allclose([one for one, _ in got], [one for one, _ in want], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert all(isinstance(value, float) and isinstance(greedy, bool) for value, greedy in got)


@both
def test_they_depend_neither_on_the_batch_nor_on_the_order(memory):
    want = likelihoods(wrap(memory))
    assert want[PAIRS.index(("a", ""))] == (0.0, True)
    order = np.random.default_rng(0).permutation(len(PAIRS))
    for options in ({"batch_size": 1, "chunk": 1}, {"batch_size": 16, "chunk": 512}):
        got = likelihoods(wrap(memory, **options), [PAIRS[i] for i in order])
        np.testing.assert_allclose([got[i][0] for i in np.argsort(order)], [one for one, _ in want], atol=1e-4)
        assert [got[i][1] for i in np.argsort(order)] == [greedy for _, greedy in want]


@both
def test_what_all_texts_begin_with_is_read_once(memory, monkeypatch):
    """Examples before a question, say: for all rows together, and with the results of reading them for each."""
    rng = np.random.default_rng(2)
    examples = rng.integers(1, 256, 37)
    contexts = [np.concatenate([examples, rng.integers(1, 256, n)]).astype(np.int32) for n in (0, 1, 9, 30)]
    asked = [(context, rng.integers(1, 256, n).astype(np.int32)) for n in (1, 4) for context in contexts]
    read, rows = scoring.read_on, []
    monkeypatch.setattr(scoring, "read_on", lambda *given: rows.append(given[4].shape[0]) or read(*given))
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    got = Reader(model, variables, 4, 16).scores(asked, progress=False)
    assert rows == [1, 1, 4, 4, 4]  # 32 tokens, and up to 34 more
    want = [direct_scores(memory, *pair) for pair in asked]
    np.testing.assert_allclose([score.log_likelihood for score in got], want, atol=1e-4)


def direct_scores(memory, context, continuation):
    whole = np.concatenate([context, continuation])
    return log_probabilities(memory, whole)[0][-len(continuation) :].sum(dtype=np.float64)


@both
def test_greedy_is_what_greedy_decoding_writes(memory):
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    context = np.frombuffer(b"Once upon", np.uint8).astype(np.int32)
    written = np.asarray(generate(model, variables, context[None], 20).ids)[0]
    other = written.copy()
    other[-1] ^= 1
    reader = Reader(model, variables, 4, 16)
    asked = [(context, written), (context, written[:1]), (context, other), (context, other[:-1])]
    assert [score.greedy for score in reader.scores(asked, progress=False)] == [True, True, False, True]


@both
def test_a_whole_text_is_read_in_one_pass(memory):
    texts = [LONG + "Then it ended.", "short", "", LONG[:40]]
    got = wrap(memory).loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    for value, text in zip(got, texts, strict=True):
        want = direct(memory, "", text)[0] if text else 0.0
        assert value == pytest.approx(want, abs=1e-4, rel=1e-6)


def test_full_attention_can_be_given_a_window_as_the_harness_does_it():
    lm = wrap(None, max_length=16)
    (got,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(LONG,)]))
    ids = np.frombuffer(b"\0" + LONG.encode(), np.uint8).astype(np.int32)
    assert len(LONG) == 79  # four windows; the fifth, of 15 new tokens, sees two old ones
    pieces = [log_probabilities(None, ids[start : start + 17])[0] for start in range(0, 64, 16)]
    pieces.append(log_probabilities(None, ids[-17:])[0][-15:])
    assert got == pytest.approx(np.concatenate(pieces).sum(), abs=1e-4)
    ((cut, _),) = likelihoods(lm, [(LONG, "is")])
    whole = np.concatenate([ids[1:], np.frombuffer(b"is", np.uint8)])
    blank = 1  # at the end of the context
    assert cut == pytest.approx(log_probabilities(None, whole[-17:])[0][-2 - blank :].sum(), abs=1e-4)
    with pytest.raises(ValueError, match="max_length=16 is less than the 20 tokens of a continuation"):
        likelihoods(lm, [("a", "b" * 20)])


def write(lm, *pairs):
    return lm.generate_until(requests("generate_until", pairs))


@both
def test_answers_are_those_of_generate(memory):
    """Longer than the tokens that are written before stop strings are looked for; in several lengths and batches."""
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    contexts = ["Once upon", LONG, "a", "Once upon", "ab", ""]
    new = 2 * scoring.STEPS + 7
    got = write(wrap(memory), *[(context, {"until": [], "max_gen_toks": new}) for context in contexts])
    for context, text in zip(contexts, got, strict=True):
        content = context.encode() or b"\0"
        prompt = np.frombuffer(content.ljust(80), np.uint8).astype(np.int32)
        state = model.init_state(1, None if memory else 200)
        lengths = np.array([len(content)])
        out = generate(model, variables, prompt[None], new, lengths=lengths, state=state, stop_tokens=(0,))
        ids = np.asarray(out.ids)[0, : int(out.lengths[0])]
        assert text == ByteTokenizer().decode(ids[:-1] if ids[-1] == 0 else ids)
    assert got[0] == got[3]
    assert len({*got}) > 2


def test_answers_end_before_the_first_stop_string():
    lm = wrap()
    ((whole,),) = [write(lm, ("Once", {"until": [], "max_gen_toks": 90}))]
    assert len(whole) > 60
    for start, size in ((0, 2), (31, 3), (50, 1)):
        stop = whole[start : start + size]
        (got,) = write(lm, ("Once", {"until": ["never written", stop], "max_gen_toks": 90}))
        assert got == whole[: whole.index(stop)]
    (got,) = write(lm, ("Once", {"until": whole[5:8], "max_gen_toks": 90}))
    assert got == whole[: whole.index(whole[5:8])]
    (short,) = write(lm, ("Once", {"until": ["\n\n"], "max_gen_toks": 5}))
    assert len(short.encode()) >= len(short)
    assert whole.startswith(short.rstrip("�"))


def test_an_answer_ends_with_the_text():
    model, variables = tiny_run.init(tiny_run.model_config())
    embed = variables["params"]["embed"]
    ended = {"params": variables["params"] | {"embed": embed.at[0].set(jnp.sign(embed.sum(0)) * 9.0)}}
    lm = HarnessModel(model, ended, ByteTokenizer(), batch_size=2, chunk=16, progress=False)
    texts = write(lm, *[(context, {"max_gen_toks": 32}) for context in ("a", "bc", LONG)])
    assert all("\0" not in text for text in texts)
    out = generate(model, ended, np.array([[97]]), 32, stop_tokens=(0,))
    assert len(texts[0].encode()) <= int(out.lengths[0])


def test_sampled_answers_have_a_seed():
    options = {"until": [], "do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 40}
    first, again, other = (write(wrap(seed=seed), ("Once", options), ("Once", options)) for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] != first[1]
    greedy = write(wrap(), ("Once", options | {"do_sample": False}), ("Once", {"until": [], "max_gen_toks": 40}))
    assert greedy[0] == greedy[1]


def test_few_programs_serve_all_lengths():
    rng = np.random.default_rng(1)
    model, variables = tiny_run.init(dataclasses.replace(tiny_run.model_config(), d_ff=40))
    reader = Reader(model, variables, 2, 32)
    before = scoring.read_on._cache_size(), scoring._losses._cache_size()
    for _ in range(3):
        lengths = rng.integers(1, 150, (9, 2))
        reader.scores([(np.ones(c, np.int32), np.ones(k, np.int32)) for c, k in lengths], progress=False)
    assert scoring.read_on._cache_size() - before[0] <= 2 * 2 * 2  # widths 16 and 32; one row or two; aligned or not
    assert scoring._losses._cache_size() - before[1] <= 2 * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrap(max_length=64), "max_length=64 is not allowed: a block memory reads texts whole"),
        (lambda: wrap(None, max_length=0), "max_length=0 is not allowed: it must be at least 1"),
        (lambda: wrap(batch_size=0), "batch_size=0"),
        (lambda: wrap(chunk=0), "chunk=0"),
        (lambda: write(wrap(), ("a", {"beams": 3})), "generation_kwargs has beams, which is not known"),
        (lambda: write(wrap(), ("a", {"max_gen_toks": 0})), "max_new_tokens=0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tokenizer_without_an_end_cannot_begin_a_text(monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "separator", None)
    lm = wrap()
    assert likelihoods(lm, [("a", "b")])
    with pytest.raises(ValueError, match="tokenizer='bytes' has no token for the end of a text"):
        likelihoods(lm, [("", "b")])

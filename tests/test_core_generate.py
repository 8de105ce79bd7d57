"""Generation: greedy and sampled, batched, with the state passed in and out, and what it refuses."""

import re

import jax
import numpy as np
import pytest
from reference import (
    B,
    assert_close,
    decoder_config,
    dense_decoder,
    fam_config,
    fam_decoder,
    params_of,
    runner,
    some_tokens,
)

from fam_jax import Decoder, generate

F32 = dict(dtype="float32", param_dtype="float32")
CONFIG = fam_config(**F32)
BLOCK = fam_config({"segments": 2}, schedule="block", parallel_block=True, **F32)
FULL = decoder_config(**F32)
SMALL = decoder_config({"segments": 0}, num_layers=1, **F32)  # for what is about choosing a token only
LENGTHS = np.array([2 * B + 2, 1, B, 3], np.int32)
WIDTH = int(LENGTHS.max())
PROMPT = some_tokens(4, WIDTH, seed=1)
NEW = 2 * B + 1
KEY = jax.random.key(5)
SAMPLED = dict(lengths=LENGTHS, temperature=4.0, key=KEY)


def setup(config):
    return Decoder(config), {"params": params_of(config)}


def continued(r, ids, prompt=PROMPT):
    """Row r's prompt followed by ids."""
    return np.concatenate([prompt[r, : LENGTHS[r]], np.asarray(ids[r])])


def forced(config, texts, starts):
    """The argmax after every token from position `starts` on, by one call over each text."""
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for r, text in enumerate(texts):
        padded[r, : len(text)] = text
    logits = np.asarray(runner(config)(params_of(config), padded).logits)
    return [np.argmax(logits[r, starts[r] - 1 : len(text) - 1], axis=-1) for r, text in enumerate(texts)]


@pytest.mark.parametrize(
    "config", [CONFIG, pytest.param(BLOCK, marks=pytest.mark.slow), FULL], ids=["layer", "block", "full"]
)
def test_greedy_equals_teacher_forcing_by_argmax(config):
    """Every generated id is the argmax of one call over all before it, for rows of different lengths."""
    model, variables = setup(config)
    out = generate(model, variables, PROMPT, NEW, lengths=LENGTHS)
    assert out.ids.shape == (4, NEW)
    assert out.ids.dtype == np.int32
    np.testing.assert_array_equal(out.lengths, NEW)
    want = forced(config, [continued(r, out.ids) for r in range(4)], LENGTHS)
    np.testing.assert_array_equal(out.ids, want)
    assert len({tuple(row) for row in np.asarray(out.ids)}) > 1


def test_a_batch_generates_what_each_prompt_gives_alone():
    model, variables = setup(CONFIG)
    together = generate(model, variables, PROMPT, NEW, lengths=LENGTHS)
    for r in range(4):
        alone = generate(model, variables, PROMPT[r : r + 1], NEW, lengths=LENGTHS[r : r + 1])
        np.testing.assert_array_equal(alone.ids[0], together.ids[r], err_msg=f"row {r}")
    alone = generate(model, variables, PROMPT[3:, : LENGTHS[3]], NEW)
    np.testing.assert_array_equal(alone.ids[0], together.ids[3])


def test_a_sampled_row_depends_on_neither_its_neighbours_nor_its_padding():
    model, variables = setup(CONFIG)
    want = generate(model, variables, PROMPT, NEW, **SAMPLED).ids
    for r, n in enumerate(LENGTHS):
        other = (PROMPT + 3) % CONFIG.vocab_size
        other[r, :n] = PROMPT[r, :n]
        np.testing.assert_array_equal(generate(model, variables, other, NEW, **SAMPLED).ids[r], want[r])


@pytest.mark.parametrize("config", [CONFIG, BLOCK], ids=["layer", "block"])
def test_the_state_has_read_prompt_and_answer(config):
    """Its counters say so, and a second turn goes on as one text of prompt, answer, prompt would."""
    model, variables = setup(config)
    first = generate(model, variables, PROMPT, NEW, lengths=LENGTHS)
    np.testing.assert_array_equal(first.state.blocks * B + first.state.offset, LENGTHS + NEW)
    again = some_tokens(4, WIDTH, seed=2)
    second = generate(model, variables, again, NEW, lengths=LENGTHS[::-1], state=first.state)
    asked = [np.concatenate([continued(r, first.ids), again[r, : LENGTHS[::-1][r]]]) for r in range(4)]
    texts = [np.concatenate([text, second.ids[r]]) for r, text in enumerate(asked)]
    np.testing.assert_array_equal(second.ids, forced(config, texts, [len(text) for text in asked]))
    read = second.state.blocks * B + second.state.offset
    np.testing.assert_array_equal(read, [len(text) for text in texts])


def test_full_attention_goes_on_from_a_state_with_room():
    model, variables = setup(FULL)
    state = model.init_state(4, max_length=20 + WIDTH + NEW)
    state = runner(FULL)(variables["params"], PROMPT[:, :4], state=state).state
    out = generate(model, variables, PROMPT, NEW, state=state)
    texts = [np.concatenate([PROMPT[r, :4], PROMPT[r], out.ids[r]]) for r in range(4)]
    np.testing.assert_array_equal(out.ids, forced(FULL, texts, [4 + WIDTH] * 4))
    with pytest.raises(ValueError, match="max_length"):
        generate(model, variables, PROMPT, NEW + 20, state=state)


def test_stop_tokens_end_a_row():
    """Up to the stop token as without, then filled with it; the row's state has read nothing after it."""
    model, variables = setup(CONFIG)
    free = np.asarray(generate(model, variables, PROMPT, NEW, **SAMPLED).ids)
    stops = (int(free[0, 3]), int(free[2, 1]))
    out = generate(model, variables, PROMPT, NEW, stop_tokens=stops, **SAMPLED)
    assert len(set(np.asarray(out.lengths))) > 1
    for r in range(4):
        hits = np.flatnonzero(np.isin(free[r], stops))
        length = int(hits[0]) + 1 if len(hits) else NEW
        assert int(out.lengths[r]) == length
        np.testing.assert_array_equal(out.ids[r, :length], free[r, :length])
        np.testing.assert_array_equal(out.ids[r, length:], free[r, length - 1])
        assert int(out.state.blocks[r]) * B + int(out.state.offset[r]) == LENGTHS[r] + length
    # A stopped row can be asked again as if nothing had followed.
    more = some_tokens(4, 2, seed=3)
    logits = runner(CONFIG)(variables["params"], more, state=out.state).logits
    for r in (0, 2):
        text = np.concatenate([continued(r, out.ids)[: LENGTHS[r] + int(out.lengths[r])], more[r]])
        want = fam_decoder(variables["params"], CONFIG, text).logits[-2:]
        assert_close(logits[r], want, 1e-5, f"row {r}")


# ------------------------------------------------------------------------------------------------- sampling


ROWS = 600


def next_token_probabilities(temperature):
    logits = dense_decoder(params_of(SMALL), SMALL, PROMPT[0, :3])[-1] / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draw(**options):
    """The next token of the same prompt in many rows."""
    model, variables = setup(SMALL)
    rows = np.repeat(PROMPT[:1, :3], ROWS, axis=0)
    return np.asarray(generate(model, variables, rows, 1, key=KEY, **options).ids)[:, 0]


@pytest.mark.parametrize("temperature", [3.0, 6.0, 12.0])
def test_sampling_follows_the_softmax_at_a_temperature(temperature):
    p = next_token_probabilities(temperature)
    counts = np.bincount(draw(temperature=temperature), minlength=len(p))
    assert np.all(np.abs(counts - ROWS * p) <= 4.5 * np.sqrt(ROWS * p * (1 - p)) + 1)


def test_top_k_draws_from_the_k_best_only():
    p = next_token_probabilities(6.0)
    ids = draw(temperature=6.0, top_k=3)
    assert set(ids) == set(np.argsort(p)[-3:])
    assert np.mean(ids == np.argmax(p)) == pytest.approx(p.max() / np.sort(p)[-3:].sum(), abs=0.1)


def test_top_p_draws_from_the_smallest_set_that_reaches_p():
    p = next_token_probabilities(6.0)
    order = np.argsort(-p)
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1]
    ids = set(draw(temperature=6.0, top_p=0.6))
    assert 1 < len(nucleus) < len(p)
    assert ids <= set(nucleus)
    assert {i for i in nucleus if p[i] > 0.03} <= ids


def test_the_best_token_alone_is_greedy():
    best = int(np.argmax(next_token_probabilities(6.0)))
    assert set(draw(temperature=6.0, top_k=1)) == {best}
    assert set(draw(temperature=6.0, top_k=3, top_p=1e-9)) == {best}


def test_a_key_decides_and_rows_draw_independently():
    model, variables = setup(CONFIG)
    rows = np.repeat(PROMPT[:1], 4, axis=0)
    one, again, other = (
        np.asarray(generate(model, variables, rows, NEW, temperature=4.0, key=key).ids)
        for key in (KEY, KEY, jax.random.key(6))
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    assert len({tuple(row) for row in one}) == 4


# ------------------------------------------------------------------------------------------------- bad input


def changed(column, value):
    prompt = PROMPT.copy()
    prompt[1, column] = value
    return prompt


BAD = {
    "negative id": (dict(prompt=changed(0, -1)), "-1"),
    "id beyond the vocabulary": (dict(prompt=changed(0, 29)), "29"),
    "rows of different lengths": (dict(prompt=[[1, 2], [3]]), "prompt=[[1, 2], [3]] is not allowed"),
    "text as prompt": (dict(prompt=["a", "b"]), "prompt"),
    "floating ids": (dict(prompt=PROMPT.astype(np.float32)), "float32"),
    "boolean ids": (dict(prompt=PROMPT > 3), "bool"),
    "empty prompt": (dict(prompt=PROMPT[:, :0]), "prompt"),
    "no rows": (dict(prompt=PROMPT[:0]), "prompt"),
    "one dimension": (dict(prompt=PROMPT[0]), "prompt"),
    "an empty row without a state": (dict(lengths=np.array([3, 0, 1, 1])), "lengths"),
    "negative length": (dict(lengths=np.array([3, -1, 1, 1])), "-1"),
    "length beyond the prompt": (dict(lengths=np.array([3, WIDTH + 1, 1, 1])), str(WIDTH + 1)),
    "lengths in rows": (dict(lengths=[[3, 1], [1]]), "lengths"),
    "lengths of another batch": (dict(lengths=np.array([3, 1])), "lengths"),
    "negative temperature": (dict(temperature=-0.5, key=KEY), "-0.5"),
    "temperature that is no number": (dict(temperature=float("nan"), key=KEY), "nan"),
    "infinite temperature": (dict(temperature=float("inf"), key=KEY), "inf"),
    "temperature in words": (dict(temperature="hot", key=KEY), "temperature='hot'"),
    "temperature in figures": (dict(temperature="1", key=KEY), "temperature='1'"),
    "temperatures": (dict(temperature=[1.0, 2.0], key=KEY), "temperature=[1.0, 2.0]"),
    "no temperature": (dict(temperature=None), "temperature=None"),
    "sampling without a key": (dict(temperature=1.0), "key"),
    "top_k of zero": (dict(top_k=0, temperature=1.0, key=KEY), "top_k"),
    "fractional top_k": (dict(top_k=2.5, temperature=1.0, key=KEY), "2.5"),
    "top_p of zero": (dict(top_p=0.0, temperature=1.0, key=KEY), "top_p"),
    "top_p in words": (dict(top_p="most", temperature=1.0, key=KEY), "top_p='most'"),
    "top_p above one": (dict(top_p=1.5, temperature=1.0, key=KEY), "1.5"),
    "nothing to generate": (dict(max_new_tokens=0), "max_new_tokens"),
    "negative count": (dict(max_new_tokens=-3), "-3"),
    "stop tokens in rows": (dict(stop_tokens=[[1, 2], [3]]), "stop_tokens"),
    "an array as state": (dict(state=np.zeros(3)), "state is a ndarray; pass the `state`"),
    "text as state": (dict(state="fresh"), "state is a str; pass the `state`"),
    "stop token outside the vocabulary": (dict(stop_tokens=(2, 29)), "29"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["fam", "full"])
def test_bad_input_is_one_clear_error(name, config):
    model, variables = setup(config)
    options, named = BAD[name]
    arguments = {"prompt": PROMPT, "max_new_tokens": 2, **options}
    with pytest.raises(ValueError, match=re.escape(named)):
        generate(model, variables, arguments.pop("prompt"), arguments.pop("max_new_tokens"), **arguments)


def test_a_state_of_another_batch_is_an_error():
    model, variables = setup(CONFIG)
    with pytest.raises(ValueError, match=r"state|batch"):
        generate(model, variables, PROMPT, 2, state=model.init_state(3))

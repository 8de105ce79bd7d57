"""Generation: greedy and sampled, batched, with the state passed in and out, and what it refuses."""

import jax
import numpy as np
import pytest
from reference import (
    B,
    assert_close,
    decoder_config,
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
LENGTHS = np.array([2 * B + 2, 1, B, 3], np.int32)
WIDTH = int(LENGTHS.max())
PROMPT = some_tokens(4, WIDTH, seed=1)
NEW = 2 * B + 1
KEY = jax.random.key(5)


def setup(config):
    return Decoder(config), {"params": params_of(config)}


def continued(r, ids):
    """Row r's prompt followed by ids."""
    return np.concatenate([PROMPT[r, : LENGTHS[r]], np.asarray(ids[r])])


@pytest.mark.parametrize("config", [CONFIG, BLOCK, FULL], ids=["layer", "block", "full"])
def test_greedy_equals_teacher_forcing_by_argmax(config):
    """Every generated id is the argmax of one call over all before it, for rows of different lengths."""
    model, variables = setup(config)
    out = generate(model, variables, PROMPT, NEW, lengths=LENGTHS)
    assert out.ids.shape == (4, NEW)
    assert out.ids.dtype == np.int32
    np.testing.assert_array_equal(out.lengths, NEW)
    for r in range(4):
        text = continued(r, out.ids)
        padded = np.zeros((1, WIDTH + NEW), np.int32)  # one shape, one compilation
        padded[0, : len(text)] = text
        logits = np.asarray(runner(config)(variables["params"], padded).logits[0])
        want = np.argmax(logits[LENGTHS[r] - 1 : len(text) - 1], axis=-1)
        np.testing.assert_array_equal(out.ids[r], want, err_msg=f"row {r}")
    assert len({tuple(row) for row in np.asarray(out.ids)}) > 1


def test_a_batch_generates_what_each_prompt_gives_alone():
    model, variables = setup(CONFIG)
    together = generate(model, variables, PROMPT, NEW, lengths=LENGTHS)
    for r in range(4):
        padded = generate(model, variables, PROMPT[r : r + 1], NEW, lengths=LENGTHS[r : r + 1])
        np.testing.assert_array_equal(padded.ids[0], together.ids[r], err_msg=f"row {r}")
    alone = generate(model, variables, PROMPT[3:, : LENGTHS[3]], NEW)
    np.testing.assert_array_equal(alone.ids[0], together.ids[3])


def test_padding_of_a_prompt_is_not_read():
    model, variables = setup(CONFIG)
    other = PROMPT.copy()
    for r, n in enumerate(LENGTHS):
        other[r, n:] = 7
    want, got = (generate(model, variables, prompt, NEW, lengths=LENGTHS).ids for prompt in (PROMPT, other))
    np.testing.assert_array_equal(got, want)


def test_the_state_has_read_prompt_and_answer():
    """Its counters say so, and going on from it equals one call over everything."""
    model, variables = setup(CONFIG)
    out = generate(model, variables, PROMPT, NEW, lengths=LENGTHS)
    np.testing.assert_array_equal(out.state.blocks * B + out.state.offset, LENGTHS + NEW)
    more = some_tokens(4, 3, seed=2)
    logits = runner(CONFIG)(variables["params"], more, state=out.state).logits
    for r in range(4):
        text = np.concatenate([continued(r, out.ids), more[r]])
        assert_close(logits[r], fam_decoder(variables["params"], CONFIG, text).logits[-3:], 1e-5, f"row {r}")


@pytest.mark.parametrize("config", [CONFIG, BLOCK], ids=["layer", "block"])
def test_state_in_equals_one_long_prompt(config):
    model, variables = setup(config)
    want = generate(model, variables, PROMPT, NEW).ids
    state = runner(config)(variables["params"], PROMPT[:, : B + 2]).state
    got = generate(model, variables, PROMPT[:, B + 2 :], NEW, state=state)
    np.testing.assert_array_equal(got.ids, want)
    # Two turns: what is generated in the first is part of the text of the second.
    first = generate(model, variables, PROMPT[:, :B], 3)
    second = generate(model, variables, PROMPT[:, B:], NEW, state=first.state)
    text = np.concatenate([PROMPT[:, :B], first.ids, PROMPT[:, B:]], axis=1)
    np.testing.assert_array_equal(second.ids, generate(model, variables, text, NEW).ids)


def test_full_attention_goes_on_from_a_state_with_room():
    model, variables = setup(FULL)
    want = generate(model, variables, PROMPT, NEW).ids
    state = model.init_state(4, max_length=WIDTH + NEW)
    state = runner(FULL)(variables["params"], PROMPT[:, :4], state=state).state
    np.testing.assert_array_equal(generate(model, variables, PROMPT[:, 4:], NEW, state=state).ids, want)
    with pytest.raises(ValueError, match="max_length"):
        generate(model, variables, PROMPT[:, 4:], NEW + 8, state=state)


def test_stop_tokens_end_a_row():
    """Up to the stop token as without, then filled with it; the row's state has read nothing after it."""
    model, variables = setup(CONFIG)
    free = np.asarray(generate(model, variables, PROMPT, NEW, lengths=LENGTHS, temperature=1.0, key=KEY).ids)
    stops = (int(free[0, 3]), int(free[2, 1]))
    out = generate(
        model, variables, PROMPT, NEW, lengths=LENGTHS, stop_tokens=stops, temperature=1.0, key=KEY
    )
    ended = 0
    for r in range(4):
        hits = np.flatnonzero(np.isin(free[r], stops))
        length = int(hits[0]) + 1 if len(hits) else NEW
        ended += len(hits) > 0
        assert int(out.lengths[r]) == length
        np.testing.assert_array_equal(out.ids[r, :length], free[r, :length])
        np.testing.assert_array_equal(out.ids[r, length:], free[r, length - 1] if len(hits) else 0)
        assert int(out.state.blocks[r]) * B + int(out.state.offset[r]) == LENGTHS[r] + length
    assert ended >= 2
    # A stopped row can be asked again as if nothing had followed.
    more = some_tokens(4, 2, seed=3)
    logits = runner(CONFIG)(variables["params"], more, state=out.state).logits
    text = np.concatenate([continued(0, out.ids)[: LENGTHS[0] + int(out.lengths[0])], more[0]])
    assert_close(logits[0], fam_decoder(variables["params"], CONFIG, text).logits[-2:], 1e-5)


# --------------------------------------------------------------------------------------------------- sampling


def next_token_probabilities(temperature):
    params = params_of(CONFIG)
    logits = np.asarray(runner(CONFIG)(params, PROMPT[:1, :WIDTH]).logits[0, -1], np.float64) / temperature
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def draw(count=600, **options):
    """The next token of the same prompt in many rows."""
    model, variables = setup(CONFIG)
    rows = np.repeat(PROMPT[:1], count, axis=0)
    return np.asarray(generate(model, variables, rows, 1, key=KEY, **options).ids)[:, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_softmax_at_a_temperature(temperature):
    p = next_token_probabilities(temperature)
    counts = np.bincount(draw(temperature=temperature), minlength=len(p))
    expected = 600 * p
    assert np.all(np.abs(counts - expected) <= 4.5 * np.sqrt(expected * (1 - p)) + 1)


def test_top_k_draws_from_the_k_best_only():
    p = next_token_probabilities(2.0)
    ids = draw(temperature=2.0, top_k=3)
    assert set(ids) == set(np.argsort(p)[-3:])
    share = np.sort(p)[-1] / np.sort(p)[-3:].sum()
    assert np.mean(ids == np.argmax(p)) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p):
    p = next_token_probabilities(2.0)
    order = np.argsort(-p)
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    ids = set(draw(temperature=2.0, top_p=top_p))
    assert ids <= set(nucleus)
    likely = {int(i) for i in nucleus if p[i] > 0.03}
    assert likely <= ids


def test_limits_of_sampling_are_greedy():
    model, variables = setup(CONFIG)
    want = generate(model, variables, PROMPT, NEW, lengths=LENGTHS).ids
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        got = generate(
            model, variables, PROMPT, NEW, lengths=LENGTHS, temperature=1.0, key=KEY, **options
        ).ids
        np.testing.assert_array_equal(got, want, err_msg=str(options))
    whole = {"top_k": CONFIG.vocab_size, "top_p": 1.0}
    free, limited = (
        generate(model, variables, PROMPT, NEW, lengths=LENGTHS, temperature=1.0, key=KEY, **options).ids
        for options in ({}, whole)
    )
    np.testing.assert_array_equal(limited, free)


def test_a_key_decides_and_rows_draw_independently():
    model, variables = setup(CONFIG)
    rows = np.repeat(PROMPT[:1], 4, axis=0)
    one, again, other = (
        np.asarray(generate(model, variables, rows, NEW, temperature=1.0, key=key).ids)
        for key in (KEY, KEY, jax.random.key(6))
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    assert len({tuple(row) for row in one}) == 4


def test_a_sampled_row_does_not_depend_on_its_neighbours():
    """The first row of a batch draws what it draws alone under the same key."""
    model, variables = setup(CONFIG)
    together = generate(model, variables, PROMPT, NEW, lengths=LENGTHS, temperature=1.0, key=KEY)
    others = PROMPT.copy()
    others[1:] = (others[1:] + 3) % CONFIG.vocab_size
    beside = generate(model, variables, others, NEW, lengths=LENGTHS, temperature=1.0, key=KEY)
    alone = generate(model, variables, PROMPT[:1], NEW, lengths=LENGTHS[:1], temperature=1.0, key=KEY)
    np.testing.assert_array_equal(beside.ids[0], together.ids[0])
    np.testing.assert_array_equal(alone.ids[0], together.ids[0])


# -------------------------------------------------------------------------------------------------- bad input


def changed(column, value):
    prompt = PROMPT.copy()
    prompt[1, column] = value
    return prompt


BAD = {
    "negative id": (dict(prompt=changed(0, -1)), "-1"),
    "id beyond the vocabulary": (dict(prompt=changed(0, 29)), "29"),
    "floating ids": (dict(prompt=PROMPT.astype(np.float32)), "float32"),
    "boolean ids": (dict(prompt=PROMPT > 3), "bool"),
    "empty prompt": (dict(prompt=PROMPT[:, :0]), "prompt"),
    "no rows": (dict(prompt=PROMPT[:0]), "prompt"),
    "one dimension": (dict(prompt=PROMPT[0]), "prompt"),
    "an empty row without a state": (dict(lengths=np.array([3, 0, 1, 1])), "lengths"),
    "negative length": (dict(lengths=np.array([3, -1, 1, 1])), "-1"),
    "length beyond the prompt": (dict(lengths=np.array([3, WIDTH + 1, 1, 1])), str(WIDTH + 1)),
    "lengths of another batch": (dict(lengths=np.array([3, 1])), "lengths"),
    "negative temperature": (dict(temperature=-0.5, key=KEY), "-0.5"),
    "temperature that is no number": (dict(temperature=float("nan"), key=KEY), "nan"),
    "infinite temperature": (dict(temperature=float("inf"), key=KEY), "inf"),
    "sampling without a key": (dict(temperature=1.0), "key"),
    "top_k of zero": (dict(top_k=0, temperature=1.0, key=KEY), "top_k"),
    "fractional top_k": (dict(top_k=2.5, temperature=1.0, key=KEY), "2.5"),
    "top_p of zero": (dict(top_p=0.0, temperature=1.0, key=KEY), "top_p"),
    "top_p above one": (dict(top_p=1.5, temperature=1.0, key=KEY), "1.5"),
    "nothing to generate": (dict(max_new_tokens=0), "max_new_tokens"),
    "negative count": (dict(max_new_tokens=-3), "-3"),
    "stop token outside the vocabulary": (dict(stop_tokens=(2, 29)), "29"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    model, variables = setup(CONFIG)
    options, named = BAD[name]
    arguments = {"prompt": PROMPT, "max_new_tokens": 2, **options}
    with pytest.raises(ValueError, match=re.escape(named)):
        generate(model, variables, arguments.pop("prompt"), arguments.pop("max_new_tokens"), **arguments)
    assert named in str(caught.value)


def test_a_state_of_another_batch_is_an_error():
    model, variables = setup(CONFIG)
    with pytest.raises(ValueError, match=r"state|batch"):
        generate(model, variables, PROMPT, 2, state=model.init_state(3))

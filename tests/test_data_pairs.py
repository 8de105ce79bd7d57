"""Key-value samples against their description, read back as text."""

import re
from functools import partial

import jax
import numpy as np
import pytest
import tiny_run

from experiments.config import check
from experiments.data import DataError
from experiments.data.pairs import PairsData

SMALL = {"pairs": (2, 4), "batch_size": 4}


def rows_of(level, rows=30, seed=0, **settings):
    """The settings, and of each row the blocks as text with the whole answer in the last, and the answer."""
    config = PairsData(**{**SMALL, **settings})
    task = config.task()
    batch = task.sample(np.random.default_rng(seed), rows, level)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    found = []
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
        text = task.tokenizer.decode([*tokens, targets[-1]]).replace(" ", "")
        size = config.block_size
        assert len(text) == size * config.row_blocks(level) + 1
        blocks = [text[at : at + size] for at in range(0, len(tokens), size)]
        blocks[-1] += text[-1]
        found.append((blocks, task.tokenizer.decode(targets[weights > 0]).replace(" ", "")))
        if config.asked == 1:
            assert (np.flatnonzero(weights) == np.arange(len(weights))[-config.value_length :]).all()
    return config, found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 32, "filler": 5},
        {"block_size": 8, "per_block": 1, "filler": 0},
        {"block_size": 40, "per_block": 2, "key_length": 3, "value_length": 1},
        {"block_size": 8, "per_block": 1, "live": 3, "filler": 1},
        {"block_size": 24, "live": 1},
        {"key_length": 1, "value_length": 1, "symbols": 2, "live": 2},
    ],
)
@pytest.mark.parametrize("level", [1, 2, 9])
def test_samples_follow_the_description(level, settings):
    if level == 9 and not settings.get("live") and settings.get("symbols") == 2:
        return
    config, rows = rows_of(level, **settings)
    symbols = config.load_tokenizer().words[: config.symbols]
    one = rf"!(\w{{{config.key_length}}}):(\w{{{config.value_length}}})!"
    known = set()
    for blocks, answer in rows:
        held = -(-level // config.held)
        pairs = []
        for number, block in enumerate(blocks[:held]):
            here = re.findall(one, block)
            assert len(here) == min(config.held, level - number * config.held)  # full blocks, then the rest
            assert re.fullmatch(rf"({one})+\.*", block)
            pairs += here
        assert all(set(block) == {"."} for block in blocks[held:-1])
        assert len(blocks) - held - 1 == config.filler
        asked = re.fullmatch(rf"\.*\?(\w{{{config.key_length}}}):(\w{{{config.value_length}}})", blocks[-1])
        key, value = asked.groups()
        assert dict(pairs)[key] == value == answer  # a dict keeps the last value of a key
        keys = {key for key, _ in pairs}
        assert len(keys) <= config.live if config.live else len(keys) == level
        known |= set("".join(key + value for key, value in pairs))
    assert known <= set(symbols)


def test_every_pair_is_asked_for_and_keys_are_drawn_evenly():
    _, rows = rows_of(4, rows=400, block_size=8, per_block=1, live=2)
    places = [max(n for n, block in enumerate(blocks[:4]) if blocks[-1][-5:-2] in block) for blocks, _ in rows]
    counts = np.bincount(places, minlength=4)
    assert (counts > 5).all()
    assert counts[3] > counts[0]  # a value that was overwritten does not count
    _, rows = rows_of(4, rows=400)
    text = [("".join(blocks[:2]), blocks[-1][-5:-2]) for blocks, _ in rows]
    counts = np.bincount([re.findall(r"!(\w\w:)", pairs).index(key) for pairs, key in text], minlength=4)
    assert (counts > 70).all()


def test_several_questions_are_asked_in_training_and_one_in_measuring():
    config, rows = rows_of(6, asked=3, block_size=24, live=4)
    for blocks, answers in rows:
        pairs = dict(re.findall(r"!(\w\w):(\w\w)!", "".join(blocks[:-1])))
        questions = re.fullmatch(r"\.*\?(\w\w):(\w\w)\?(\w\w):(\w\w)\?(\w\w):(\w\w)", blocks[-1]).groups()
        assert [pairs[key] for key in questions[::2]] == list(questions[1::2])
        assert answers == "".join(questions[1::2])  # these alone count
    _, rows = rows_of(3, asked=3, block_size=24)
    for blocks, _ in rows:  # each pair is asked for once
        assert len(set(re.findall(r"\?(\w\w)", blocks[-1]))) == 3
    batches = [task.sample(np.random.default_rng(0), 2, 6)["weights"] for task in map(config.task, ("train", "test"))]
    assert [weights.sum() for weights in batches] == [12, 4]


@pytest.mark.parametrize("length", [1, 2])
def test_without_marks_values_stand_right_after_their_keys(length):
    sizes = {"key_length": length, "value_length": length, "asked": 3}
    config, rows = rows_of(9, **sizes, marks=False, block_size=18, filler=1)
    for blocks, answers in rows:
        text = "".join(blocks[: -config.filler - 1]).replace(".", "")
        parts = [text[at : at + length] for at in range(0, len(text), length)]
        pairs = dict(zip(parts[::2], parts[1::2], strict=True))
        assert len(pairs) == 9
        questions = blocks[-1].strip(".").split("?")[1:]
        assert [pairs[asked[:length]] for asked in questions] == [asked[length:] for asked in questions]
        assert answers == "".join(asked[length:] for asked in questions)
        assert blocks[-2] == "." * 18


def test_overwritten_values_are_wrong_answers():
    _, rows = rows_of(12, block_size=8, per_block=1, live=2)
    stale = 0
    for blocks, answer in rows:
        key = blocks[-1][-5:-3]
        values = [block[4:6] for block in blocks[:12] if block[1:3] == key]
        assert values[-1] == answer
        stale += any(value != answer for value in values)
    assert stale > 25


@partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens):
    return model.apply(variables, tokens).logits


@pytest.mark.parametrize("segments", [0, 1])
def test_no_window_reaches_the_pairs(segments):
    """With the least filler that is allowed, what a pair says changes nothing of a model without a FAM."""
    memory = tiny_run.MemoryConfig(block_size=16, segments=segments)
    model, variables = tiny_run.init(tiny_run.model_config(memory, 80))
    reach = model.config.num_layers * segments
    config = PairsData(**SMALL, filler=reach)
    check(tiny_run.run_of(config, segments))
    if reach:
        with pytest.raises(ValueError, match=rf"data.filler={reach - 1} leaves pairs within reach.*at least {reach}"):
            check(tiny_run.run_of(PairsData(**SMALL, filler=reach - 1), segments))
    tokens = config.task().sample(np.random.default_rng(0), 2, 4)["tokens"]
    other = tokens.copy()
    other[:, : 16 * 2] = 70  # two blocks of pairs
    one, two = (np.asarray(apply(model, variables, ids)) for ids in (tokens, other))
    np.testing.assert_array_equal(one[:, -16:], two[:, -16:])
    assert np.abs(one - two)[:, 16 * (1 + reach) : 16 * (2 + reach)].max() > 1e-6  # in the block before they are seen


def test_full_attention_needs_no_filler():
    check(tiny_run.run_of(PairsData(**SMALL, filler=0), model=tiny_run.model_config(None)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": (3, 2)}, r"pairs=\(3, 2\): must be numbers in rising order"),
        ({"key_length": 0}, "key_length=0: must be at least 1"),
        ({"key_length": 11}, "key_length=11: must be at most 8"),
        ({"value_length": 0}, "value_length=0"),
        ({"per_block": -1}, "per_block=-1: must be at least 0"),
        ({"live": -1}, "live=-1"),
        ({"filler": -1}, "filler=-1"),
        ({"asked": 0}, "asked=0: must be at least 1"),
        ({"asked": 3}, "asked=3: must be at most 2, so that questions of 6 tokens fit into a block of block_size=16"),
        ({"symbols": 1}, "symbols=1: must be from 2 to 62"),
        ({"symbols": 63}, "symbols=63"),
        ({"block_size": 6}, "block_size=6: must be at least 7, so that 1 pairs of 7 tokens fit"),
        ({"per_block": 3}, "block_size=16: must be at least 21, so that 3 pairs"),
        ({"live": 5, "symbols": 2}, "live=5: must be at most 4, the number of different keys"),
        ({"symbols": 2, "pairs": (4, 5)}, r"pairs=\(4, 5\): must be at most 4, .*symbols=2; make key_length larger"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        PairsData(**settings)
    task = PairsData(pairs=(4,), symbols=2).task()
    with pytest.raises(ValueError, match=r"pairs=\(5,\): must be at most 4"):
        task.sample(np.random.default_rng(0), 1, 5)


def test_tokenizer():
    tokenizer = PairsData().load_tokenizer()
    assert tokenizer.decode(tokenizer.encode("!a0:Z9! ?.")) == "! a 0 : Z 9 ! ? ."
    assert PairsData(pairs=(4,), symbols=2).load_tokenizer().words == ("a", "b", "!", ":", "?", ".", "<eos>")
    with pytest.raises(DataError, match="key-value task has no '#'"):
        tokenizer.encode("#")

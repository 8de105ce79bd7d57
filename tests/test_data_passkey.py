"""PassKey samples against their template, and the curriculum over lengths."""

import json
import re

import numpy as np
import pytest

from experiments.data import Batches, DataError
from experiments.data.levels import LevelBatches
from experiments.data.passkey import DECOY, FILLER, KEY, QUESTION, TASK, Passkey, PasskeyData

SMALL = {"block_size": 8, "blocks": (10, 14), "batch_size": 8}


def words(text):
    return " ".join(re.findall(r"\d|[A-Za-z]+|[^\w\s]", text))


HEAD, TAIL = words(TASK), words(QUESTION)


def samples(blocks=14, rows=40, seed=0, **settings):
    """The batch, and the text of each of its rows up to and including the answer."""
    task = Passkey(PasskeyData(**{**SMALL, **settings}))
    batch = task.sample(np.random.default_rng(seed), rows, blocks)
    ids = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1)
    return batch, [task.tokenizer.decode(row) for row in ids]


def parts(text, digits=5):
    """Filler before and after the key, and the key, of a text that follows the template."""
    key = text[-(2 * digits - 1) :]
    assert re.fullmatch(r"\d( \d)*", key)
    asked = f" {TAIL} {key}"
    assert text.startswith(HEAD)
    assert text.endswith(asked)
    middle = text.removeprefix(HEAD).removesuffix(asked)
    hidden = f" {words(KEY).replace('{ key }', key)}"
    before, found, after = middle.partition(hidden)
    assert found
    assert hidden not in after
    return before.strip(), after.strip(), key.replace(" ", "")


@pytest.mark.parametrize("filler", ["loop", "decoys"])
@pytest.mark.parametrize("depth", ["uniform", "first", "mixed"])
@pytest.mark.parametrize(("digits", "blocks"), [(1, 9), (5, 10), (5, 33), (7, 16)])
def test_samples_follow_the_template(digits, blocks, depth, filler):
    batch, texts = samples(blocks, digits=digits, depth=depth, filler=filler)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "tokens": ("int32", (40, 8 * blocks)),
        "targets": ("int32", (40, 8 * blocks)),
        "weights": ("float32", (40, 8 * blocks)),
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    keys = [parts(text, digits)[2] for text in texts]
    assert len(set(keys)) > 5
    # In the loss is the answer and nothing else.
    for weights, targets, key in zip(batch["weights"], batch["targets"], keys, strict=True):
        assert weights.tolist() == [0] * (8 * blocks - digits) + [1] * digits
        assert targets[-digits:].tolist() == [int(digit) for digit in key]  # digit d is id d


def test_the_loop_repeats_the_five_sentences_from_the_first():
    loop = words(" ".join(FILLER * 20))
    for text in samples(33)[1]:
        before, after, _ = parts(text)
        assert loop.startswith(f"{before} {after}".strip())


def test_mixed_filler_is_either_at_either_depth():
    """Two rows of four have either filler, one of them with the key first; measured is each filler apart."""
    texts = samples(40, depth="mixed", filler="mixed", rows=8)[1]
    assert [parts(text)[0] == "" for text in texts] == [True, False] * 4
    assert ["number of the day" in text for text in texts] == [False, False, True, True] * 2
    settings = PasskeyData(filler="mixed")
    assert settings.parts() == {
        ", loop": PasskeyData(filler="loop"),
        ", decoys": PasskeyData(filler="decoys"),
    }
    assert PasskeyData(filler="loop").parts() == {"": PasskeyData(filler="loop")}


@pytest.mark.parametrize("filler", ["loop", "decoys"])
def test_filler_fills_what_task_key_and_question_leave(filler):
    fixed = len(words(f"{TASK} {KEY.format(key='12345')} {QUESTION} 12345").split())
    for blocks in (10, 11, 30):
        for text in samples(blocks, filler=filler)[1]:
            before, after, _ = parts(text)
            assert len(before.split()) + len(after.split()) == 8 * blocks + 1 - fixed


def test_where_the_key_stands():
    def depths(**settings):
        return [len(parts(text)[0].split()) for text in samples(12, 400, **settings)[1]]

    uniform, mixed = depths(depth="uniform"), depths(depth="mixed")
    room = sum(len(part.split()) for part in parts(samples(12, 1)[1][0])[:2])
    assert set(uniform) == set(range(room + 1))  # every place, both ends included
    assert abs(np.mean(uniform) / room - 0.5) < 0.05
    assert not any(depths(depth="first"))
    assert not any(mixed[::2])
    assert abs(np.mean(mixed[1::2]) / room - 0.5) < 0.07


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_decoys_are_not_the_key(digits):
    """With so few digits the same number is often drawn, and many keys are palindromes."""
    count = palindromes = 0
    for seed in range(20):
        for text in samples(20, seed=seed, digits=digits, filler="decoys")[1]:
            before, after, key = parts(text, digits)
            decoys = re.findall(r"day is (\d(?: \d)*) \.", f"{before} {after}")
            assert " ".join(key) not in decoys
            count, palindromes = count + len(decoys), palindromes + (key == key[::-1])
    assert count > 1000
    assert palindromes > 50


def test_sentences_with_decoys_come_in_random_order():
    orders = {parts(text)[:2] for text in samples(14, depth="first", filler="decoys")[1]}
    assert len(orders) == 40
    known = {*words(" ".join([*FILLER, DECOY])).split(), *"0123456789"}
    assert {word for _, after in orders for word in after.split()} <= known


def test_a_seed_stays_the_same_samples():
    """Committed results name their seeds: the draws of the plain template must stay as they are."""
    drawn = [parts(text) for text in samples(14, 4, depth="mixed")[1]]
    places = [(len(before.split()), key) for before, _, key in drawn]
    assert places == [(0, "86523"), (30, "00018"), (0, "95697"), (38, "65592")]


def grown(data, steps, exact_match=1.0):
    """Draws batches, each told to have been answered so well; their lengths in blocks."""
    lengths = []
    for _ in range(steps):
        lengths.append(next(data)["tokens"].shape[1] // SMALL["block_size"])
        data.observe({"exact_match": exact_match})
    return lengths


def test_the_next_length_comes_after_ten_good_batches_of_the_longest():
    data = LevelBatches(PasskeyData(**{**SMALL, "blocks": (10, 12, 14), "threshold": 0.9}))
    assert isinstance(data, Batches)
    assert iter(data) is data
    assert grown(data, 30, 0.89) == [10] * 30  # not good enough
    # The mean of the last ten decides: 0.9 is reached with the tenth.
    assert grown(data, 10, 0.9) == [10] * 10
    lengths = grown(data, 60)
    assert 12 in lengths[:10]
    raised = [place for place, length in enumerate(lengths) if length == 12][9]
    assert 14 not in lengths[: raised + 1]  # shorter batches, good as they are, do not count
    assert set(lengths[raised + 1 :]) == {10, 12, 14}  # all lengths reached are drawn
    grown(data, 200)  # the longest stays the longest


def test_same_settings_same_batches_and_another_seed_others():
    one, two, other = (next(LevelBatches(PasskeyData(**SMALL, seed=seed)))["tokens"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_resumes_exactly_after_every_step():
    """Also where the curriculum is one good batch before the next length."""
    config = PasskeyData(**SMALL)
    data = LevelBatches(config)
    states, batches = [data.get_state()], []
    for _ in range(25):
        batches.append(next(data))
        data.observe({"exact_match": 1.0})
        states.append(data.get_state())
    assert [state["level"] for state in states] == [1] * 10 + [2] * 16
    for step in range(25):
        again = LevelBatches(config)
        again.set_state(json.loads(json.dumps(states[step])))
        for at in range(step, 25):
            assert again.get_state() == states[at]
            for key, value in next(again).items():
                np.testing.assert_array_equal(value, batches[at][key], key)
            again.observe({"exact_match": 1.0})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed=0, not 7"),
        ({"blocks": (10, 15)}, r"blocks=\[10, 14\], not \[10, 15\]"),
        ({"filler": "decoys"}, "filler='loop', not 'decoys'"),
    ],
)
def test_a_position_of_other_settings_is_refused(change, named):
    state = json.loads(json.dumps(LevelBatches(PasskeyData(**SMALL)).get_state()))
    with pytest.raises(DataError, match=f"this position belongs to PassKey data with {named}; use the same"):
        LevelBatches(PasskeyData(**{**SMALL, **change})).set_state(state)


def test_tokenizer():
    tokenizer = Passkey(PasskeyData()).tokenizer
    assert tokenizer.decode(tokenizer.encode("The pass key is 90210.")) == "The pass key is 9 0 2 1 0 ."
    assert tokenizer.encode("0123456789").tolist() == list(range(10))
    with pytest.raises(DataError, match="PassKey vocabulary has no 'wumpus'"):
        tokenizer.encode("The wumpus is green.")


@pytest.mark.parametrize("filler", ["loop", "decoys"])
def test_another_tokenizer_reads_the_text_as_it_is_written(filler):
    config = PasskeyData(block_size=64, blocks=(8,), tokenizer="bytes", filler=filler)
    task = Passkey(config)
    config.check_levels()
    batch = task.sample(np.random.default_rng(0), 6, 9)
    assert batch["tokens"].shape == (6, 9 * 64)
    for tokens, targets, weights in zip(*(batch[name] for name in ("tokens", "targets", "weights")), strict=True):
        text = task.tokenizer.decode([*tokens, targets[-1]])
        assert text.startswith(f"{TASK} ")
        key = text[-5:]
        assert key.isdecimal()
        assert text.endswith(f" {QUESTION} {key}")
        assert f" {KEY.format(key=key)}" in text
        assert task.tokenizer.decode(targets[weights > 0]) == f" {key}"
    first = Passkey(PasskeyData(block_size=64, blocks=(8,), tokenizer="bytes", depth="first"))
    ids = first.sample(np.random.default_rng(0), 1, 9)["tokens"][0]
    assert first.tokenizer.decode(ids).partition("is the pass key.")[2].startswith(" " + " ".join(FILLER[:3]))


def test_lengths_count_the_ids_of_the_tokenizer():
    config = PasskeyData(block_size=8, blocks=(10,), tokenizer="bytes")  # enough for words
    with pytest.raises(ValueError, match=rf"blocks=\(10,\): must be at least {config.shortest} with block_size=8"):
        config.check_levels()
    assert config.shortest > 20


def test_a_position_belongs_to_a_vocabulary_and_not_to_its_place():
    settings = {"block_size": 64, "blocks": (8,), "batch_size": 2}
    state = LevelBatches(PasskeyData(**settings, tokenizer="bytes")).get_state()
    LevelBatches(PasskeyData(**settings, tokenizer="bytes")).set_state(state)
    with pytest.raises(DataError, match="tokenizer='bytes', not None"):
        LevelBatches(PasskeyData(**settings)).set_state(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0: must be at least 1"),
        ({"digits": 0}, "digits=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"blocks": ()}, r"blocks=\(\): must be lengths in rising order"),
        ({"blocks": (8, 6)}, r"blocks=\(8, 6\): must be lengths in rising order"),
        ({"blocks": (4,)}, r"blocks=\(4,\): must be at least 5 with block_size=16 and digits=5"),
        ({"threshold": 1.5}, "threshold=1.5: must be between 0 and 1"),
        ({"depth": "last"}, "depth='last': must be uniform, first or mixed"),
        ({"filler": "noise"}, "filler='noise': must be loop, decoys or mixed"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        PasskeyData(**settings)


def test_the_shortest_length_has_no_room_to_spare():
    for digits in (1, 5, 9):
        config = PasskeyData(block_size=8, blocks=(20,), digits=digits)
        batch = Passkey(config).sample(np.random.default_rng(0), 1, config.shortest)
        assert batch["tokens"].shape == (1, 8 * config.shortest)
        with pytest.raises(ValueError, match=f"must be at least {config.shortest}"):
            Passkey(config).sample(np.random.default_rng(0), 1, config.shortest - 1)

import itertools
import json

import data_helpers
import numpy as np
import pytest

from experiments.data import Batches, DataError
from experiments.data.packed import REPEAT_PROMPT, Windows
from experiments.data.tokenizers import ByteTokenizer

TEXTS = ("", "a", "bcd", "efgh", "ijklm", "nopqrstu", "vwxyzABCDEFGHIJKLMNOPQRS", "0123456789", "TU")
TOTAL = sum(len(t) + 1 for t in TEXTS if t)
LONG = tuple("".join(chr(33 + (7 * i + j * j) % 90) for j in range(150 + i)) for i in range(5))


class NoSeparator(ByteTokenizer):
    hash = "bytes without separator"
    separator = None


def rows_of(data, count):
    """`count` rows as int lists of length + 1: the tokens and the last target."""
    rows = []
    while len(rows) < count:
        batch = next(data)
        np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
        rows += np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1).tolist()
    return rows[:count]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), NoSeparator()])
@pytest.mark.parametrize("length", [1, 3, 7, 16])
def test_an_epoch_holds_every_token_once_as_a_target(tmp_path, length, tokenizer):
    tokens = data_helpers.store(tmp_path, TEXTS, tokenizer=tokenizer)
    windows = Windows(tokens, tokenizer.separator, length, seed=3)
    total = TOTAL if tokenizer.separator is not None else TOTAL - sum(map(bool, TEXTS))
    assert len(windows) == (total - 1) // length
    read = [window for window, _ in (windows[i] for i in range(len(windows)))]
    joined = [read[0][0], *np.concatenate([window[1:] for window in read])]
    for before, after in itertools.pairwise(read):
        assert before[-1] == after[0]
    text = bytes(joined).decode()
    if tokenizer.separator is None:
        left = [t for t in TEXTS if t]
        while text:  # whole documents one after another, the last one perhaps cut
            document = next(t for t in left if t.startswith(text) or text.startswith(t))
            left.remove(document)
            text = text[len(document) :]
    else:
        *whole, cut = text.split("\0")
        assert len(set(whole)) == len(whole)
        assert set(whole) <= set(TEXTS)
        assert any(t.startswith(cut) for t in set(TEXTS) - set(whole))
    # The batches are exactly these windows in another order.
    data = data_helpers.packed(tmp_path, TEXTS, tokenizer=tokenizer, batch_size=1, length=length, seed=3)
    rows = rows_of(data, 2 * len(windows))
    expected = sorted(window.tolist() for window in read)
    assert sorted(rows[: len(windows)]) == sorted(rows[len(windows) :]) == expected


def test_epochs_have_different_orders(tmp_path):
    data = data_helpers.packed(tmp_path, LONG, batch_size=1, length=16)
    count = (sum(len(t) + 1 for t in LONG) - 1) // 16
    epochs = [tuple(map(tuple, rows_of(data, count))) for _ in range(3)]
    assert len(set(epochs)) == 3


def test_format_of_a_batch(tmp_path):
    data = data_helpers.packed(tmp_path, TEXTS, batch_size=3, length=8)
    assert isinstance(data, Batches)
    assert iter(data) is data
    batch = next(data)
    described = {k: (v.dtype.name, v.shape) for k, v in batch.items()}
    assert described == {
        "tokens": ("int32", (3, 8)),
        "targets": ("int32", (3, 8)),
        "weights": ("float32", (3, 8)),
    }
    assert (batch["weights"] == 1).all()


def test_the_repeated_segment_is_exact_and_inside_the_budget(tmp_path):
    length, count = 64, 10
    data = data_helpers.packed(
        tmp_path, LONG, batch_size=8, length=length, repeat_tokens=count, repeat_weight=0.1, seed=5
    )
    prompt = list(REPEAT_PROMPT.encode())
    head = length + 1 - len(prompt) - count
    windows = Windows(data_helpers.store(tmp_path, LONG), 0, head - 1, seed=5)
    known = {tuple(windows[i][0].tolist()) for i in range(len(windows))}
    starts = set()
    for _ in range(20):
        batch = next(data)
        assert batch["tokens"].shape == (8, length)
        for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
            row = [*tokens.tolist(), int(targets[-1])]
            assert targets.tolist() == row[1:]
            assert tuple(row[:head]) in known
            assert row[head : head + len(prompt)] == prompt
            segment = row[head + len(prompt) :]
            found = [i for i in range(head - count + 1) if row[i : i + count] == segment]
            assert found
            starts.update(found)
            np.testing.assert_array_equal(weights, np.float32([1.0] * (head - 1) + [0.0] * len(prompt) + [0.1] * count))
    assert {0, head - count} <= starts  # both ends are possible
    assert len(starts) == head - count + 1


def test_the_repeated_segment_can_be_the_whole_row(tmp_path):
    length = 2 * 20 + len(REPEAT_PROMPT) - 1
    data = data_helpers.packed(tmp_path, LONG, batch_size=1, length=length, repeat_tokens=20)
    row = rows_of(data, 1)[0]
    assert row[:20] == row[-20:]


def test_same_settings_same_batches_and_another_seed_others(tmp_path):
    def draw(seed, split="train"):
        data = data_helpers.packed(tmp_path, LONG, split, batch_size=2, length=48, repeat_tokens=8, seed=seed)
        return [next(data)["tokens"].tolist() for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, "validation") == draw(2, "validation")


def test_resumes_exactly_after_every_step(tmp_path):
    settings = {"batch_size": 3, "length": 48, "repeat_tokens": 8}
    data = data_helpers.packed(tmp_path, LONG, **settings)
    states, batches = [data.get_state()], []
    for _ in range(30):  # more than an epoch
        batches.append(next(data))
        states.append(data.get_state())
    for step, state in enumerate(states[:-1]):
        again = data_helpers.packed(tmp_path, LONG, **settings)
        again.set_state(json.loads(json.dumps(state)))
        assert again.get_state() == state
        for batch in batches[step : step + 3]:
            for key, value in next(again).items():
                np.testing.assert_array_equal(value, batch[key], key)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 2}, "batch_size"),
        ({"length": 96}, "length"),
        ({"repeat_tokens": 0}, "repeat_tokens"),
        ({"repeat_weight": 0.5}, "repeat_weight"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_position_of_other_settings_is_refused(tmp_path, change, named):
    settings = {"batch_size": 3, "length": 48, "repeat_tokens": 8}
    state = data_helpers.packed(tmp_path, LONG, **settings).get_state()
    with pytest.raises(DataError, match=f"saved with {named}="):
        data_helpers.packed(tmp_path, LONG, **{**settings, **change}).set_state(state)


def test_a_position_of_stream_mode_or_a_damaged_one_is_refused(tmp_path):
    data = data_helpers.packed(tmp_path, LONG, batch_size=3, length=48)
    other = data_helpers.stream(tmp_path, LONG, batch_size=3, length=48, block_size=4)
    with pytest.raises(DataError, match="saved with mode='stream', which is now 'packed'"):
        data.set_state(other.get_state())
    with pytest.raises(DataError, match="damaged"):
        data.set_state({**data.get_state(), "step": "3"})


def test_text_shorter_than_a_row(tmp_path):
    with pytest.raises(DataError, match=r"length=64: the train split has only \d+ tokens.*lower length"):
        data_helpers.packed(tmp_path, ["abc", "def"], length=64)


@pytest.mark.parametrize("length", [24, 44, 45])
def test_a_row_too_short_for_the_repeated_segment(tmp_path, length):
    with pytest.raises(DataError, match=r"repeat_tokens=12: .*lower repeat_tokens or raise length"):
        data_helpers.packed(tmp_path, LONG, length=length, repeat_tokens=12)

import itertools
import json

import data_helpers
import numpy as np
import pytest

from experiments.data import Batches, DataError, TextData

# Lengths around the block size of 4: empty, one token, a block less one, exact, plus one, and several blocks.
TEXTS = ("", "a", "bcd", "efgh", "ijklm", "", "nopqrstu", "vwxyzABCDEFGHIJKLMNOPQRS", "0123456789", "TU")
SETTINGS = {"batch_size": 3, "length": 8, "block_size": 4}


def documents_read(batches, block):
    """The documents, as lists of blocks, in the order of their starts: step, block, row."""
    rows = batches[0]["tokens"].shape[0]
    open_, done = [None] * rows, []
    for batch in batches:
        blocks = batch["reset"].shape[1]
        for n, row in itertools.product(range(blocks), range(rows)):
            span = slice(n * block, (n + 1) * block)
            tokens, targets, weights = (batch[k][row, span] for k in ("tokens", "targets", "weights"))
            if batch["reset"][row, n]:
                open_[row] = []
                done.append(open_[row])
            # A block holds weights 1 ... 1, then 0 for the last token of the document and for padding.
            open_[row].append((tokens, targets, weights, bool(batch["padded"][row, n])))
    return done


def text_of(pieces):
    """The text of a document from its blocks, and whether it is complete; checks targets and padding."""
    text, expected = b"", None
    for i, (tokens, targets, weights, padded) in enumerate(pieces):
        count = int(weights.sum())
        assert weights.tolist() == [1.0] * count + [0.0] * (len(weights) - count)
        last = i == len(pieces) - 1
        if count == len(weights):
            real = len(weights)
        else:  # the document ends here, one token after the last one that has a target
            assert last
            real = count + 1
            assert padded == (real < len(weights))
            assert not tokens[real:].any()
            assert not targets[count:].any()
        if expected is not None:
            assert tokens[0] == expected  # the target at the end of a block is the first token of the next
        assert (targets[: real - 1] == tokens[1:real]).all()
        expected = targets[-1]
        text += tokens[:real].astype(np.uint8).tobytes()
    return text.decode(), count < len(weights)


def test_every_token_of_every_document_once_per_epoch_and_in_order(tmp_path):
    texts = sorted(t for t in TEXTS if t)
    data = data_helpers.stream(tmp_path, TEXTS, **SETTINGS)
    seen = documents_read([next(data) for _ in range(60)], 4)
    read = [text_of(pieces) for pieces in seen]
    epochs = len(read) // len(texts)
    assert epochs >= 5
    orders = []
    for epoch in range(epochs):
        dealt = read[epoch * len(texts) : (epoch + 1) * len(texts)]
        orders.append(tuple(text for text, _ in dealt))
        if all(complete for _, complete in dealt):
            assert sorted(orders[-1]) == texts
    assert len(set(orders)) > 1  # every epoch has its own order
    # Only documents at the very end of what was read are cut off.
    assert sum(not complete for _, complete in read) <= SETTINGS["batch_size"]


def test_the_row_whose_edge_comes_first_takes_the_next_document(tmp_path):
    data = data_helpers.stream(tmp_path, ["aaaaa", "bbbb", "cc", "dddd", "eeee"], **SETTINGS)
    order = [bytes(data._store.read(i)[:1].astype(np.uint8)).decode() for i in _order(data, 5)]
    first = next(data)
    firsts = [
        (n, row, chr(first["tokens"][row, n * 4]))
        for n, row in itertools.product(range(2), range(3))
        if first["reset"][row, n]
    ]
    assert [letter for _, _, letter in firsts] == order[: len(firsts)]
    assert [row for n, row, _ in firsts if n == 0] == [0, 1, 2]


def _order(data, count):
    from experiments.data.stream import shuffled

    return shuffled(count, data._identity.seed, 0)


def test_a_step_is_only_a_cut_through_the_same_stream(tmp_path):
    short, long = (data_helpers.stream(tmp_path, TEXTS, **{**SETTINGS, "length": length}) for length in (4, 20))
    pieces = [next(short) for _ in range(50)]
    joined = {k: np.concatenate([p[k] for p in pieces], axis=1) for k in pieces[0]}
    whole = [next(long) for _ in range(10)]
    for key, value in joined.items():
        np.testing.assert_array_equal(value, np.concatenate([w[key] for w in whole], axis=1), key)


def test_format_of_a_batch(tmp_path):
    data = data_helpers.stream(tmp_path, TEXTS, **SETTINGS)
    assert isinstance(data, Batches)
    assert iter(data) is data
    described = {k: (v.dtype.name, v.shape) for k, v in next(data).items()}
    assert described == {
        "tokens": ("int32", (3, 8)),
        "targets": ("int32", (3, 8)),
        "weights": ("float32", (3, 8)),
        "reset": ("bool", (3, 2)),
        "padded": ("bool", (3, 2)),
    }


def test_one_token_documents_fill_a_block_without_a_target(tmp_path):
    batch = next(data_helpers.stream(tmp_path, ["a", "b", "c"], **SETTINGS))
    assert batch["reset"].all()
    assert batch["padded"].all()
    assert not batch["weights"].any()
    assert (batch["tokens"].reshape(-1, 4)[:, 1:] == 0).all()
    assert {chr(t) for t in batch["tokens"].reshape(-1, 4)[:, 0]} == {"a", "b", "c"}


def test_blocks_of_one_token_need_no_padding(tmp_path):
    batch = next(data_helpers.stream(tmp_path, ["ab", "c"], batch_size=1, length=6, block_size=1))
    assert not batch["padded"].any()
    assert batch["reset"].sum() == 4  # two epochs of two documents of three tokens


def test_more_rows_than_documents(tmp_path):
    data = data_helpers.stream(tmp_path, ["abcdefgh", "ij"], batch_size=5, length=4, block_size=4)
    batches = [next(data) for _ in range(4)]
    assert batches[0]["reset"].all()
    dealt = [text_of(pieces)[0] for pieces in documents_read(batches, 4)]
    assert sorted(dealt[:2]) == sorted(dealt[2:4]) == ["abcdefgh", "ij"]


def test_same_settings_same_batches_and_another_seed_others(tmp_path):
    def draw(**settings):
        data = data_helpers.stream(tmp_path, TEXTS, **{**SETTINGS, **settings})
        return np.concatenate([next(data)["tokens"] for _ in range(10)])

    np.testing.assert_array_equal(draw(seed=1), draw(seed=1))
    assert (draw(seed=1) != draw(seed=2)).any()


def test_validation_does_not_depend_on_the_seed(tmp_path):
    one, two = (data_helpers.stream(tmp_path, TEXTS, "validation", seed=s, **SETTINGS) for s in (1, 2))
    for _ in range(5):
        np.testing.assert_array_equal(next(one)["tokens"], next(two)["tokens"])


def test_resumes_exactly_after_every_step(tmp_path):
    data = data_helpers.stream(tmp_path, TEXTS, **SETTINGS)
    states, batches = [data.get_state()], []
    for _ in range(25):
        batches.append(next(data))
        states.append(data.get_state())
    for step, state in enumerate(states[:-1]):
        again = data_helpers.stream(tmp_path, TEXTS, **SETTINGS)
        again.set_state(json.loads(json.dumps(state)))
        assert again.get_state() == state
        for batch in batches[step : step + 6]:
            for key, value in next(again).items():
                np.testing.assert_array_equal(value, batch[key], key)


def test_going_back_in_the_same_iterator(tmp_path):
    data = data_helpers.stream(tmp_path, TEXTS, **SETTINGS)
    start = data.get_state()
    first = [next(data)["tokens"] for _ in range(12)]
    data.set_state(start)
    np.testing.assert_array_equal(first, [next(data)["tokens"] for _ in range(12)])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 2}, "batch_size"),
        ({"length": 12}, "length"),
        ({"block_size": 2}, "block_size"),
        ({"seed": 7}, "seed"),
    ],
)
def test_a_position_of_other_settings_is_refused(tmp_path, change, named):
    state = data_helpers.stream(tmp_path, TEXTS, **SETTINGS).get_state()
    other = data_helpers.stream(tmp_path, TEXTS, **{**SETTINGS, **change})
    with pytest.raises(DataError, match=f"saved with {named}=.* which is now .*go back to the settings"):
        other.set_state(state)


def test_a_position_of_other_text_is_refused(tmp_path):
    state = data_helpers.stream(tmp_path, TEXTS, **SETTINGS).get_state()
    other = data_helpers.stream(tmp_path, (*TEXTS[:-1], "TV"), **SETTINGS)
    with pytest.raises(DataError, match="saved with another text or tokenizer: go back"):
        other.set_state(state)


@pytest.mark.parametrize("mode", [data_helpers.stream, data_helpers.packed])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_position_beside_another_validation_text_is_refused(tmp_path, mode, split):
    """What a run measures before and after it is continued must be losses of one text."""
    state = mode(tmp_path, TEXTS, split, ["held out"], **SETTINGS).get_state()
    mode(tmp_path, TEXTS, split, ["held out"], **SETTINGS).set_state(state)
    other = mode(tmp_path, TEXTS, split, ["held off"], **SETTINGS)
    what = "another text or tokenizer" if split == "validation" else "another validation text"
    with pytest.raises(DataError, match=f"saved with {what}: go back"):
        other.set_state(state)
    if split == "train":
        del state["data"]["validation"]  # as positions of older code
        other.set_state(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": [[0, 0]]},
        {"rows": [[99, 0]] * 3},
        {"rows": [[0, 99]] * 3},
        {"rows": None},
        {"epoch": -1},
        {"dealt": 99},
        {"dealt": None},
    ],
)
def test_a_damaged_position_is_refused_and_changes_nothing(tmp_path, damage):
    data = data_helpers.stream(tmp_path, TEXTS, **SETTINGS)
    next(data)
    before = data.get_state()
    with pytest.raises(DataError, match="damaged"):
        data.set_state({**before, **damage})
    assert data.get_state() == before


@pytest.mark.parametrize("state", [None, {}, {"step": 3}, {"data": 3}])
def test_what_is_no_position_is_refused(tmp_path, state):
    with pytest.raises(DataError, match="no position in text data"):
        data_helpers.stream(tmp_path, TEXTS, **SETTINGS).set_state(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 100, "block_size": 64}, "length=100: must be a multiple of block_size=64"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"length": -1}, "length=-1"),
        ({"block_size": 0}, "block_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"mode": "windows"}, "mode='windows': must be stream or packed"),
        ({"source": "wikipedia"}, "source='wikipedia': must be python-source, shakespeare, text:GLOB"),
        ({"source": "text:"}, "source='text:'"),
        ({"source": "pg19:0"}, "source='pg19:0'"),
        ({"tokenizer": ""}, "tokenizer=''"),
        ({"repeat_tokens": 256}, "repeat_tokens=256: must be 0 in stream mode"),
        ({"repeat_tokens": -1, "mode": "packed"}, "repeat_tokens=-1"),
        ({"repeat_weight": -0.5}, "repeat_weight=-0.5"),
        ({"pg19_url": "ftp://x"}, "pg19_url='ftp://x'"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        TextData(**settings)

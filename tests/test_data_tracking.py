"""Products of generators against permutations applied one by one to a row of things."""

import itertools

import numpy as np
import pytest

from experiments.data.tracking import TrackingData

# What a token does to a row of things, written as Python does it; the order of the group.
MOVES = {
    "parity": ({"a": lambda x, y: (x, y), "b": lambda x, y: (y, x)}, 2),
    "s3": ({"a": lambda x, y, z: (y, x, z), "b": lambda x, y, z: (z, x, y)}, 6),
    "a5": ({"a": lambda v, w, x, y, z: (x, v, w, y, z), "b": lambda v, w, x, y, z: (z, v, w, x, y)}, 60),
}


def read(group, level, rows=20, split="train", seed=0, **settings):
    """Generators and products of each row as words, and its weights."""
    config = TrackingData(group=group, **settings)
    task = config.task(split)
    batch = task.sample(np.random.default_rng(seed), rows, level)
    words = [[task.tokenizer.decode(row).split() for row in batch[name]] for name in ("tokens", "targets")]
    return zip(*words, batch["weights"], strict=True)


@pytest.mark.parametrize("group", MOVES)
@pytest.mark.parametrize("level", [1, 5])
def test_targets_are_the_products(group, level):
    moves, size = MOVES[group]
    degree = len(TrackingData(group=group).load_tokenizer().words[0])
    seen = set()
    for generators, products, weights in read(group, level, rows=60):
        things = tuple(range(degree))
        for generator, product in zip(generators, products, strict=True):
            # Things move to where the permutation takes their places.
            things = moves[generator](*things)
            assert product == "".join(str(things.index(thing)) for thing in range(degree))
            seen.add(product)
        assert (weights == 1).all()
        assert len(generators) == 8 * level
    assert len(seen) == size if level == 5 else len(seen) > size // 2


@pytest.mark.parametrize("group", MOVES)
def test_the_group_is_closed_and_each_element_has_a_word(group):
    words = TrackingData(group=group).load_tokenizer().words
    elements = words[:-3]
    assert words[-3:] == ("a", "b", "<eos>")
    assert len(set(elements)) == MOVES[group][1]
    products = {"".join(y[int(place)] for place in x) for x, y in itertools.product(elements, repeat=2)}
    assert products == set(elements)


def test_what_counts():
    for _, _, weights in read("s3", 3, targets="ends"):
        assert np.flatnonzero(weights).tolist() == [7, 15, 23]
    for targets in ("dense", "ends"):
        for _, _, weights in read("s3", 3, split="validation", targets=targets):
            assert np.flatnonzero(weights).tolist() == [23]


def test_products_of_long_texts_are_spread_evenly():
    for group, (_, size) in MOVES.items():
        last = [products[-1] for _, products, _ in read(group, 6, rows=size * 100)]
        counts = np.unique(last, return_counts=True)[1]
        assert len(counts) == size
        assert (np.abs(counts - 100) < 50).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "s4"}, "group='s4': must be one of parity, s3, a5"),
        ({"targets": "none"}, "targets='none': must be dense or ends"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        TrackingData(**settings)

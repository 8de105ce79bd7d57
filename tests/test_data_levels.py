"""What all tasks with levels share: shapes, the curriculum, positions, and settings that do not fit."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run
from data_helpers import small_books

from experiments.batches import load_data
from experiments.config import check
from experiments.data import Batches, DataError
from experiments.data.babi import BabiData
from experiments.data.levels import LevelBatches
from experiments.data.pairs import PairsData
from experiments.data.tracking import TrackingData
from fam_jax import MemoryConfig


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Settings of a small text."""
    return small_books(tmp_path_factory.mktemp("books"))


@pytest.fixture(params=["pairs", "rewrite", "tracking", "babi"])
def config(request, text):
    return {
        "pairs": PairsData(pairs=(1, 3, 5), batch_size=8),
        "rewrite": PairsData(pairs=(2, 5, 9), per_block=1, live=3, batch_size=8),
        "tracking": TrackingData(blocks=(1, 2, 4), group="s3", batch_size=8),
        "babi": BabiData(blocks=(7, 8), questions=(1, 4), batch_size=8, **text),
    }[request.param]


def test_shapes_and_lengths(config):
    for split in ("train", "validation"):
        for level in config.levels:
            batch = config.task(split).sample(np.random.default_rng(0), 3, level)
            shape = (3, config.row_blocks(level) * config.block_size)
            assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
                "tokens": ("int32", shape),
                "targets": ("int32", shape),
                "weights": ("float32", shape),
            }
            assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
            assert (batch["weights"][:, -1] == 1).all()
            vocabulary = config.load_tokenizer().vocab_size
            assert all(0 <= batch[name].min() <= batch[name].max() < vocabulary for name in ("tokens", "targets"))


def test_the_next_level_comes_after_ten_good_batches_of_the_hardest(config):
    data = load_data(config, "train")
    assert isinstance(data, Batches)
    lengths = [config.row_blocks(level) * config.block_size for level in config.levels]

    def grown(steps, exact_match):
        drawn = []
        for _ in range(steps):
            drawn.append(next(data)["tokens"].shape[1])
            data.observe({"exact_match": exact_match})
        return drawn

    assert set(grown(12, 0.89)) == {lengths[0]}
    assert set(grown(10, 0.9)) == {lengths[0]}
    found = grown(60, 1.0)
    assert found.index(lengths[1]) < 10
    assert set(found) == set(lengths)


def test_same_settings_same_batches_and_another_seed_others(config):
    configs = (config, config, dataclasses.replace(config, seed=1))
    one, two, other = (next(LevelBatches(config))["tokens"] for config in configs)
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_resumes_exactly_after_every_step(config):
    data = LevelBatches(config)
    states, batches = [data.get_state()], []
    for _ in range(14):
        batches.append(next(data))
        data.observe({"exact_match": 1.0})
        states.append(data.get_state())
    assert states[9]["level"] == 1
    assert states[10]["level"] == 2
    for step in (0, 1, 9, 10, 12):
        again = LevelBatches(config)
        again.set_state(json.loads(json.dumps(states[step])))
        for at in range(step, 14):
            assert again.get_state() == states[at]
            for key, value in next(again).items():
                np.testing.assert_array_equal(value, batches[at][key], key)
            again.observe({"exact_match": 1.0})


def test_a_position_of_other_settings_is_refused(config):
    state = json.loads(json.dumps(LevelBatches(config).get_state()))
    with pytest.raises(DataError, match=f"belongs to {config.title} data with batch_size=8, not 4; use the same"):
        LevelBatches(dataclasses.replace(config, batch_size=4)).set_state(state)


def test_levels_from_one_on(config):
    with pytest.raises(ValueError, match=rf"{config.counted}=\(0,\): must be at least"):
        config.check_levels([0])
    with pytest.raises(ValueError, match=rf"{config.counted}=\(\): must be (lengths|numbers) in rising order"):
        dataclasses.replace(config, **{config.counted: ()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"blocks": (0, 1)}, r"blocks=\(0, 1\): must be lengths in rising order, at least one, from 1 on"),
        ({"blocks": (2, 2)}, r"blocks=\(2, 2\)"),
        ({"threshold": 1.5}, "threshold=1.5: must be between 0 and 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        TrackingData(**settings)


def test_runs_are_checked(config):
    check(tiny_run.run_of(config))
    with pytest.raises(ValueError, match=f"the {config.title} task has no validation split"):
        check(tiny_run.run_of(config, eval_every=5))
    with pytest.raises(ValueError, match=rf"model.memory.block_size=3 differ, but the {config.title} task counts"):
        check(tiny_run.run_of(config, model=tiny_run.model_config(MemoryConfig(block_size=3))))
    with pytest.raises(ValueError, match=f"vocab_size=2 is too small for the {config.title} task"):
        check(tiny_run.run_of(config, model=tiny_run.model_config(None, vocab_size=2)))

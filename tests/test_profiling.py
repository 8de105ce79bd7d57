"""A trace of some steps appears where it is said to be, with these steps in it, and changes no number."""

import dataclasses
import gzip
import json

import pytest
from train_helpers import assert_same_bits, metric_rows, plain

from experiments.config import TrainConfig
from experiments.train import train
from experiments.typed import from_json, to_json

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    config = plain(tmp_path_factory.mktemp("unwatched"), steps=6)
    return config, train(config, progress=False)


def traces(config):
    return list((config.directory / "profile").rglob("*.trace.json.gz"))


def test_a_trace_of_some_steps(tmp_path, unwatched, capsys):
    config = plain(tmp_path, steps=6, profile=(2, 3))
    done = train(config)
    assert f"a profile is in {config.directory / 'profile'}; open its" in capsys.readouterr().out
    (file,) = traces(config)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    assert sorted(steps) == [2, 3]
    other, wanted = unwatched
    assert_same_bits(done.state, wanted.state)
    assert metric_rows(config) == metric_rows(other)


def test_a_run_that_stops_within_the_range_writes_what_there_is(tmp_path):
    config = plain(tmp_path, steps=6, profile=(2, 5))
    assert train(config, progress=False, callback=lambda step, *_: step == 3).stopped == "callback"
    assert len(traces(config)) == 1
    # Another range is no other run.
    done = train(dataclasses.replace(config, profile=(1, 3)), progress=False)
    assert done.step == 6
    assert len(traces(config)) == 1


@pytest.mark.parametrize("steps", [(0, 1), (3, 2), (5, 7)])
def test_what_is_no_range(tmp_path, steps):
    with pytest.raises(ValueError, match=r"TrainConfig.profile=.* between 1 and steps=6"):
        plain(tmp_path, steps=6, profile=steps)


def test_the_range_is_kept_as_json(tmp_path):
    config = plain(tmp_path, steps=6, profile=(2, 3))
    assert from_json(to_json(config), TrainConfig) == config

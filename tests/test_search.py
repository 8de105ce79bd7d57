"""Searches of learning rates, on runs of a few steps, and comparisons that train at what was found."""

import dataclasses
import json

import pytest
from test_ablate import tiny_arms

from experiments import ablate, results, search
from experiments.ablations import arithmetic, prosqa
from experiments.loop import NonFiniteError


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "arms", tiny_arms)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path / "results")
    return search.Options(("arithmetic",), work_dir=tmp_path / "runs", output=tmp_path / "results")


def rates():
    found = ablate.configs("arithmetic", ablate.Options(seeds=(0,)))
    return {arm: config.optim.learning_rate for (arm, _), config in found.items()}


def set_accuracy(options, key, accuracy):
    """A score for a measured run."""
    file = options.output / "search" / "arithmetic-cpu" / f"{key}.json"
    content = json.loads(file.read_text())
    for curve in content["values"]["curves"]:
        curve["accuracy"] = [accuracy] * len(curve["accuracy"])
    file.write_text(json.dumps(content))


def test_the_best_rate_is_what_a_comparison_trains_at(options, compile_cache, monkeypatch, capsys):
    before = rates()
    options = dataclasses.replace(options, arms=("LIMe",))
    search.run("arithmetic", options)
    monkeypatch.setattr(ablate, "train", lambda config: pytest.fail("a finished run was trained again"))
    for accuracies, row, factor in (
        ((0.3, 0.3, 0.3), ["LIMe", "0.300", "**0.300**", "0.300"], 1.0),  # of equals the rate of the config
        ((0.5, 0.2, 0.4), ["LIMe", "**0.500**", "0.200", "0.400"], 0.5),
    ):
        for key, accuracy in zip(("LIMe-x0.5", "LIMe-x1", "LIMe-x2"), accuracies, strict=True):
            set_accuracy(options, key, accuracy)
        (line,) = search.run("arithmetic", options).splitlines()[2:]
        assert [cell.strip() for cell in line.split("|")[1:-1]] == row
        assert rates() == before | {"LIMe": factor * before["LIMe"]}

    # A search of what the row no longer is does not count.
    changed = {arm: dataclasses.replace(config, steps=7) for arm, config in tiny_arms("cpu").items()}
    monkeypatch.setattr(arithmetic, "arms", lambda size: changed)
    with pytest.raises(ValueError, match=r"LIMe-x0\.5\.json was measured with other settings than LIMe"):
        rates()


def test_the_seed_is_of_no_comparison(options):
    assert search.SEED not in ablate.SEEDS
    wanted = search.configs("arithmetic", options)
    assert {(config.seed, config.data.seed) for config in wanted.values()} == {(search.SEED, search.SEED)}
    assert len({config.work_dir for config in wanted.values()}) == len(wanted) == 6
    assert list(search.configs("arithmetic", dataclasses.replace(options, factors=(2.0,)))) == [
        "baseline-x2",
        "LIMe-x2",
    ]
    with pytest.raises(ValueError, match=r"factors=\[3\.0\] are not of the search, which has \(0\.5, 1\.0, 2\.0\)"):
        search.configs("arithmetic", dataclasses.replace(options, factors=(2.0, 3.0)))


def test_a_rate_that_diverges_loses(options, compile_cache, monkeypatch):
    train = ablate.train

    def diverge(config):
        if config.optim.learning_rate > tiny_arms("cpu")["LIMe"].optim.learning_rate:
            raise NonFiniteError("loss=nan")
        return train(config)

    monkeypatch.setattr(ablate, "train", diverge)
    table = search.run("arithmetic", dataclasses.replace(options, arms=("LIMe",)))
    assert table.splitlines()[2].split("|")[4].strip() == "–"
    assert set(ablate.scores("arithmetic", "cpu")["LIMe"]) == {0.5, 1.0}


def test_the_same_run_of_another_row_is_taken_over(tmp_path, compile_cache, monkeypatch):
    """Under another name, with equal numbers; a run with another seed is trained."""
    monkeypatch.setattr(results, "DIRECTORY", tmp_path / "results")
    monkeypatch.setattr(arithmetic, "arms", tiny_arms)
    monkeypatch.setattr(prosqa, "arms", lambda size: {"other": tiny_arms(size)["LIMe"]})
    monkeypatch.setattr(prosqa, "evaluation", arithmetic.evaluation)
    options = ablate.Options(seeds=(0,), work_dir=tmp_path / "runs", output=tmp_path / "results")
    first = ablate.run("arithmetic", dataclasses.replace(options, arms=("LIMe",)))[0]
    train = ablate.train
    monkeypatch.setattr(ablate, "train", lambda config: pytest.fail("the same was trained again"))
    second = ablate.run("prosqa", options)[0]
    assert [curve["label"] for curve in second.values["curves"]] == ["other, level 2", "other, level 3"]
    for one, other in zip(first.values["curves"], second.values["curves"], strict=True):
        assert {**one, "label": ""} == {**other, "label": ""}
    trained = []
    monkeypatch.setattr(ablate, "train", lambda config: trained.append(config.seed) or train(config))
    ablate.run("prosqa", dataclasses.replace(options, seeds=(1,)))
    assert trained == [1]

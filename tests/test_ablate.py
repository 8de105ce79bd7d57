"""The command that runs a comparison, on runs of a few steps."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tiny_run
from train_helpers import ROOT, trace_step

from experiments import ablate, ablations, analyze, evaluate, results
from experiments.ablations import arithmetic, lime_entropy
from experiments.command import modules
from experiments.config import check
from experiments.data.passkey import PasskeyData
from experiments.train import train
from lime_jax import LimeConfig

STEPS = 4


def tiny_arms(size):
    """Two arms of an untrained sort, two checkpoints each."""
    plain = dataclasses.replace(
        tiny_run.arithmetic_config(), steps=STEPS, eval_every=0, checkpoint_every=STEPS // 2, keep=2
    )
    mixed = dataclasses.replace(plain, model=dataclasses.replace(plain.model, mixing=LimeConfig()))
    return {"baseline": plain, "LIMe": mixed}


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "arms", tiny_arms)
    return ablate.Options(seeds=(0, 1), work_dir=tmp_path / "runs", output=tmp_path / "results")


def test_all_arms_and_seeds_are_run_once(options, compile_cache, monkeypatch):
    result, figure = ablate.run("arithmetic", options)
    labels = ["baseline, level 2", "baseline, level 3", "LIMe, level 2", "LIMe, level 3"]
    assert [(c["label"], c["seed"]) for c in result.values["curves"]] == [(a, s) for s in (0, 1) for a in labels]
    assert all(c["step"] == [2, 4] and c["trials"] == [11, 11] for c in result.values["curves"])
    assert result.seeds == [0, 1]
    assert figure.stat().st_size > 0

    # Given again it reads what is there, and a seed more trains that seed only.
    monkeypatch.setattr(ablate, "train", lambda config: pytest.fail("a finished run was trained again"))
    assert ablate.run("arithmetic", options)[0].values == result.values
    one = ablate.run("arithmetic", dataclasses.replace(options, arms=("LIMe",), seeds=(1,)))[0]
    assert {c["label"] for c in one.values["curves"]} == set(labels[2:])

    # What was measured with other settings is not taken for it.
    file = options.output / "arithmetic-cpu" / "LIMe-1.json"
    content = json.loads(file.read_text())
    content["config"]["train"]["steps"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"LIMe-1\.json was measured with other settings"):
        ablate.run("arithmetic", options)


def test_the_run_of_other_settings_is_not_gone_on_with(options, compile_cache, monkeypatch):
    """As after a change of a row's learning rate: the run in its folder is through, or half way with the old one."""
    one = dataclasses.replace(options, arms=("LIMe",), seeds=(0,))
    ablate.run("arithmetic", one)
    (options.output / "arithmetic-cpu" / "LIMe-0.json").unlink()
    monkeypatch.setattr(arithmetic, "arms", lambda size: {"LIMe": ablate.at_factor(tiny_arms(size)["LIMe"], 2.0)})
    with pytest.raises(ValueError, match=r"arithmetic-cpu-LIMe-0 has a run with other settings than LIMe has now"):
        ablate.run("arithmetic", one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give a row, or several as --rows; --list shows all"),
        ({"row": "arithmetic", "rows": ("core",)}, "give a row, or several as --rows"),
        ({"row": "nothing"}, "row='nothing' is not known; there are arithmetic"),
        ({"rows": ("arithmetic", "nothing")}, "row='nothing' is not known; there are arithmetic"),
        ({"row": "arithmetic", "size": "huge"}, "size='huge' is not known; arithmetic has cpu, cpu-long, paper"),
    ],
)
def test_rows_that_are_not_known_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ablate.chosen(ablate.Options(**change))


def test_an_arm_that_is_not_known_is_named(options):
    with pytest.raises(ValueError, match=r"arms=\['LIME'\] are not known; arithmetic has baseline, LIMe"):
        ablate.run("arithmetic", dataclasses.replace(options, arms=("LIME",)))


def test_core_and_all():
    core, every = (ablate.chosen(ablate.Options(rows=(which,))) for which in ("core", "all"))
    assert {"passkey_memory", "books", "lime_methods", "arithmetic", "together"} <= set(core) < set(every)
    assert "retrofit_passkey" in ablate.chosen(ablate.Options(rows=("all",), size="gpu"))
    assert "retrofit_passkey" not in every  # has no size for a CPU


def test_overview_counts_what_is_measured(tmp_path):
    (tmp_path / "books-cpu").mkdir()
    for name in ("M0-0", "M0-1", "FAM-M1-2", "M0-7"):  # the last is of no listed seed
        (tmp_path / "books-cpu" / f"{name}.json").touch()
    lines = {line.split("|")[1].strip(): line for line in ablate.overview(tmp_path).splitlines()}
    assert set(modules(ablations)) < set(lines)
    assert "cpu 3/21, gpu 0/21, paper 0/21" in lines["books"]


ROWS = [(name, size) for name in modules(ablations) for size in ablate.load(name).SIZES]


@pytest.mark.parametrize(("name", "size"), ROWS)
def test_configs_of_all_rows(name, size, monkeypatch, tmp_path):
    """Every arm at every size fits together, and has a name that can be one of a file."""
    row = ablate.load(name)
    assert f"python -m experiments.ablate {name} --size" in row.__doc__
    assert isinstance(row.CORE, bool)
    settings = row.evaluation(size)
    options = (analyze if "what" in settings else evaluate).Options(tmp_path, **settings)
    for arm, config in row.arms(size).items():
        results.check_name(arm)
        if config.init_from is not None:  # its tokenizer lies beside a model that must be there first
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bytes"))
            if isinstance(config.data, PasskeyData):
                config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="words"))
        check(config)
        if "what" not in settings:
            evaluate._check_options(options, evaluate._fits(config)[0], "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), ROWS)
def test_shapes_of_all_rows(name, size):
    """A step of every arm at every size is traced; nothing is computed."""
    for config in ablate.load(name).arms(size).values():
        trace_step(config)


@pytest.mark.parametrize("size", arithmetic.SIZES)
def test_arms_differ_in_mixing_and_learning_rate_alone(size):
    arms = arithmetic.arms(size)
    baseline, mixed = arms.values()
    assert (baseline.model.mixing, mixed.model.mixing) == (None, LimeConfig())

    def rest(config):
        model = dataclasses.replace(config.model, mixing=None)
        optim = dataclasses.replace(config.optim, learning_rate=1.0)
        return dataclasses.replace(config, name="same", model=model, optim=optim)

    assert rest(baseline) == rest(mixed)


def test_a_row_can_analyse_the_runs_of_another(options, compile_cache, monkeypatch):
    options = dataclasses.replace(options, seeds=(0,))
    ablate.run("arithmetic", options)
    monkeypatch.setattr(lime_entropy, "arms", tiny_arms)
    monkeypatch.setattr(lime_entropy, "RUNS_OF", "arithmetic")
    monkeypatch.setattr(lime_entropy, "evaluation", lambda size: {"what": "entropy", "sequences": 4})
    trained = []
    monkeypatch.setattr(ablate, "train", lambda config: trained.append(train(config)) or trained[-1])
    result, _ = ablate.run("lime_entropy", options)
    assert not any(one.metrics for one in trained)  # no step was made
    assert result.kind == "entropy"
    assert {curve["label"].partition(",")[0] for curve in result.values["curves"]} == {"baseline", "LIMe"}
    assert ablate.run("lime_entropy", options)[0].values == result.values


def test_command_line():
    command = [sys.executable, "-m", "experiments.ablate", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: row='nothing' is not known; there are arithmetic, ")

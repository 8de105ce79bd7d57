"""The command that runs a comparison, on runs of a few steps."""

import dataclasses
import json
import subprocess
import sys

import pytest
import tiny_run
from train_helpers import ROOT

from experiments import ablate, results
from experiments.ablations import arithmetic
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
    return ablate.Options("arithmetic", seeds=(0, 1), work_dir=tmp_path / "runs", output=tmp_path / "results")


def test_all_arms_and_seeds_are_run_once(options, compile_cache, monkeypatch):
    result, file, figure = ablate.run(options)
    labels = ["baseline, level 2", "baseline, level 3", "LIMe, level 2", "LIMe, level 3"]
    assert [(c["label"], c["seed"]) for c in result.values["curves"]] == [(a, s) for s in (0, 1) for a in labels]
    assert all(c["step"] == [2, 4] and c["trials"] == [11, 11] for c in result.values["curves"])
    assert results.read(file).seeds == [0, 1]
    assert figure.stat().st_size > 0

    # Given again it reads what is there, and a seed more trains that seed only.
    monkeypatch.setattr(ablate, "train", lambda config: pytest.fail("a finished run was trained again"))
    assert ablate.run(options)[0].values == result.values
    one = ablate.run(dataclasses.replace(options, arms=("LIMe",), seeds=(1,)))[0]
    assert {c["label"] for c in one.values["curves"]} == set(labels[2:])

    # What was measured with other settings is not taken for it.
    file = options.output / "arithmetic-cpu" / "LIMe-1.json"
    content = json.loads(file.read_text())
    content["config"]["train"]["steps"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"LIMe-1\.json was measured with other settings"):
        ablate.run(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": "nothing"}, "row='nothing' is not known; there are arithmetic"),
        ({"size": "huge"}, "size='huge' is not known; arithmetic has cpu, paper"),
        ({"arms": ("LIME",)}, r"arms=\['LIME'\] are not known; arithmetic has baseline, LIMe"),
    ],
)
def test_what_is_not_known_is_named(options, change, message):
    with pytest.raises(ValueError, match=message):
        ablate.run(dataclasses.replace(options, **change))


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


def test_command_line():
    command = [sys.executable, "-m", "experiments.ablate", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: row='nothing' is not known; there are arithmetic, ")

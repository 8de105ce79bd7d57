"""A run that begins with the parameters of another, whose memory or mixing differs."""

import dataclasses

import numpy as np
import pytest
from test_distributed import Job
from train_helpers import MODEL, assert_same_bits, restore, tiny, with_model

from experiments.checkpoint import CheckpointError
from experiments.optim import OptimConfig
from experiments.train import train
from fam_jax import MemoryConfig
from lime_jax import LimeConfig

pytestmark = pytest.mark.usefixtures("compile_cache")
BSWA, FAM = MemoryConfig(block_size=8), MODEL.memory
STILL = OptimConfig(learning_rate=1e-30, schedule="constant")  # a step changes nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a FAM of two rows, and one without."""
    folder = tmp_path_factory.mktemp("trained")
    optim = OptimConfig(learning_rate=1e-2, schedule="constant")
    fam = tiny(folder, "fam", steps=2, optim=optim)
    plain = with_model(tiny(folder, "bswa", steps=2, optim=optim), memory=BSWA)
    return folder, {config.name: train(config, progress=False) for config in (fam, plain)}


def begun(folder, name, source, **model):
    """The parameters that a run begins with."""
    config = with_model(tiny(folder, name, steps=0, init_from=str(folder / source)), **model)
    return train(config).state.params


@pytest.mark.parametrize(
    ("source", "model", "said"),
    [
        ("bswa", {"memory": FAM}, "new: fam_prompt"),
        ("fam", {"memory": BSWA}, "not taken over: fam_prompt"),
        ("fam", {"memory": dataclasses.replace(FAM, segments=2)}, ""),
        ("bswa", {"memory": BSWA, "mixing": LimeConfig()}, "new: mixing.layers.router"),
    ],
)
def test_what_both_models_have_is_taken(trained, tmp_path, capsys, source, model, said):
    folder, runs = trained
    params = begun(folder, tmp_path.name, source, **model)
    assert said in capsys.readouterr().out
    before = runs[source].state.params
    for name in params["layers"]:
        assert_same_bits(params["layers"][name], before["layers"][name])
    if "fam_prompt" in params and "fam_prompt" in before:
        assert_same_bits(params["fam_prompt"], before["fam_prompt"])


@pytest.mark.parametrize("length", [1, 4])
def test_fam_of_another_length(trained, capsys, length):
    folder, runs = trained
    params = begun(folder, f"length-{length}", "fam", memory=dataclasses.replace(FAM, fam_length=length))
    rows = min(length, 2)
    assert f"fam_prompt has {length} rows; {rows} are taken over" in capsys.readouterr().out
    np.testing.assert_array_equal(params["fam_prompt"][:rows], runs["fam"].state.params["fam_prompt"][:rows])
    assert np.all(np.any(np.asarray(params["fam_prompt"]) != 0, axis=1))


@pytest.mark.parametrize("token", [None, 3])
def test_a_new_fam_begins_like_the_token_that_texts_begin_with(trained, tmp_path, token):
    folder, runs = trained
    config = tiny(folder, tmp_path.name, steps=0, init_from=str(folder / "bswa"), prompt_token=token)
    prompt = train(config).state.params["fam_prompt"]
    embed = np.asarray(runs["bswa"].state.params["embed"])
    rest = np.asarray(prompt) - (0 if token is None else embed[token])
    size = embed.std() * (1 if token is None else 0.1)
    assert 0.6 * size < rest.std() < 1.4 * size
    assert len(np.unique(np.asarray(prompt), axis=0)) == len(prompt)


@pytest.mark.slow
def test_several_processes_take_the_same(trained, tmp_path):
    folder, runs = trained
    longer = dataclasses.replace(FAM, fam_length=4)
    config = with_model(tiny(folder, "together", steps=1, init_from=str(folder / "fam"), optim=STILL), memory=longer)
    job = Job(tmp_path, config)
    assert job.wait() == [0, 0], job.text()
    assert "fam_prompt has 4 rows; 2 are taken over" in job.text()
    found, before = restore(config).params, runs["fam"].state.params
    np.testing.assert_array_equal(found["fam_prompt"][:2], before["fam_prompt"])
    for name in before["layers"]:
        assert_same_bits(found["layers"][name], before["layers"][name])


def test_anything_else_must_be_the_same(trained):
    folder, _ = trained
    with pytest.raises(CheckpointError, match=r"cannot be begun with: model.d_ff is 32 there and 16 here; only memory"):
        begun(folder, "other", "fam", d_ff=16)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        begun(folder, "none", "nowhere")


def test_a_run_goes_on_from_its_own_checkpoints(trained, capsys):
    folder, _ = trained
    config = tiny(folder, "again", steps=1, init_from=str(folder / "fam"), optim=STILL)
    train(config, progress=False)
    train(dataclasses.replace(config, steps=2))
    out = capsys.readouterr().out
    assert "continuing after step 1 of 2" in out
    assert "begin as those" not in out

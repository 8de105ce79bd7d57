"""Retrofits of a pretrained model: the comparisons' arms, and all of them on a tiny model."""

import dataclasses

import numpy as np
import pytest
from train_helpers import assert_same_bits, tiny, with_model

from experiments import ablate
from experiments.ablations import retrofit, retrofit_passkey
from experiments.checkpoint import load_model
from experiments.data.passkey import PasskeyData
from experiments.optim import OptimConfig
from experiments.train import train
from fam_jax import LoraConfig, presets

SHAPE = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "d_ff",
    "rope_base",
    "norm_eps",
)


CONSTANT = OptimConfig(learning_rate=1e-2, schedule="constant")


def shape_of(model):
    return {name: getattr(model, name) for name in SHAPE}


@pytest.mark.parametrize(("row", "size"), [(row, size) for row in (retrofit, retrofit_passkey) for size in row.SIZES])
def test_arms_begin_with_the_pretrained_model_and_differ_in_the_memory_alone(row, size):
    arms = row.arms(size)
    for config in arms.values():
        assert config.init_from == retrofit.BASE
        assert shape_of(config.model) == shape_of(presets.smollm2_135m())
        assert config.data.tokenizer == f"{retrofit.BASE}/tokenizer.json"
        assert (config.prompt_token is None) == (config.model.fam_length == 0)

    def rest(config):
        memory = dataclasses.replace(
            config.model.memory, segments=0, fam_length=0, rsp=0.0, noise=0.0, first_residual="zero"
        )
        data = config.data
        if config.name == "retrofit_fam_stream":
            data = dataclasses.replace(data, mode="packed", repeat_tokens=256)
        model = dataclasses.replace(config.model, memory=memory)
        return dataclasses.replace(config, name="same", model=model, data=data, steps=0, prompt_token=None)

    first, *others = map(rest, arms.values())
    assert all(other == first for other in others)
    if row is retrofit:
        assert arms["window"] == dataclasses.replace(arms["window-untrained"], steps=arms["window"].steps)
        assert arms["FAM"] == dataclasses.replace(arms["FAM-untrained"], steps=arms["FAM"].steps)


@pytest.fixture(scope="module")
def base(tmp_path_factory, compile_cache):
    """A tiny model with full attention, in place of the pretrained one."""
    folder = tmp_path_factory.mktemp("base")
    config = with_model(tiny(folder, "base", mode="packed", steps=2, eval_every=0, optim=CONSTANT), memory=None)
    train(config, progress=False)
    return config


def small(config, base):
    """An arm on the tiny model."""
    memory = dataclasses.replace(config.model.memory, block_size=8, fam_length=min(config.model.fam_length, 2))
    model = dataclasses.replace(base.model, memory=memory, lora=LoraConfig(rank=2))
    if isinstance(config.data, PasskeyData):
        data = dataclasses.replace(config.data, block_size=8, blocks=(50, 52), tokenizer="bytes", batch_size=2)
    else:
        data = dataclasses.replace(base.data, mode=config.data.mode)
    return dataclasses.replace(
        config,
        model=model,
        data=data,
        optim=CONSTANT,
        steps=min(config.steps, 2),
        init_from=str(base.directory),
        checkpoint_every=0,
    )


@pytest.mark.parametrize(
    ("row", "size", "evaluation"),
    [
        pytest.param("retrofit", "gpu", {"documents": 2, "max_tokens": 100, "batch_size": 2}, marks=pytest.mark.slow),
        ("retrofit_passkey", "gpu", {"lengths": (51, 60), "trials": 2, "batch_size": 2}),
    ],
)
def test_all_arms_on_a_tiny_model(base, tmp_path, monkeypatch, row, size, evaluation):
    module = ablate.load(row)
    arms = {name: small(config, base) for name, config in module.arms(size).items()}
    monkeypatch.setattr(module, "arms", lambda size: arms)
    monkeypatch.setattr(module, "evaluation", lambda size: evaluation)
    options = ablate.Options(size=size, seeds=(0,), work_dir=tmp_path / "runs", output=tmp_path / "results")
    result, figure = ablate.run(row, options)
    assert [curve["label"] for curve in result.values["curves"]] == list(arms)
    assert figure.exists()
    _, before, _ = load_model(base.directory)
    for name, config in arms.items():
        model, variables, _ = load_model(tmp_path / "runs" / f"{row}-{size}-{name}-0")
        assert model.config.memory == config.model.memory
        assert_same_bits(variables["params"]["embed"], before["params"]["embed"])
        if not config.steps:
            assert_same_bits(variables["params"]["layers"], before["params"]["layers"])
        else:
            assert np.any(variables["params"]["layers"]["wq"] != before["params"]["layers"]["wq"])  # LoRA is merged

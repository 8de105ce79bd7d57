"""Another library's models at our shapes: as many weights, the same work, and a clear word if it is not installed."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import peers, speed
from experiments.arms import Shape, model_config
from fam_jax import Decoder
from lime_jax import LimeConfig

SHAPE = Shape(layers=2, width=32, heads=2, kv_heads=1, head_dim=16, vocab=16)
ARMS = ["x-transformers", "x-transformers+lime"]
READS = [(1, 1), (1, 2), (3, 3), (1, 4)]


def test_ours_beside_them():
    assert model_config(SHAPE, "x-transformers") == model_config(SHAPE, "full:none")
    assert model_config(SHAPE, "x-transformers+lime:compile").mixing == LimeConfig("dynamic_views")
    with pytest.raises(ValueError, match="modes has 'prefill'"):
        peers.functions("prefill", model_config(SHAPE, "full"), ARMS[0])
    with pytest.raises(ValueError, match="has not the qk_norm=True"):
        peers.functions("train", dataclasses.replace(model_config(SHAPE, "full"), qk_norm=True), ARMS[0])


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    options = speed.Options(SHAPE, ("full", ARMS[0]), ("train",), (8,), rounds=3, product=32, output=tmp_path)
    values = speed.run(options)[0].values
    assert [curve["label"] for curve in values["curves"]] == ["train, full, batch 1"]
    assert 'pip install -e ".[x-transformers]"' in values["errors"][0]["error"]


@pytest.mark.parametrize("arm", ARMS)
def test_same_weights_and_a_step(arm, tmp_path):
    pytest.importorskip("torch", reason='needs pip install -e ".[x-transformers]"')
    pytest.importorskip("x_transformers", reason="as torch")
    config = model_config(SHAPE, arm)
    theirs = sum(weight.numel() for weight in peers.model(config, "+lime" in arm).parameters())
    ours = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ours.pop("mixing", None)  # ours has weights of sources that are masked, too
    extra = config.num_layers * 2 * config.d_ff  # the bias of their gates
    if "+lime" in arm:  # views and sources of all sub-layers; the first attention has one of one
        extra += sum(config.d_model + views * sources * (config.d_model + 1) for views, sources in READS)
    assert theirs == sum(weight.size for weight in jax.tree.leaves(ours)) + extra
    make, step = peers.functions("train", config, arm)
    carry, losses = make(jax.random.key(0)), []
    for _ in range(10):
        carry, loss = step(carry, jnp.arange(32).reshape(2, 16) % 16)
        losses.append(loss)
    assert losses[-1] < losses[0]
    result, *_ = speed.run(
        speed.Options(SHAPE, ("full", arm), ("train", "forward"), (8,), rounds=3, product=32, output=tmp_path)
    )
    labels = [curve["label"] for curve in result.values["curves"]]
    assert labels == [f"{mode}, {name}, batch 1" for mode in ("train", "forward") for name in ("full", arm)]
    assert f"| train, {arm}, batch 1" in speed.table(result)

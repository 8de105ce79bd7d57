"""The benchmarks of layer mixing and of speed: what they write, and the property that the first is there to show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark, flops, results, speed
from experiments.arms import TOKEN_MODES, Shape, functions, model_config
from experiments.benchmark import Options
from lime_jax import LimeConfig

SMALL = {"tokens": 16, "width": 16, "heads": 2, "kv_heads": 2}


def test_step_time_of_two_arms(tmp_path):
    options = Options("time", arms=("none", "static_kv, push"), depths=(2,), steps=2, output=tmp_path, **SMALL)
    result, file, figure = benchmark.run(options)
    assert figure.exists()
    curves = results.read(file).values["curves"]
    assert [curve["label"] for curve in curves] == ["none", "static_kv, push"]
    assert curves[0]["ratio"] == [1.0]
    assert all(len(curve["seconds"]) == 2 for curve in curves)
    assert result.config["model"]["num_layers"] == 2


def test_memory_does_not_grow_with_depth(tmp_path):
    """Write-once, of a router whose weights depend on the token."""
    options = Options("memory", arms=("dynamic_kv",), depths=(8, 16), output=tmp_path, **SMALL)
    (curve,) = benchmark.run(options)[0].values["curves"]
    assert curve["states"][1] <= 1.1 * curve["states"][0]


def test_unknown_arm():
    with pytest.raises(ValueError, match=r"arms=\['lime'\] are not known; there are 'none'"):
        benchmark.run(Options("memory", arms=("lime",)))


TOY = Shape(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, vocab=16, block=4, segments=2, fam=2)


def test_speed_of_arms_of_which_one_cannot_run(tmp_path):
    options = speed.Options(
        TOY,
        arms=("full@xla", "fam", "full@cudnn"),
        modes=("prefill",),
        lengths=(8, 12),
        rounds=3,
        jobs=2,
        lock=tmp_path / "lock",
        product=32,
        output=tmp_path,
    )
    result, file, figure = speed.run(options)
    assert figure.exists()
    values = results.read(file).values
    assert [curve["label"] for curve in values["curves"]] == ["prefill, full@xla, batch 1", "prefill, fam, batch 1"]
    full, fam = values["curves"]
    assert full["tokens"] == fam["tokens"] == [8, 12]
    assert full["ratio"] == [1.0, 1.0]
    assert all(len(times) == 3 for times in fam["seconds"])
    config = model_config(TOY, "fam")
    needed = flops.forward_flops(config, 1, 12, useful=True) - 2 * 16 * 16 * 12
    assert fam["model_flops"][1] == needed
    assert fam["of_product"][1] == pytest.approx(needed / fam["step_seconds"][1] / values["product"]["speed"])
    assert fam["counted_flops"][1] >= needed
    assert [error["tokens"] for error in values["errors"]] == [8, 12]
    assert "needs an NVIDIA GPU" in values["errors"][0]["error"]
    table = speed.table(result)
    assert table.count("| prefill, fam, batch 1") == 2
    assert "prefill, full@cudnn, batch 1, 8: ValueError" in table


@pytest.mark.parametrize("mode", TOKEN_MODES)
def test_a_token_is_read_at_the_same_place_again_and_again(mode):
    make, step = functions(mode, model_config(TOY, "fam"), 2, 9)
    start = make(jax.random.key(0))
    _, after = step(start, jnp.ones((2, 9), jnp.int32))[0]
    assert np.array_equal(after.offset, [2, 2] if mode == "decode" else [3, 3])
    assert np.array_equal(after.blocks, [2, 2])
    assert bool(jnp.any(after.fam)) == (mode == "decode-end")


def test_speed_of_single_tokens(tmp_path):
    options = speed.Options(TOY, arms=("fam", "full"), modes=TOKEN_MODES, lengths=(8,), rounds=3, product=32)
    result, _, _ = speed.run(dataclasses.replace(options, batch_sizes=(2,), output=tmp_path))
    assert not result.values["errors"]
    for curve in result.values["curves"]:
        assert (curve["counted_flops"] == [None]) == curve["label"].startswith("decode,")
        assert curve["tokens_per_second"][0] == pytest.approx(2 / curve["step_seconds"][0])


def test_a_stream_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "PART", 8)
    options = speed.Options(TOY, arms=("fam",), modes=("stream",), lengths=(8, 24), rounds=3, product=32)
    result, _, _ = speed.run(dataclasses.replace(options, output=tmp_path))
    (curve,) = result.values["curves"]
    assert curve["counted_flops"][1] == 3 * curve["counted_flops"][0]
    assert curve["peak_gib"][0] == curve["peak_gib"][1]
    cell = speed.Cell("stream", "fam", 24, 1, model_config(TOY, "fam"))
    speed.build(cell)
    assert np.array_equal(cell.step(cell.make(jax.random.key(0)), jnp.ones((1, 24), jnp.int32))[0][1].blocks, [6])
    with pytest.raises(ValueError, match=r"lengths=\(12,\) must be multiples of 8"):
        speed.run(dataclasses.replace(options, lengths=(12,), output=tmp_path))


def test_a_training_step_is_timed_alone(tmp_path):
    options = speed.Options(TOY, arms=("bswa:none",), modes=("train",), lengths=(8,), apart=True, product=32)
    options = dataclasses.replace(options, rounds=3, output=tmp_path)
    (curve,) = speed.run(options)[0].values["curves"]
    assert curve["label"] == "train, bswa:none, batch 1"
    assert curve["counted_flops"][0] > curve["model_flops"][0] > 0


def test_arms_by_name():
    config = model_config(Shape(layers=2, width=768), "fam+lime-push/block@xla:dots")
    assert (config.num_layers, config.d_model, config.d_ff, config.num_heads) == (2, 768, 8 * 768, 12)
    assert (config.memory.fam_length, config.memory.segments, config.memory.rsp) == (64, 3, 0)
    assert config.mixing == LimeConfig(backward="push")
    assert (config.schedule, config.attention, config.remat) == ("block", "xla", "dots")
    assert model_config(Shape(), "bswa+lime").mixing == LimeConfig()
    assert model_config(Shape(), "full").memory is None
    assert model_config(Shape(), "fam/wavefront").schedule == "wavefront"
    assert [model_config(Shape(unroll=unroll), "fam").scan_layers for unroll in (False, True)] == [True, False]
    for arm in ("lime", "fam@", "fam:dots@xla", "fam+dots"):
        with pytest.raises(ValueError, match=r"which is no MEMORY\[\+lime\]"):
            model_config(Shape(), arm)
    with pytest.raises(ValueError, match=r"preset='palm' is not known"):
        model_config(Shape("palm"), "fam")
    with pytest.raises(ValueError, match=r"modes=\['sleep'\] are not known"):
        speed.run(speed.Options(modes=("sleep",)))


@pytest.mark.parametrize("command", ["memory", "time", "speed"])
def test_command_line(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", command, "--arms", "lime"])
    assert benchmark.main() == 2
    assert "'lime'" in capsys.readouterr().err

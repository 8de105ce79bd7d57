"""The benchmark of layer mixing: what it writes, and the property that it is there to show."""

import pytest

from experiments import benchmark, results
from experiments.benchmark import Options

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

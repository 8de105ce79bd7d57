"""Configurations are frozen values; an impossible one is an error that names the field and the value."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SIZES, decoder_config, fam_config

from fam_jax import Decoder, DecoderConfig, MemoryConfig, presets
from fam_jax.rope import RopeScaling
from lime_jax import LimeConfig

NAN = float("nan")

BAD_MEMORY = [
    ("block_size", 0, {}),
    ("block_size", -4, {}),
    ("block_size", 2.5, {}),
    ("segments", -1, {}),
    ("segments", 1.5, {}),
    ("fam_length", -1, {}),
    ("fam_length", 5, {}),  # longer than the block of 4
    ("positions", "relative", {}),
    ("fam_positions", "first", {}),
    ("fam_positions", "zero", {"positions": "local", "fam_length": 2}),
    ("fam_query", "middle", {}),
    ("prompt_positions", "after", {}),
    ("prompt_positions", "pinned", {"positions": "local", "fam_length": 2}),
    ("first_residual", "one", {}),
    ("stop_gradient", "yes", {}),
    ("window", 0, {}),
    ("window", -2, {}),
    ("window", 6, {}),  # more than one segment of 4 and the token itself
    ("window", 2.5, {}),
    ("clip", 0.0, {"fam_length": 2}),
    ("clip", -1.0, {"fam_length": 2}),
    ("clip", NAN, {"fam_length": 2}),
    ("clip", float("inf"), {"fam_length": 2}),
    ("noise", -0.1, {"fam_length": 2}),
    ("noise", NAN, {"fam_length": 2}),
    ("noise", float("inf"), {"fam_length": 2}),
    ("rsp", -0.1, {"fam_length": 2}),
    ("rsp", 1.01, {"fam_length": 2}),
    ("rsp", NAN, {"fam_length": 2}),
    ("rpo", True, {"positions": "local", "fam_length": 2}),
    ("rpo", "yes", {"positions": "absolute", "fam_length": 2}),
    ("kind", "lstm", {"fam_length": 2}),
    ("fam_ff", "no", {"fam_length": 2}),
    ("fam_ff", False, {}),  # without a FAM, as those below
    ("fam_init", "zeros", {"fam_length": 2}),
    ("fam_init", "prefix", {}),
    ("fam_blocks", 0, {"fam_length": 2}),
    ("fam_blocks", 2.5, {"fam_length": 2}),
    ("fam_blocks", 2, {}),
    ("fam_blocks", 2, {"fam_length": 2, "positions": "absolute", "prompt_positions": "pinned"}),
    ("layers", (0, 0), {"fam_length": 2}),
    ("layers", (1, 0), {"fam_length": 2}),
    ("layers", (-1,), {"fam_length": 2}),
    ("layers", (), {"fam_length": 2}),
    ("layers", [1], {"fam_length": 2}),
    ("layers", (0,), {}),
    ("summaries", 0, {"fam_length": 2, "kind": "autocompressor"}),
    ("summaries", 3, {"fam_length": 2, "kind": "rmt"}),
    ("fam_length", 2, {"kind": "feedback"}),
    ("segments", 0, {"kind": "feedback"}),
    *(("fam_length", 0, {"kind": kind}) for kind in ("summary", "rmt", "autocompressor")),
    ("first_residual", "fam", {"kind": "summary", "fam_length": 2}),
    *(
        (field, value, {"kind": kind, "fam_length": 0 if kind == "feedback" else 2, "positions": "absolute"})
        for kind in ("feedback", "rmt", "autocompressor")
        for field, value in {
            "fam_positions": "zero",
            "fam_query": "old",
            "prompt_positions": "pinned",
            "first_residual": "fam",
            "clip": 1.0,
            "noise": 0.1,
            "rsp": 0.5,
            "fam_ff": False,
            "fam_init": "prefix",
            "fam_blocks": 2,
            "layers": (0,),
        }.items()
    ),
]

BAD_DECODER = [
    *((name, 0) for name in SIZES),
    *((name, -2) for name in SIZES),
    *((name, 4.5) for name in SIZES),
    ("num_kv_heads", 3),  # does not divide four heads
    ("num_kv_heads", 8),
    ("head_dim", 5),  # rotary turns pairs
    ("memory", "fam"),
    ("mixing", "lime"),
    ("lora", 64),
    ("qk_norm", 1),
    ("activation", "relu"),
    ("attention_bias", "q"),
    ("post_norms", 1),
    ("attention", "flash"),
    ("attention", "cudnn"),  # in float32
    ("attention_softcap", 0.0),
    ("logit_softcap", -30.0),
    ("rope_scaling", 8.0),
    ("local_window", 0),
    ("local_layers", (True, False, False)),  # of two layers
    ("local_layers", (True, False)),  # without a window
    ("local_rope_base", 100.0),
    ("schedule", "wave"),
    ("parallel_block", "yes"),
    ("tie_embeddings", "yes"),
    ("rope_base", 0.0),
    ("rope_base", -1.0),
    ("rope_base", NAN),
    ("norm_eps", -1e-6),
    ("norm_eps", NAN),
    ("kv_init", -1.0),
    ("dtype", "float7"),
    ("dtype", "int32"),
    ("param_dtype", "int32"),
    ("param_dtype", "complex64"),
    ("remat", "yes"),
    ("remat", True),
    ("scan_layers", "yes"),
    ("sharding", "fsdp"),
]


@pytest.mark.parametrize(("field", "value", "others"), BAD_MEMORY)
def test_bad_memory_config(field, value, others):
    with pytest.raises(ValueError, match=field) as caught:
        MemoryConfig(**{"block_size": 4, **others, field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(("field", "value"), BAD_DECODER)
def test_bad_decoder_config(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        DecoderConfig(**{**SIZES, field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("kind", ["feedback", "rmt", "autocompressor"])
def test_kinds_that_need_the_block_schedule(kind):
    memory = MemoryConfig(block_size=4, kind=kind, fam_length=0 if kind == "feedback" else 2)
    with pytest.raises(ValueError, match=f"schedule='layer' is not possible with memory.kind='{kind}'.*to 'block'"):
        DecoderConfig(**SIZES, memory=memory)
    DecoderConfig(**SIZES, memory=memory, schedule="block")


@pytest.mark.parametrize(
    ("memory", "mixing", "message"),
    [
        ({"kind": "feedback"}, LimeConfig(), r"mixing=.* is not possible with memory.kind='feedback'"),
        ({"kind": "summary", "fam_length": 2}, LimeConfig(), r"mixing=.* is not possible with memory.kind='summary'"),
        ({"fam_length": 2, "layers": (0, 2)}, None, r"memory.layers=\(0, 2\) .* layers 0 to 1"),
        ({"fam_length": 2, "layers": (1,)}, LimeConfig(), r"memory.layers=\(1,\) is not possible with mixing="),
    ],
)
def test_memories_that_do_not_fit_the_decoder(memory, mixing, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**SIZES, memory=MemoryConfig(block_size=4, **memory), mixing=mixing, schedule="block")


def test_every_field_is_tried():
    """A field without an impossible value in these tables is one that nobody checks."""
    assert {field for field, *_ in BAD_MEMORY} == {field.name for field in dataclasses.fields(MemoryConfig)}
    assert {field for field, _ in BAD_DECODER} == {field.name for field in dataclasses.fields(DecoderConfig)}


def test_limits_are_allowed():
    MemoryConfig(block_size=1, segments=0, fam_length=1, window=1)
    MemoryConfig(block_size=4, segments=2, fam_length=4, window=9, rsp=1.0)
    MemoryConfig(block_size=4, fam_length=2, positions="absolute", fam_positions="zero", rpo=True)
    DecoderConfig(**SIZES, local_window=1, local_layers=(True, False), local_rope_base=1.0, rope_scaling=RopeScaling())
    DecoderConfig(**{**SIZES, "num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "vocab_size": 1})


def test_defaults():
    memory = MemoryConfig(block_size=8)
    assert (memory.segments, memory.fam_length, memory.positions, memory.fam_positions) == (
        1,
        0,
        "local",
        "last",
    )
    assert (memory.fam_query, memory.prompt_positions, memory.first_residual) == ("new", "before", "zero")
    assert (memory.stop_gradient, memory.window, memory.noise, memory.rsp, memory.rpo) == (
        False,
        None,
        0.0,
        0.0,
        False,
    )
    config = DecoderConfig(**SIZES)
    assert (config.memory, config.schedule, config.parallel_block, config.tie_embeddings) == (
        None,
        "layer",
        False,
        True,
    )
    assert (config.rope_base, config.norm_eps, config.dtype, config.param_dtype) == (
        10_000.0,
        1e-6,
        "float32",
        "float32",
    )
    assert (config.remat, config.scan_layers) == ("none", True)


def test_configs_are_frozen_values():
    config = fam_config()
    assert config == fam_config()
    assert hash(config) == hash(fam_config())
    assert config != decoder_config({})
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 32
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.memory.segments = 2


def test_kv_init_scales_what_keys_and_values_begin_with_alone():
    def start(**changes):
        config = dataclasses.replace(presets.tiny(), **changes)
        return Decoder(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]["layers"]

    plain, small = start(), start(kv_init=0.5)
    for name, weight in plain.items():
        scale = 0.5 if name in ("wk", "wv") else 1.0
        np.testing.assert_allclose(small[name], scale * weight, rtol=1e-6)

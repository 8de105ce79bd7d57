"""What is kept for the backward pass changes its memory and its operations, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from reference import assert_trees_close, mostly_slow, params_of, quick_jit

from experiments import flops
from experiments.typed import from_json, to_json
from fam_jax import Decoder, DecoderConfig, MemoryConfig, presets
from fam_jax.remat import POLICIES
from lime_jax import DepthAttentionConfig, HyperConnectionsConfig, LimeConfig

FAM = dataclasses.replace(presets.tiny(), d_ff=256)
MODELS = {
    "full attention": dataclasses.replace(FAM, memory=None),
    "BSWA": dataclasses.replace(FAM, memory=MemoryConfig(block_size=16, segments=2)),
    "FAM": FAM,
    "FAM, block schedule": dataclasses.replace(FAM, schedule="block"),
    "FAM, unrolled": dataclasses.replace(FAM, scan_layers=False),
    "FAM with LIMe, pushed": dataclasses.replace(FAM, mixing=LimeConfig(backward="push")),
    "FAM with LIMe, pulled": dataclasses.replace(FAM, mixing=LimeConfig(backward="pull")),
    "FAM with LIMe, unrolled": dataclasses.replace(FAM, mixing=LimeConfig(), scan_layers=False),
    "FAM with streams": dataclasses.replace(FAM, mixing=HyperConnectionsConfig()),
}


def gradient(config: DecoderConfig):
    """Loss and gradient by the parameters."""

    def loss(variables, tokens):
        return Decoder(config).apply(variables, tokens, targets=tokens[:, ::-1]).losses.nll.mean()

    return jax.value_and_grad(loss)


def shapes(config: DecoderConfig, batch: int, length: int):
    variables = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return variables, jax.ShapeDtypeStruct((batch, length), jnp.int32)


def test_policies():
    assert list(POLICIES) == ["none", "dots", "attention", "full"]


@mostly_slow(MODELS, fast=["FAM, block schedule"])
def test_values_and_gradients_are_the_same(name):
    with jax.enable_x64(True):
        config = dataclasses.replace(MODELS[name], dtype="float64", param_dtype="float64")
        tokens = jax.random.randint(jax.random.key(1), (2, 53), 0, config.vocab_size)
        variables = {"params": params_of(config)}
        plain = quick_jit(gradient(config))(variables, tokens)
        for remat in ("dots", "attention", "full"):
            changed = dataclasses.replace(config, remat=remat)
            assert_trees_close(quick_jit(gradient(changed))(variables, tokens), plain, 1e-10)


@mostly_slow(MODELS, fast=["BSWA"])
def test_the_less_is_kept_the_more_is_computed_again(name):
    memory, operations = [], []
    for remat in ("none", "dots", "attention", "full"):
        config = dataclasses.replace(MODELS[name], num_layers=4, remat=remat)
        arguments = shapes(config, 4, 256)
        compiled = jax.jit(gradient(config)).lower(*arguments).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        operations.append(flops.count(gradient(config), *arguments))
    assert operations == sorted(set(operations)), operations
    if config.scan_layers:
        assert memory == sorted(set(memory), reverse=True), memory  # four layers: the temporaries of one are the same
        assert memory[-1] < 0.45 * memory[0], memory
    else:  # XLA's oldest CPU backend takes what unrolled layers compute again for what they have computed before
        assert max(memory[1:]) < memory[0], memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixing", "fam_length", "states"),
    [
        (None, 0, 1.05),
        (None, 4, 1.3),
        (LimeConfig(), 4, 3.2),
        (LimeConfig(backward="pull"), 4, 3.2),
    ],  # a FAM of 4 rows to 16 tokens; LIMe keeps keys and values
)
def test_memory_of_32_layers_is_what_they_carry(mixing, fam_length, states):
    """With all of a layer computed again, a layer more needs what goes from layer to layer, and little else."""
    temporary = []
    for layers in (8, 32):
        memory = MemoryConfig(block_size=16, segments=2, fam_length=fam_length)
        config = dataclasses.replace(FAM, num_layers=layers, memory=memory, mixing=mixing, remat="full")
        compiled = jax.jit(gradient(config)).lower(*shapes(config, 4, 256)).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    state = 4 * 256 * FAM.d_model * 4  # bytes, in float32
    assert state <= (temporary[1] - temporary[0]) / 24 <= states * state


@pytest.mark.parametrize("mixing", [LimeConfig(), LimeConfig(backward="rebuild"), DepthAttentionConfig()])
def test_layers_that_are_written_once_are_always_computed_again(mixing):
    """`none` and `full` keep the same of each layer; within it, `full` computes attention's scores again."""
    config = dataclasses.replace(MODELS["BSWA"], mixing=mixing)
    arguments = shapes(config, 2, 64)
    none, full = (flops.count(gradient(dataclasses.replace(config, remat=r)), *arguments) for r in ("none", "full"))
    forward = flops.count(lambda *given: Decoder(config).apply(*given).logits, *arguments)
    assert 3.2 * forward < none < full < 1.2 * none
    for remat in ("dots", "attention"):
        with pytest.raises(ValueError, match=rf"DecoderConfig.remat='{remat}' is not possible with mixing="):
            dataclasses.replace(config, remat=remat)
        dataclasses.replace(config, remat=remat, scan_layers=False)


@pytest.mark.parametrize(("before", "now"), [(False, "none"), (True, "full"), ("dots", "dots")])
def test_configs_of_when_it_was_true_or_false_can_be_read(before, now):
    values = to_json(FAM) | {"remat": before}
    assert from_json(values, DecoderConfig) == dataclasses.replace(FAM, remat=now)

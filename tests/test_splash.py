"""Attention by TPUs' splash kernels, interpreted, against the reference; and compiled for TPU chips."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import B, assert_trees_close, decoder_config, fam_config, mostly_slow, params_of, runner, some_tokens
from train_helpers import ROOT

from experiments import checkpoint, flops
from fam_jax import Decoder, DecoderConfig, MemoryConfig, splash
from fam_jax.ops import Source, attend
from lime_jax import LimeConfig

T = 3 * B + 1
F32 = {"dtype": "float32", "param_dtype": "float32"}
TOKENS = some_tokens(3, B + 2 + T, seed=2)


def everything(config):
    """Logits, state and gradients of a call that goes on from states of unlike length, of ragged rows with resets."""
    params, full = params_of(config), config.memory is None
    state, training, tokens = None, {}, TOKENS[:, :T]
    if not full:
        before = dataclasses.replace(config, attention="xla")
        state = runner(before)(params, TOKENS[:, : B + 2], lengths=np.array([B + 2, B - 1, 0])).state
        reset = np.zeros((3, -(-T // B)), bool)
        reset[1, 2] = reset[2, 1] = True
        training, tokens = {"reset": reset, "lengths": np.array([T, T - 3, 2 * B])}, TOKENS[:, B + 2 :]
    chances = np.random.default_rng(3).standard_normal((*tokens.shape, config.vocab_size)).astype(np.float32)
    if not full:
        chances *= (np.arange(T) < training["lengths"][:, None])[..., None]

    def loss(params, floats):
        before = None if state is None else state.replace(**floats)
        out = Decoder(config).apply({"params": params}, tokens, state=before, **training)
        return jnp.sum(out.logits * chances) + jnp.sum(out.state.fam**2), (out.logits * (chances != 0), out.state)

    floats = {} if full else {name: getattr(state, name) for name in ("segment_k", "segment_v", "open_k", "fam")}
    (_, values), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, floats)
    return {"values": values, "gradients": gradients}


CASES = {
    "full": decoder_config(**F32),
    "bswa": decoder_config({"segments": 2}, **F32),
    "own block only, soft cap": decoder_config({"segments": 0}, attention_softcap=5.0, **F32),
    "fam": fam_config(**F32),
    "fam, three segments, stopped": fam_config({"segments": 3, "stop_gradient": True}, num_kv_heads=1, **F32),
    "fam, block schedule": fam_config({"segments": 2}, schedule="block", **F32),
    "fam, wavefront": fam_config({"segments": 2}, schedule="wavefront", **F32),
    "fam with LIMe, computed again": fam_config(
        {"segments": 2}, mixing=LimeConfig(backward="pull"), remat="attention", **F32
    ),
}


@mostly_slow(CASES, fast=("full", "fam"))
def test_values_and_gradients_are_the_references(name):
    config = CASES[name]
    want = everything(dataclasses.replace(config, attention="xla"))
    assert_trees_close(everything(dataclasses.replace(config, attention="splash")), want, 2e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 0, 1, 2, 1), (2, 130, 3, 2, 4, 2), (1, 257, 64, 1, 2, 2)])
def test_any_size_of_a_block(sizes):
    """Tokens, rows and heads that are no multiples of a tile; a row that misses a segment."""
    segments, tokens, rows, groups, heads, width = sizes
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal((2, 2, *shape)).astype(np.float32)

    def source(count):
        return Source(array(count, groups, width), array(count, groups, width))

    q, own, past = array(tokens, heads, width), source(tokens), [source(tokens) for _ in range(segments)]
    fam, there = [source(rows)] if rows else [], np.minimum(segments, [[0, 1], [1, 2]])
    masks = [(back <= there)[:, :, None, None] for back in range(1, segments + 1)]
    sources = [own._replace(mask=np.tri(tokens, dtype=bool))]
    sources += [one._replace(mask=mask) for one, mask in zip(past, masks, strict=True)]
    got = splash.attend_blocks(decoder_config().sharding, q, own, fam, past, there, None)
    np.testing.assert_allclose(got, attend(q, [*sources, *fam]), atol=2e-6)


def test_what_these_kernels_cannot(monkeypatch):
    sizes = {
        "vocab_size": 8,
        "num_layers": 2,
        "d_model": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "d_ff": 8,
    }
    for changes, message in (
        ({"dtype": "float64"}, "attention='splash' is not possible with dtype='float64', which must be 'bfloat16' or"),
        ({"local_window": 4}, "with local_window=4, which must be None"),
        ({"memory": MemoryConfig(block_size=4, window=2)}, r"with memory.window=2, which must be None"),
        ({"memory": MemoryConfig(block_size=4, fam_length=2, layers=(0,))}, r"with memory.layers=\(0,\), which must"),
        ({"memory": MemoryConfig(4, kind="feedback"), "schedule": "block"}, "with memory.kind='feedback', which must"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderConfig(**sizes, attention="splash", **changes)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="attention='splash' needs a TPU"):
        splash.chosen(DecoderConfig(**sizes, attention="splash"))


def test_a_trained_model_is_read_with_what_the_device_has():
    config = decoder_config(attention="splash", **F32)
    assert checkpoint.runs_here(config).attention == ("splash" if jax.default_backend() == "tpu" else "auto")
    for attention in ("auto", "xla"):
        assert checkpoint.runs_here(dataclasses.replace(config, attention=attention)).attention == attention


@pytest.mark.parametrize("memory", [None, {"block_size": 128, "segments": 1}])
def test_operations_of_whole_tiles_are_those_of_plain_products(memory):
    config = decoder_config(memory, num_kv_heads=1, **F32)
    tokens = np.zeros((2, 256), np.int32)

    def operations(attention):
        model = Decoder(dataclasses.replace(config, attention=attention))
        return flops.count(
            lambda params: model.apply({"params": params}, tokens, aligned=True).logits, params_of(config)
        )

    assert operations("splash") == operations("xla")


@pytest.mark.parametrize(("remat", "runs"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_programs_for_a_tpu_hold_the_kernels_which_run_again_only_if_all_of_a_layer_does(remat, runs):
    """The forward kernel, and both of the backward pass."""
    config = dataclasses.replace(CASES["fam"], attention="splash", remat=remat)

    def gradient(params):
        return jax.grad(lambda params: jnp.sum(Decoder(config).apply({"params": params}, TOKENS).logits))(params)

    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)["params"]
    text = jax.jit(gradient).trace(shapes).lower(lowering_platforms=("tpu",)).as_text()
    kernels = [len(re.findall(rf'kernel_name = "splash_mqa_{part}', text)) for part in ("fwd", "dq", "dkv")]
    assert kernels == [runs, 1, 1]


def test_operations_of_a_gradient_are_those_of_the_three_kernels():
    """Two products forwards, three for the queries' gradient, four for the keys' and values'."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 128, 4, 16)).astype(np.float32)
    own = Source(*(rng.standard_normal((1, 2, 128, 2, 16)).astype(np.float32) for _ in "kv"))
    there = np.zeros((1, 2), int)

    def loss(q, k, v):
        return jnp.sum(splash.attend_blocks(decoder_config().sharding, q, Source(k, v), [], [], there, None))

    products = flops.count(jax.grad(loss, argnums=(0, 1, 2)), q, own.k, own.v)
    rows = 2 * 4 * 128  # of each of which what is given times its gradient is summed, too
    assert products == 2 * rows * ((2 + 3 + 4) * 128 * 16 + 16)


def test_compiles_for_chips():
    """Their compiler takes the kernels, spread over a mesh of four."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.aot", "--preset", "tiny", "--topology", "v5e:2x2", "--batch", "8"]
        command += ["--length", "64", "--attention", "splash", "--output", folder]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = Path(folder).iterdir()
    assert file.stem == "aot-tiny-fam-splash-v5e-2x2"

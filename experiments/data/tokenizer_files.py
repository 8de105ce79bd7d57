"""The files of a pretrained model's tokenizer, and those that a GGUF file stands for."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.data.protocol import DataError
from fam_jax.pretrained.gguf import Gguf

# What a model's folder may have; one of the first two is the tokenizer itself.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens in GGUF that stand for themselves, wherever they occur
_KINDS = ("smollm", "gpt-2")


def write_gguf_tokenizer(gguf: Gguf, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a GGUF file's byte-level BPE.

    Raises:
        DataError: It is of another kind, or the package `tokenizers` is missing.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise DataError('making a tokenizer needs: pip install -e ".[tokenizers]"') from None
    kind, cut = gguf.field("tokenizer.ggml.model"), gguf.field("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _KINDS:
        raise DataError(
            f"{gguf.path}: tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={cut!r} is not supported, only 'gpt2' "
            f"with {' or '.join(map(repr, _KINDS))}; take the model's Hugging Face folder, which has a tokenizer.json"
        )
    tokens, types = gguf.field("tokenizer.ggml.tokens"), gguf.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in gguf.field("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    parts = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    of_type = {
        wanted: [
            AddedToken(token, normalized=False, special=wanted == _CONTROL)
            for token, found in zip(tokens, types, strict=True)
            if found == wanted
        ]
        for wanted in (_CONTROL, _USER_DEFINED)
    }
    tokenizer.add_special_tokens(of_type[_CONTROL])
    tokenizer.add_tokens(of_type[_USER_DEFINED])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str | None:
        number = gguf.field(f"tokenizer.ggml.{name}_token_id")
        return None if number is None else tokens[number]

    settings = {
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "add_bos_token": bool(gguf.field("tokenizer.ggml.add_bos_token", False)),
        "chat_template": gguf.field("tokenizer.chat_template"),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

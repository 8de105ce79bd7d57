"""A tiny model that chats: a run with a `tokenizer.json` and its settings beside, as pretrained models have."""

import json
from pathlib import Path

import pytest
import tiny_run

from experiments.config import TrainConfig
from experiments.data import TextData

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
Be kind.<|im_end|>
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
SETTINGS = {
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "special": True},
    "add_bos_token": False,
    "chat_template": TEMPLATE,
}
TEXT = "The ship is called Marigold. Who keeps the parrot? system user assistant Be kind.\n"


def write_tokenizer(folder: Path, settings: dict | None = None, seed: str = "") -> Path:
    """Byte-level BPE of the text above, in `tokenizer.json`; returns the folder."""
    library = pytest.importorskip("tokenizers")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT + seed], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save(folder: Path, memory=tiny_run.FAM, settings: dict | None = SETTINGS, seed: str = "", **model) -> Path:
    """A run on that tokenizer, which its config looks for where it is not."""
    data = TextData(length=64, batch_size=2, block_size=8, mode="packed", tokenizer="gone/tokenizer.json")
    config = TrainConfig("tiny-chat", tiny_run.model_config(memory, 300, **model), data, steps=1)
    return write_tokenizer(tiny_run.save(config, folder), settings, seed)

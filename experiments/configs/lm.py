"""A small FAM language model on Python source code, read as whole documents.

python -m experiments.train --config lm
"""

from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig, MemoryConfig


def config() -> TrainConfig:
    """Bytes, blocks of 128, a window of one past block and a FAM of 16 rows."""
    return TrainConfig(
        name="lm",
        model=DecoderConfig(
            vocab_size=256,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=1,
            head_dim=32,
            d_ff=384,
            memory=MemoryConfig(block_size=128, segments=1, fam_length=16),
        ),
        data=TextData(source="python-source", mode="stream", batch_size=8, length=1024, block_size=128),
        optim=OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=100, weight_decay=0.1),
        steps=2000,
    )

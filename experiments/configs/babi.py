r"""Questions about facts hidden in Shakespeare, one supporting fact each, like BABILong (arXiv 2406.10149).

pip install -e ".[shakespeare]"
python -m experiments.train --config babi --seed 0 --data.seed 0 --name babi-seed0
python -m experiments.evaluate --checkpoint runs/babi-seed0 --lengths 8 32 128 512 --trials 1000 --batch-size 50 \
    --zero-memory --output experiments/results

This config has not been run yet. `--data.questions 1 4 5 --data.blocks 12 16 24 32` mixes kinds of questions and
measures each; kinds 2 and 3 have two and three supporting facts. The window alone sees some facts of short texts. Who
guesses one of the six places is right one time in six. The texts are read as bytes.
"""

from experiments.config import TrainConfig
from experiments.data.babi import BabiData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig, MemoryConfig


def config() -> TrainConfig:
    """Six layers of width 256 that see their own block of 64 bytes, the one before and a FAM of 16 rows."""
    data = BabiData(block_size=64, blocks=(8, 12, 16, 32), questions=(1,), threshold=0.9, batch_size=64)
    return TrainConfig(
        name="babi",
        model=DecoderConfig(
            vocab_size=256,
            num_layers=6,
            d_model=256,
            num_heads=4,
            num_kv_heads=4,
            head_dim=64,
            d_ff=1024,
            memory=MemoryConfig(block_size=data.block_size, segments=1, fam_length=16, clip=4.0, noise=0.1),
        ),
        data=data,
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=500, b2=0.98, weight_decay=0.01, clip_norm=1.0),
        steps=30_000,
        eval_every=0,
        checkpoint_every=1000,
        log_every=100,
    )

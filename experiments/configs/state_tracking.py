r"""The running product of generators of a group, carried from block to block by a FAM.

python -m experiments.train --config state_tracking --seed 0 --data.seed 0 --name tracking-seed0
python -m experiments.evaluate --checkpoint runs/tracking-seed0 --lengths 1 2 4 8 16 32 64 --trials 1000 \
    --batch-size 100 --zero-memory --output experiments/results

This config has not been run yet. `--data.group` is `parity`, `s3` or `a5`, of which guesses are right 1/2, 1/6 and 1/60
of the time; `--data.targets ends` asks for products at the ends of blocks alone.
"""

from experiments.config import TrainConfig
from experiments.data.tracking import TrackingData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig, MemoryConfig


def config() -> TrainConfig:
    """Four layers of width 128 that see their own block of 8 tokens and a FAM of 4 rows; ids for any of the groups."""
    data = TrackingData(block_size=8, blocks=(1, 2, 4, 8), group="parity", threshold=0.9, batch_size=128)
    return TrainConfig(
        name="state_tracking",
        model=DecoderConfig(
            vocab_size=64,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            d_ff=512,
            memory=MemoryConfig(block_size=data.block_size, segments=0, fam_length=4, clip=4.0, noise=0.1),
        ),
        data=data,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=200, b2=0.98, weight_decay=0.01, clip_norm=1.0),
        steps=20_000,
        eval_every=0,
        checkpoint_every=1000,
        log_every=100,
    )

r"""PassKey with FAM: a five-digit number anywhere in the text, asked for beyond the trained length.

python -m experiments.train --config passkey --seed 0 --data.seed 0 --name passkey-seed0
python -m experiments.evaluate --checkpoint runs/passkey-seed0 --depth uniform --lengths 32 128 448 --batch-size 100 \
    --zero-memory --name passkey-seed0 --output experiments/results

Thirteen minutes a seed on one core of an AMD EPYC. Exact match of 500 keys at 32 blocks, the longest trained, 128 and
448, which is 14 times the trained length, the paper's ratio: 1.000, 1.000 and 1.000 with seed 0; 1.000, 0.998 and 1.000
with seed 1; 1.000, 1.000 and 1.000 with seed 2. With the FAM zeroed at every block 0.000, and with a window alone
(`passkey_bswa`) at most 0.006 from 128 blocks on. How it goes on, up to a million tokens: `ablations/passkey_reach.py`.
"""

from experiments.config import TrainConfig
from experiments.data.passkey import PasskeyData, PasskeyTokenizer
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig, MemoryConfig


def config() -> TrainConfig:
    """Two layers of width 64 that see their own block of 16 words and a FAM of 8 rows."""
    return TrainConfig(
        name="passkey",
        model=DecoderConfig(
            vocab_size=PasskeyTokenizer().vocab_size,
            num_layers=2,
            d_model=64,
            num_heads=4,
            num_kv_heads=1,
            head_dim=16,
            d_ff=128,
            memory=MemoryConfig(block_size=16, segments=0, fam_length=8, clip=4.0, noise=0.2),
            scan_layers=False,
        ),
        data=PasskeyData(block_size=16, blocks=(5, 8, 16, 32), threshold=0.85, depth="mixed", batch_size=32),
        optim=OptimConfig(
            learning_rate=3e-3, warmup_steps=100, final_scale=0.02, b2=0.98, weight_decay=0.01, clip_norm=1.0
        ),
        steps=6000,
        eval_every=0,
        checkpoint_every=500,
    )

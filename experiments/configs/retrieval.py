r"""Key-value pairs read once, then out of sight: how many does a FAM of 8 rows hold? (GradMem, arXiv 2603.13875).

python -m experiments.train --config retrieval --seed 0 --data.seed 0 --name retrieval-seed0
python -m experiments.evaluate --checkpoint runs/retrieval-seed0 --lengths 4 8 16 32 64 96 --trials 1000 \
    --batch-size 100 --zero-memory --output experiments/results

This config has not been run yet; a smaller one, of two layers, is the `cpu` size of experiments/ablations/retrieval.py.
The curriculum begins with four pairs, as GradMem's: of one pair the key need not be read. A text asks as many
questions, each of another pair. Exact match in GradMem's table, of 4, 8, 16, 32, 64 and 96 pairs: 1.000, 1.000, 0.998,
0.998, 0.965 and 0.988 of a Transformer that keeps the pairs; 0.990, 0.985, 0.974, 0.549, 0.226 and 0.152 of ARMT, which
like FAM has a memory in each layer; 1.000, 1.000, 0.455, 0.443, 0.193 and 0.129 of RMT with 8 vectors in all, to which
`--model.memory.fam-length 2` compares. The window alone (`--model.memory.fam-length 0 --model.memory.clip None
--model.memory.noise 0`) can only guess: 1 in 3844. With memory segments, `--data.filler` must be larger.
"""

from experiments.config import TrainConfig
from experiments.data.pairs import PairsData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig, MemoryConfig


def config() -> TrainConfig:
    """Four layers of width 128 that see their own block of 32 tokens, four pairs, and a FAM of 8 rows."""
    data = PairsData(block_size=32, pairs=(4, 8, 16, 32, 64, 96), filler=2, asked=4, batch_size=128)
    return TrainConfig(
        name="retrieval",
        model=DecoderConfig(
            vocab_size=data.load_tokenizer().vocab_size,
            num_layers=4,
            d_model=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            d_ff=512,
            memory=MemoryConfig(block_size=data.block_size, segments=0, fam_length=8, clip=4.0, noise=0.1),
        ),
        data=data,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=200, b2=0.98, weight_decay=0.01, clip_norm=1.0),
        steps=30_000,
        eval_every=0,
        checkpoint_every=1000,
        log_every=100,
    )

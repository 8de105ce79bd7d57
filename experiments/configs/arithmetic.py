"""Arithmetic expressions of six numbers, rewritten step by step to one: LIMe's smallest experiment, without LIMe.

python -m experiments.train --config arithmetic --seed 0 --data.seed 0
python -m experiments.evaluate --checkpoint runs/arithmetic --batch-size 250
"""

from experiments.config import TrainConfig
from experiments.data.arithmetic import ArithmeticData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig


def config() -> TrainConfig:
    """The paper's model: four layers of width 32 with four heads; 200 epochs of 50,000 expressions."""
    data = ArithmeticData(operands=(6,), reading="integers", samples=50_000, batch_size=256)
    return TrainConfig(
        name="arithmetic",
        model=DecoderConfig(
            vocab_size=data.vocab_size,
            num_layers=4,
            d_model=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            d_ff=128,
            memory=None,
        ),
        data=data,
        optim=OptimConfig(learning_rate=1e-3, schedule="linear", final_scale=0.0),
        steps=200 * data.samples // data.batch_size,
        eval_every=1000,
        eval_steps=4,
        checkpoint_every=2000,
        log_every=100,
    )

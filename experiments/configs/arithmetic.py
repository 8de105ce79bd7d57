"""Arithmetic expressions of six numbers, rewritten step by step to one: LIMe's smallest experiment, without LIMe.

python -m experiments.train --config arithmetic --seed 0 --data.seed 0
python -m experiments.evaluate --checkpoint runs/arithmetic --output experiments/results --batch-size 250

The paper's plain model answers 41.3 % right, with LIMe 71.6 %; number range, learning rate and batch size are not told.
This config has not yet been run to its end: its 200 epochs are for a GPU. After 26, at the best of five learning rates
(2.4e-2), the plain model gets 79.6 % right and LIMe 84.0 %; see experiments/ablations/arithmetic.py. With
`--data.operands 3 --data.samples 20000 --data.reading modular --optim.learning-rate 3e-3 --steps 2000` it gets 94.6 %
of expressions of three numbers right, in 2.5 minutes on one busy core (seed 0).
"""

from experiments.config import TrainConfig
from experiments.data.arithmetic import ArithmeticData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig


def config() -> TrainConfig:
    """The paper's model: four layers of width 32 with four heads; 200 epochs of 50,000 expressions."""
    data = ArithmeticData(operands=(6,), reading="integers", samples=50_000, batch_size=64)
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
        eval_steps=15,
        checkpoint_every=2000,
        log_every=100,
    )

"""ProsQA-like questions about a graph of classes, learnt from scratch by a small model.

python -m experiments.train --config prosqa --seed 0 --data.seed 0
python -m experiments.evaluate --checkpoint runs/prosqa --output experiments/results --batch-size 100

Who guesses between the two options gets 50 %. The paper's pretrained models with 150M parameters get 69.4 % (with LIMe
77.8 %) on the original questions. Not yet run to its end: a step takes 4.5 s on one busy CPU core.
"""

from experiments.config import TrainConfig
from experiments.data.prosqa import ProsqaData
from experiments.optim import OptimConfig
from fam_jax import DecoderConfig


def config() -> TrainConfig:
    """Four layers of width 64; 18,000 questions and 128 of them a step, as in the paper, whose model is pretrained."""
    data = ProsqaData(steps=(2, 3, 4), classes=16, samples=6000, batch_size=128)
    return TrainConfig(
        name="prosqa",
        model=DecoderConfig(
            vocab_size=data.vocab_size,
            num_layers=4,
            d_model=64,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            d_ff=256,
            memory=None,
        ),
        data=data,
        optim=OptimConfig(learning_rate=1e-3, schedule="linear", warmup_steps=140, final_scale=0.0, weight_decay=0.1),
        steps=14_000,
        eval_every=500,
        eval_steps=5,
        checkpoint_every=1000,
        log_every=100,
    )

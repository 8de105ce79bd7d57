"""LIMe against the plain model on arithmetic expressions of six numbers (LIMe, section 5; 71.6 % against 41.3 %).

python -m experiments.ablate arithmetic --size cpu

Four layers of width 32 with four heads, 50,000 expressions, learning rate with linear decay, as in the paper; the
integer reading. `cpu` makes as many steps as fit 20 minutes a run on one core, `paper` the 200 epochs.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import arithmetic, lime_arithmetic

SIZES = ("cpu", "paper")
CHECKPOINTS = 8  # at which the accuracy over steps is measured
EVALUATION = {"batch_size": 250}


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm; all differ in the mixing alone."""
    made = {}
    for label, base in (("baseline", arithmetic.config()), ("LIMe", lime_arithmetic.config())):
        config = base
        if size == "cpu":
            model = dataclasses.replace(base.model, scan_layers=False)
            config = dataclasses.replace(base, model=model, steps=8000, eval_every=0)
        every = config.steps // CHECKPOINTS
        made[label] = dataclasses.replace(config, checkpoint_every=every, keep=CHECKPOINTS)
    return made

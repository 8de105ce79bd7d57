r"""LIMe on questions about graphs, ProsQA (LIMe, section 5.2; 77.8 % against 69.4 %, fine-tuned 150M models).

python -m experiments.ablate prosqa --size cpu

Here from scratch, four layers of width 64, on questions made by the same rules. Ours: experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import with_data, with_model
from experiments.config import TrainConfig
from experiments.configs import prosqa
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "as in the paper, from scratch: 0.465 and 0.460 right with LIMe, 0.325 and 0.415 without; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = prosqa.config()
    if size == "cpu":
        small = with_data(base, steps=(2, 3), classes=8, batch_size=32)
        optim = dataclasses.replace(base.optim, warmup_steps=30)
        base = dataclasses.replace(small, optim=optim, steps=600)
    base = dataclasses.replace(base, eval_every=0, checkpoint_every=base.steps // 4, keep=4)
    return {"none": with_model(base, mixing=None), "LIMe": with_model(base, mixing=LimeConfig())}


def evaluation(size: str) -> dict[str, Any]:
    """Answers right, at four checkpoints."""
    return {"batch_size": 50}

"""`lm` trained as the paper trains: packed rows, a repeated segment, Random State Passing, Adafactor.

python -m experiments.train --config lm_packed

Section 3.1 and table 4 of the paper at the size of `lm`: FAM starts from what the step before left with probability
0.8; 256 tokens of every row are repeated at its end with loss weight 0.1; Adafactor with a first moment of 0.9 and a
constant learning rate. The paper starts from pretrained weights, at 1e-4 to 3e-3; the rate here is for training from
nothing.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import lm
from experiments.data import TextData
from experiments.optim import OptimConfig


def config() -> TrainConfig:
    """`lm` in rows of 16 blocks, three memory segments of past."""
    base = lm.config()
    assert base.model.memory is not None
    assert isinstance(base.data, TextData)
    return dataclasses.replace(
        base,
        name="lm_packed",
        model=dataclasses.replace(base.model, memory=dataclasses.replace(base.model.memory, segments=3, rsp=0.8)),
        data=dataclasses.replace(base.data, mode="packed", length=2048, batch_size=4, repeat_tokens=256),
        optim=OptimConfig(optimizer="adafactor", schedule="constant", learning_rate=1e-2, warmup_steps=100),
    )

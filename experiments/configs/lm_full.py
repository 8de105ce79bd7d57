"""The language model with full causal attention, on rows of 1,024 bytes: what a window has to compete with.

python -m experiments.train --config lm_full
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import lm
from experiments.data import TextData


def config() -> TrainConfig:
    """`lm` without a memory, on packed rows."""
    base = lm.config()
    assert isinstance(base.data, TextData)
    return dataclasses.replace(
        base,
        name="lm_full",
        model=dataclasses.replace(base.model, memory=None),
        data=dataclasses.replace(base.data, mode="packed"),
    )

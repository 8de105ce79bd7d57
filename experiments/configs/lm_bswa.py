"""The window-only twin of lm: the same sizes, data and steps, and no FAM.

python -m experiments.train --config lm_bswa
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import lm


def config() -> TrainConfig:
    """`lm` with a FAM of no rows."""
    base = lm.config()
    assert base.model.memory is not None
    memory = dataclasses.replace(base.model.memory, fam_length=0)
    return dataclasses.replace(base, name="lm_bswa", model=dataclasses.replace(base.model, memory=memory))

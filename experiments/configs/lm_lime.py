"""`lm` whose layers mix the keys and values of all earlier ones (LIMe), with FAM along time.

python -m experiments.train --config lm_lime

Not yet run to its end.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import lm
from lime_jax import LimeConfig


def config() -> TrainConfig:
    """`lm` with a static router, which learns ten times as fast as the rest."""
    base = lm.config()
    return dataclasses.replace(base, name="lm_lime", model=dataclasses.replace(base.model, mixing=LimeConfig()))

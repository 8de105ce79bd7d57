"""The window-only twin of retrofit_fam: the same LoRA, data and steps, and no FAM.

python -m experiments.train --config retrofit_bswa
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import retrofit_fam


def config() -> TrainConfig:
    """`retrofit_fam` with a FAM of no rows."""
    base = retrofit_fam.config()
    assert base.model.memory is not None
    memory = dataclasses.replace(base.model.memory, fam_length=0, rsp=0.0, first_residual="zero")
    model = dataclasses.replace(base.model, memory=memory)
    return dataclasses.replace(base, name="retrofit_bswa", model=model, prompt_token=None)

"""SmolLM2-135M is given a FAM by LoRA on instruction data: the paper's recipe, weights of the loss included.

python -m experiments.train --config retrofit_instructions

Section 3.1: instructions and their answers packed to long rows without a mask between them; the loss is of answers
(weight 1) and of the repeated segment (0.1), not of instructions (0). The paper has Flan and rows of 8.5k tokens; here
it is the public sets of `--data.source instructions`, or `chat:GLOB` for files of your own. Not yet run.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import retrofit_fam
from experiments.data import TextData


def config() -> TrainConfig:
    """`retrofit_fam` on rows of 8,192 tokens of instruction data."""
    base = retrofit_fam.config()
    assert isinstance(base.data, TextData)
    data = dataclasses.replace(base.data, source="instructions", length=8192, batch_size=2)
    return dataclasses.replace(base, name="retrofit_instructions", data=data)

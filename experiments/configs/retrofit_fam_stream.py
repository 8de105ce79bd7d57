"""SmolLM2-135M is given a FAM by LoRA, with our recipe: whole documents from step to step, and noise on the FAM.

python -m experiments.train --config retrofit_fam_stream

A row reads one document to its end before the next, so that its FAM has read what no window holds, where the paper
packs rows and regrets it ("curse of IID", section 3.1.1); a noise of 0.15 makes a memory that lasts. The repeated
segment of `retrofit_fam` has no place in a document. It has not yet been run.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import retrofit_fam
from experiments.data import TextData


def config() -> TrainConfig:
    """`retrofit_fam` in stream mode."""
    base = retrofit_fam.config()
    assert base.model.memory is not None
    assert isinstance(base.data, TextData)
    memory = dataclasses.replace(base.model.memory, noise=0.15)
    return dataclasses.replace(
        base,
        name="retrofit_fam_stream",
        model=dataclasses.replace(base.model, memory=memory),
        data=dataclasses.replace(base.data, mode="stream", repeat_tokens=0),
    )

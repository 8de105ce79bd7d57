"""SmolLM2-135M is given a FAM by LoRA, with the paper's recipe at small scale.

python -m experiments.pretrained smollm2-135m --output runs/smollm2-135m
python -m experiments.train --config retrofit_fam
python -m experiments.evaluate --checkpoint runs/retrofit_fam

Section 3.1 and table 4 of the paper: LoRA of rank 64 on attention and feed-forward, the FAM prompt trained with it, all
else as it was; packed rows whose last 256 tokens repeat others with loss weight 0.1; Random State Passing 0.8. The
paper's models have 1B parameters and more, read 8.5k tokens a row and 1.1M a step; here it is 16k a step, in blocks of
256 in place of 1024, and few steps, so that a start is taken that does no harm: the FAM prompt begins like the token
that texts begin with (SmolLM2's <|im_start|>), and the first update keeps it as its residual. AdamW is in place of
Adafactor, which moves a parameter in proportion to its size, and LoRA's B begins at zero. The window alone, trained the
same way, is `retrofit_bswa`; `python -m experiments.ablate retrofit` compares both, untrained and trained.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.data import TextData
from experiments.optim import OptimConfig
from fam_jax import LoraConfig, MemoryConfig, presets


def config() -> TrainConfig:
    """Blocks of 256, a window of one past block and a FAM of 16 rows, in rows of 8 blocks."""
    return TrainConfig(
        name="retrofit_fam",
        model=dataclasses.replace(
            presets.smollm2_135m(),
            memory=MemoryConfig(block_size=256, segments=1, fam_length=16, rsp=0.8, first_residual="fam"),
            lora=LoraConfig(rank=64),
            dtype="bfloat16",
            remat="full",
        ),
        data=TextData(
            source="python-source",
            tokenizer="runs/smollm2-135m/tokenizer.json",
            mode="packed",
            batch_size=8,
            length=2048,
            block_size=256,
            repeat_tokens=256,
            repeat_weight=0.1,
        ),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=5),
        steps=2000,
        init_from="runs/smollm2-135m",
        prompt_token=1,
    )

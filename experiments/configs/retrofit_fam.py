"""SmolLM2-135M is given a FAM by LoRA, with the paper's recipe at small scale.

python -m experiments.pretrained smollm2-135m --output runs/smollm2-135m
python -m experiments.train --config retrofit_fam --init-from runs/smollm2-135m \
    --data.tokenizer runs/smollm2-135m/tokenizer.json
python -m experiments.evaluate --checkpoint runs/retrofit_fam

Section 3.1 and table 4 of the paper: LoRA of rank 64 on attention and feed-forward, the FAM prompt trained with it, all
else as it was; packed rows whose last 256 tokens repeat others with loss weight 0.1; Random State Passing 0.8;
Adafactor with a first moment of 0.9 and a constant learning rate. The paper's models have 1B parameters and more, read
8.5k tokens a row and 1.1M a step; here it is 16k a step, in blocks of 256 in place of 1024. Adafactor moves a
parameter in proportion to its size, and B, which begins at zero, at first by a thousandth of the learning rate: hence
1e-2, where the paper has 1e-4 to 3e-3. The window alone, trained the same way, is `retrofit_bswa`.

It has not yet been run: it is for one GPU or TPU.
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
            memory=MemoryConfig(block_size=256, segments=1, fam_length=16, rsp=0.8),
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
        optim=OptimConfig(optimizer="adafactor", schedule="constant", learning_rate=1e-2),
        steps=2000,
    )

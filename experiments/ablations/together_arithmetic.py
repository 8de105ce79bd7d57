r"""FAM and LIMe, alone and together, on arithmetic expressions (nobody has published this).

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.ablate together_arithmetic --size cpu

`arithmetic`, whose model has full attention, with blocks of 8 tokens and no past blocks: what a line of the rewriting
needs of the block before comes by the FAM or not at all. `cpu` has expressions of three numbers modulo 11, `gpu` the
paper's six. Ours: experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import NO_FAM, with_memory, with_model, with_optim
from experiments.config import TrainConfig
from experiments.configs import arithmetic
from experiments.data.arithmetic import ArithmeticData
from fam_jax import MemoryConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "FAM 0.73, the window alone 0.12; LIMe adds nothing, and with it FAM does not learn it; one seed, one rate"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    steps = {"cpu": 3000, "gpu": 20_000}[size]
    base = with_optim(arithmetic.config(), learning_rate=1e-2)
    base = dataclasses.replace(base, steps=steps, eval_every=0, checkpoint_every=steps // 2)
    if size == "cpu":
        data = ArithmeticData(operands=(3,), reading="modular", samples=20_000)
        base = with_model(dataclasses.replace(base, data=data), vocab_size=data.vocab_size, scan_layers=False)
    fam = with_model(base, memory=MemoryConfig(block_size=8, segments=0, fam_length=4, clip=4.0))
    made = {"full": base, "window": with_memory(fam, **NO_FAM), "FAM": fam}
    return made | {f"{name}-LIMe": with_model(config, mixing=LimeConfig()) for name, config in made.items()}


def evaluation(size: str) -> dict[str, Any]:
    """Answers right, at two checkpoints."""
    return {"batch_size": 250}

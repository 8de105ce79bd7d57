r"""State tracking: parity, or the product of generators of S3 or A5, carried over blocks (no row of either paper).

python -m experiments.ablate tracking --size cpu

Trained on up to 8 blocks of 8 tokens, tested on up to 64. Transformers are known to fit the lengths they are trained on
and no longer ones (arXiv 2602.18333); a FAM is updated by a nonlinear function once a block, so that it can carry the
state. Who guesses is right 1/2, 1/6 and 1/60 of the time. The window sees one past block, which FAM does not. Ours:
experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import memory_arms, with_data, with_memory, with_model
from experiments.config import TrainConfig
from experiments.configs import state_tracking

SIZES = ("cpu", "gpu")
CORE = False
VERDICT = "FAM and RMT carry a parity over one block's end (0.98, 0.99), and no other arm; none carries S3 or A5"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = state_tracking.config()
    if size == "cpu":
        small = with_model(base, d_model=64, num_layers=2, num_heads=4, head_dim=16, d_ff=256, scan_layers=False)
        base = dataclasses.replace(with_data(small, batch_size=64), steps=2500, checkpoint_every=0)
    made: dict[str, TrainConfig] = {}
    for group in ("parity", "s3", "a5"):
        found = memory_arms(with_data(base, group=group))
        found["window"] = with_memory(found["window"], segments=1)
        made |= {f"{name}-{group}": config for name, config in found.items()}
    return made


def evaluation(size: str) -> dict[str, Any]:
    """The share of texts whose whole product is told right, by blocks."""
    return {"lengths": (1, 2, 4, 8, 16, 32, 64), "trials": 500, "batch_size": 100, "zero_memory": True}

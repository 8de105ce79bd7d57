r"""State tracking: the parity, or the product in S3, of generators, carried over blocks (no row of either paper).

python -m experiments.ablate tracking --size cpu

Trained on up to 8 blocks of 8 tokens, tested on up to 64. Transformers are known to fit the lengths they are trained on
and no longer ones; a FAM is updated by a nonlinear function once a block, so that it can carry the state.
The window sees one past block, which FAM does not. Ours:
experiments/README.md.
"""

import dataclasses
from typing import Any

from experiments.ablations._bases import NO_FAM, with_data, with_memory, with_model
from experiments.config import TrainConfig
from experiments.configs import state_tracking

SIZES = ("cpu", "gpu")
CORE = False


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = state_tracking.config()
    if size == "cpu":
        small = with_model(base, d_model=64, num_layers=2, head_dim=16, d_ff=256, scan_layers=False)
        base = dataclasses.replace(with_data(small, batch_size=64), steps=3000, checkpoint_every=0)
    made: dict[str, TrainConfig] = {}
    for group in ("parity", "s3"):
        one = with_data(base, group=group)
        made |= {
            f"FAM-{group}": one,
            f"window-{group}": with_memory(one, segments=1, **NO_FAM),
            f"full-{group}": with_model(one, memory=None),
        }
    return made


def evaluation(size: str) -> dict[str, Any]:
    """The share of texts whose whole product is told right, by blocks."""
    return {"lengths": (1, 2, 4, 8, 16, 32, 64), "trials": 500, "batch_size": 100, "zero_memory": True}

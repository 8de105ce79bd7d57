r"""LIMe in deeper models of one width (LIMe, section 5.1).

python -m experiments.ablate lime_depth --size cpu

Paper (width 256, 32 to 128 layers): LIMe is ahead at every depth, more so the deeper, and 64 layers with it have a
lower loss than 128 without. `cpu` has 8 to 64 layers of width 32. Ours: experiments/README.md.
"""

import dataclasses

from experiments.ablations._bases import layers_base, layers_evaluation, with_model
from experiments.config import TrainConfig
from lime_jax import LimeConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "in part as in the paper: level at 8 and 16 layers, ahead at 32 (2.01 for 2.06) and 64 (2.01 for 2.03)"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = layers_base(size)
    depths = (32, 64, 128) if size == "paper" else (8, 16, 32, 64)
    if size == "paper":
        base = with_model(base, d_model=256, num_heads=8, num_kv_heads=8, head_dim=32, d_ff=1024)
    if size == "cpu":
        narrow = with_model(base, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=96)
        base = dataclasses.replace(with_model(narrow, scan_layers=True), steps=250)
    made = {}
    for depth in depths:
        made[f"none-{depth}"] = with_model(base, num_layers=depth)
        made[f"LIMe-{depth}"] = with_model(base, num_layers=depth, mixing=LimeConfig())
    return made


evaluation = layers_evaluation

r"""PassKey with a limit to the size of the FAM, and without (ours; the paper has none).

python -m experiments.ablate passkey_clip --size cpu

The residual lets the FAM grow from block to block, until what is added is lost in it. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = False
VERDICT = "with noise a limit of 4 or less, or none, holds every key to 14 trained lengths; 8 does not in this seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    limits = (None, 2.0, 4.0, 8.0)
    return {"none" if limit is None else f"clip-{limit:g}": with_memory(base, clip=limit) for limit in limits}


evaluation = passkey_evaluation

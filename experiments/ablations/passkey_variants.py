r"""PassKey of other forms of FAM: earlier FAMs in sight, prefixes, fewer layers (TransformerFAM, B.4.2 and B.4.6).

python -m experiments.ablate passkey_variants --size cpu

Paper (other tasks): tokens that see the FAM after each of the last 2 to 6 blocks gain nothing; a learned start for each
layer is worse than a prompt that climbs the layers. FAM in some layers only is not told. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = False
VERDICT = "only a FAM in the last layer alone loses keys; prefixes, earlier FAMs, the first layer alone: none; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    last = base.model.num_layers - 1
    return {
        "FAM": base,
        "blocks-2": with_memory(base, fam_blocks=2),
        "blocks-4": with_memory(base, fam_blocks=4),
        "prefix": with_memory(base, fam_init="prefix"),
        "first-layer": with_memory(base, layers=(0,)),
        "last-layer": with_memory(base, layers=(last,)),
    }


evaluation = passkey_evaluation

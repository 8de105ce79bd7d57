r"""PassKey with FAM rows at other rotary positions (TransformerFAM, section B.4.3, table 7, there on PG-19).

python -m experiments.ablate passkey_positions --size cpu

Paper: the block's last slots are better than fractions, and these than zero. `old-query` is the reading in which a FAM
row asks from where it was and not from where it will be. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = False
VERDICT = "as in the paper: the last slots hold every key, fractions lose it at 4 trained lengths, zero at 2; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    return {
        "last": base,
        "fractional": with_memory(base, fam_positions="fractional"),
        "zero": with_memory(base, fam_positions="zero", positions="absolute"),
        "old-query": with_memory(base, fam_query="old"),
    }


evaluation = passkey_evaluation

r"""PassKey with FAMs of 1 to 16 rows (TransformerFAM, section B.4.1, table 5, there on Qasper and Quality).

python -m experiments.ablate passkey_fam_length --size cpu

Paper: best at 64 rows for blocks of 1,024, worse beyond. Here a block has 16 words. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = False
VERDICT = "more rows hold longer: 1 does not learn it, 2 and 4 lose it beyond the trained length, 8 and 16 never"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    return {f"N{rows}": with_memory(base, fam_length=rows) for rows in (1, 2, 4, 8, 16)}


evaluation = passkey_evaluation

r"""PassKey with and without the prompt as residual of the first update (TransformerFAM, section B.1).

python -m experiments.ablate passkey_first_residual --size cpu

Paper: the first update has a residual of zero, as the prompt holds no context yet; no number is given for the
alternative. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = False
VERDICT = "no difference: all keys are held to 14 trained lengths with either; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    return {"zero": base, "fam": with_memory(base, first_residual="fam")}


evaluation = passkey_evaluation

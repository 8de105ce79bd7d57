r"""PassKey by length: the window with 0 to 8 past blocks against FAM with none (TransformerFAM, figure 3a).

python -m experiments.ablate passkey_memory --size cpu

Paper (1B, trained on 2k to 18k): FAM holds the key up to 260k, all of 100 %; the window gains up to two past blocks and
then saturates, reaches far less than layers x segments, and a gradient that is stopped at past blocks shortens it
further (M1-SG). At `cpu` and `gpu`, FAM has our limit to its size and noise. Ours: experiments/README.md.
"""

from experiments.ablations._bases import NO_FAM, PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = True
VERDICT = "as in the paper: FAM holds the key at every length, the window at most as far as layers x segments"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    made = {f"M{segments}": with_memory(base, segments=segments, **NO_FAM) for segments in (0, 1, 2, 4, 8)}
    made["M1-SG"] = with_memory(base, segments=1, stop_gradient=True, **NO_FAM)
    return {**made, "FAM": base}


evaluation = passkey_evaluation

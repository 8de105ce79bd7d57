r"""PassKey with Random State Passing at several probabilities (TransformerFAM, sections B.2.3 and B.4.5, figure 6).

python -m experiments.ablate passkey_rsp --size cpu

Paper (PG-19, 1B): the best probability is 0.8, and without it accuracy is markedly lower. On PassKey a stored key is
never the one that is asked for, so that here it may as well teach to distrust old keys. FAM noise, which serves the
same end, is off in all arms. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = True
VERDICT = "as expected here, it teaches to distrust old keys: the more, the sooner they are lost; 0.8 is seldom learnt"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = with_memory(passkey_base(size), noise=0.0)
    return {f"RSP-{p:g}": with_memory(base, rsp=p) for p in (0.0, 0.1, 0.5, 0.8, 0.95)}


evaluation = passkey_evaluation

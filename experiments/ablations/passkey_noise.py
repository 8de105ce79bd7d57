r"""PassKey with noise on the FAM in training, at several sizes (ours; the paper has none).

python -m experiments.ablate passkey_noise --size cpu

What is held has to survive a disturbance of so many times its size after every update, which makes of it something that
small drifts do not leave. Ours: experiments/README.md.
"""

from experiments.ablations._bases import PASSKEY_SIZES, passkey_base, passkey_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = PASSKEY_SIZES
CORE = True
VERDICT = "noise of 0.2 or more holds every key to 14 trained lengths; without, all seeds lose most"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = passkey_base(size)
    return {f"noise-{s:g}": with_memory(base, noise=s) for s in (0.0, 0.05, 0.1, 0.2, 0.4)}


evaluation = passkey_evaluation

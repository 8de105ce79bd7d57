r"""Loss in books with other bases of the rotary wavelengths (TransformerFAM, section B.4.4, figure 5).

python -m experiments.ablate books_rope_base --size cpu

Paper (PG-19, 1B): 10,000 is a good value even for long contexts, of 100 to 100,000. Ours: experiments/README.md.
"""

from experiments.ablations._bases import books_base, books_evaluation, with_model
from experiments.config import TrainConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "no order at this size: 1.71, 1.72, 1.69 and 1.71 nats at bases of 100 to 100,000; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = books_base(size)
    return {f"base-{number}": with_model(base, rope_base=float(number)) for number in (100, 1000, 10_000, 100_000)}


evaluation = books_evaluation

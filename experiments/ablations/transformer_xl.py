r"""Block window against the sliding window of Transformer-XL, in books (TransformerFAM, section B.4.7, table 8).

python -m experiments.ablate transformer_xl --size cpu

Paper (PG-19, 1B): 46.4 and 46.1, no meaningful difference, nor on other tasks. Ours: experiments/README.md.
"""

from experiments.ablations._bases import NO_FAM, books_base, books_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "the sliding window is ahead by 0.022 nats or 0.6 points, where the paper sees no difference; one seed"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = with_memory(books_base(size), segments=1, **NO_FAM)
    assert base.model.memory is not None
    return {"M1": base, "XL": with_memory(base, window=base.model.memory.block_size)}


evaluation = books_evaluation

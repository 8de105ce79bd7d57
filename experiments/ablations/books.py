r"""Loss and next-token accuracy by position in books: 0 to 4 past blocks, and FAM (TransformerFAM, table 11, PG-19).

python -m experiments.ablate books --size cpu

Paper (1B, next-token accuracy on PG-19): M0 43.0, M1 46.4, M2 46.6, M4 45.8, FAM with three past blocks 47.0; so that a
window needs one past block and gains little from more, and FAM adds half a point. Ours: experiments/README.md.
"""

from experiments.ablations._bases import NO_FAM, books_base, books_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = ("cpu", "gpu", "paper")
CORE = True
VERDICT = "not reproduced at this size: in 600 steps no wider window is ahead, and FAM adds nothing to any"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = books_base(size)
    made = {f"M{segments}": with_memory(base, segments=segments, **NO_FAM) for segments in (0, 1, 2, 4)}
    return {**made, **{f"FAM-M{segments}": with_memory(base, segments=segments) for segments in (0, 1, 3)}}


evaluation = books_evaluation

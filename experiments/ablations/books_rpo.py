r"""Loss in books with Random Position Offset (TransformerFAM, sections B.2.2 and B.4.4, figure 5).

python -m experiments.ablate books_rpo --size cpu

Paper (PG-19, 1B): lower accuracy without it. Rotary attention does not notice an offset that all share: with the prompt
moved along (`before`) no effect is expected; with the prompt at 0 to N-1 (`pinned`) there may be one. Ours:
experiments/README.md.
"""

from experiments.ablations._bases import books_base, books_evaluation, with_memory
from experiments.config import TrainConfig

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "no effect, as expected where the prompt moves along (0.001 nats), and none where it is pinned (0.003)"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    base = with_memory(books_base(size), positions="absolute")
    places = ("before", "pinned")
    return {
        f"{place}-{'RPO' if rpo else 'plain'}": with_memory(base, prompt_positions=place, rpo=rpo)
        for place in places
        for rpo in (False, True)
    }


evaluation = books_evaluation

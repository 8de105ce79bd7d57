"""What tokens and FAM rows look at in books (TransformerFAM, appendix F, figure 11).

python -m experiments.ablate books_attention --size cpu

Paper: in every layer shown tokens read the FAM actively, and FAM rows pick a few tokens of the block. Its runs are
those of `books`. Ours: experiments/README.md.
"""

from typing import Any

from experiments.ablations import books
from experiments.config import TrainConfig

SIZES = books.SIZES
CORE = False
VERDICT = "in part as in the paper: FAM rows pick a few tokens; tokens read the FAM little beside past blocks"
RUNS_OF = "books"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    return {name: config for name, config in books.arms(size).items() if name.startswith("FAM")}


def evaluation(size: str) -> dict[str, Any]:
    """Shares of attention by layer, and how few tokens FAM rows pick."""
    return {"what": "attention-layers", "length": {"cpu": 256, "gpu": 2048, "paper": 8192}[size]}

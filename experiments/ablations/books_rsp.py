r"""Loss in books with and without Random State Passing, and with FAM noise (TransformerFAM, figure 5).

python -m experiments.ablate books_rsp --size cpu

Paper (PG-19, 1B): markedly lower accuracy without Random State Passing. There rows are packed, here too; `stream` reads
documents on from step to step in its place, which the paper calls ideal. Ours: experiments/README.md.
"""

import dataclasses

from experiments.ablations._bases import books_base, books_evaluation, with_memory
from experiments.config import TrainConfig
from experiments.data import TextData

SIZES = ("cpu", "gpu", "paper")
CORE = False
VERDICT = "not reproduced at this size: RSP costs 0.021 nats, noise nothing; streams are behind packed rows"


def arms(size: str) -> dict[str, TrainConfig]:
    """The configs by arm."""
    given = books_base(size)
    data = given.data
    assert isinstance(data, TextData)
    whole = data.length // data.block_size * data.block_size
    packed = dataclasses.replace(given, data=dataclasses.replace(data, mode="packed"))
    stream = dataclasses.replace(given, data=dataclasses.replace(data, mode="stream", repeat_tokens=0, length=whole))
    return {
        "RSP-0": with_memory(packed, rsp=0.0),
        "RSP-0.8": with_memory(packed, rsp=0.8),
        "noise-0.15": with_memory(packed, rsp=0.0, noise=0.15),
        "stream": with_memory(stream, rsp=0.0),
    }


evaluation = books_evaluation

r"""Pairs one to a block, whose keys repeat: the last value of a key counts (ARMT, arXiv 2407.04841).

python -m experiments.train --config rewrite --seed 0 --data.seed 0 --name rewrite-seed0
python -m experiments.evaluate --checkpoint runs/rewrite-seed0 --lengths 10 50 100 200 500 1000 --trials 1000 \
    --batch-size 100 --zero-memory --output experiments/results

This config has not been run yet. With `--data.live 0` all keys are different: ARMT's remember. ARMT has 4 memory
tokens and a matrix of width 64 a layer, and is trained in many stages up to 200 pairs; here the curriculum does that.
"""

import dataclasses

from experiments.config import TrainConfig
from experiments.configs import retrieval
from experiments.data.pairs import PairsData


def config() -> TrainConfig:
    """The model of `retrieval` with blocks of 8 tokens, one pair each, and four keys to a row."""
    base = retrieval.config()
    assert base.model.memory is not None
    memory = dataclasses.replace(base.model.memory, block_size=8)
    data = PairsData(
        block_size=8, pairs=(1, 2, 3, 5, 10, 20, 40, 50), per_block=1, live=4, filler=1, threshold=0.9, batch_size=128
    )
    return dataclasses.replace(
        base, name="rewrite", model=dataclasses.replace(base.model, memory=memory), data=data, steps=20_000
    )

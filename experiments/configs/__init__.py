"""Named configs: one module per run, whose docstring tells of it and whose function `config()` returns it."""

from __future__ import annotations

import importlib
import sys

from experiments.command import modules
from experiments.config import TrainConfig


def summaries() -> dict[str, str]:
    """Known names and the first line of what each tells of itself."""
    return modules(sys.modules[__name__])


def get(name: str) -> TrainConfig:
    """The config of a name.

    Raises:
        ValueError: There is none.
    """
    known = summaries()
    if name not in known:
        raise ValueError(
            f"config {name!r} is not known; there are {', '.join(known)} (a new one is a module in experiments/configs)"
        )
    return importlib.import_module(f"experiments.configs.{name}").config()

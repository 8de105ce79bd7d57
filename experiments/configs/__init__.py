"""Named configs: one module per run, whose docstring tells of it and whose function `config()` returns it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from experiments.config import TrainConfig


def summaries() -> dict[str, str]:
    """Known names and the first line of what each tells of itself, read without running any."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    return {name: (text or "").partition("\n")[0] for name, text in docs.items()}


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

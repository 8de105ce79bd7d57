"""What a position in the data belongs to, so that it is never applied to anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.data.config import TextData
from experiments.data.protocol import DataError
from experiments.data.tokens import TokenStore


@dataclasses.dataclass(frozen=True)
class Identity:
    """The settings and the content that decide every batch.

    Attributes:
      content: the hash of names and tokens.
      seed: of all random choices. Validation always uses 0, so that runs with different seeds are compared on
        the same batches.
    """

    content: str
    split: str
    mode: str
    seed: int
    batch_size: int
    length: int
    block_size: int | None
    repeat_tokens: int
    repeat_weight: float

    @classmethod
    def of(cls, config: TextData, split: str, store: TokenStore) -> Identity:
        return cls(
            content=store.sha256,
            split=split,
            mode=config.mode,
            seed=config.seed if split == "train" else 0,
            batch_size=config.batch_size,
            length=config.length,
            block_size=config.block_size if config.mode == "stream" else None,
            repeat_tokens=config.repeat_tokens,
            repeat_weight=config.repeat_weight,
        )

    def fields(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return dataclasses.asdict(self)

    def check(self, state: Any) -> None:
        """Checks that a saved position was taken with the same data and settings.

        Raises:
          DataError: it was not; the message names the first difference.
        """
        saved = state.get("data") if isinstance(state, dict) else None
        if not isinstance(saved, dict):
            raise DataError("this is no position in text data; restore a checkpoint that was saved with the same data")
        for name, value in self.fields().items():
            if saved.get(name) != value:
                what = f"{name}={saved.get(name)!r}, which is now {value!r}"
                if name == "content":
                    what = "another text or tokenizer"
                raise DataError(
                    f"the data position was saved with {what}: go back to the settings and the text of that run, or "
                    "start anew, with --fresh or another --work-dir"
                )

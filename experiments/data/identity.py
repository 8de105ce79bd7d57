"""What a position in the data belongs to, so that it is never applied to anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.data.config import TextData
from experiments.data.protocol import DataError
from experiments.data.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Identity:
    """The settings and the content that decide every batch.

    Attributes:
      content: the hash of names and tokens.
      validation: the same of the validation split, so that the losses of one run are all measured on one text; None
        if the source has none.
      seed: of all random choices. Validation always uses 0, so that runs with different seeds are compared on
        the same batches.
    """

    content: str
    validation: str | None
    split: str
    mode: str
    seed: int
    batch_size: int
    length: int
    block_size: int | None
    repeat_tokens: int
    repeat_weight: float

    @classmethod
    def of(cls, config: TextData, split: str, tokens: Tokens) -> Identity:
        return cls(
            content=tokens.sha256[split],
            validation=tokens.sha256.get("validation"),
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
        # A position that was saved before the validation text was part of it goes with any.
        for name, value in self.fields().items():
            before = saved.get(name, value if name == "validation" else None)
            if before != value:
                what = f"{name}={before!r}, which is now {value!r}"
                if name in ("content", "validation"):
                    what = "another text or tokenizer" if name == "content" else "another validation text"
                raise DataError(
                    f"the data position was saved with {what}: go back to the settings and the text of that run, or "
                    "start anew, with --fresh or another --work-dir"
                )

"""What every source of batches promises to the trainer, and the error that all of them raise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
"""One step's rows.

`tokens` int32 [b, t], `targets` int32 [b, t] and `weights` float32 [b, t] (0: not in the loss) always;
`reset` bool [b, t/B] (the row starts a document at that block) and `padded` bool [b, t/B] (the block ends in
padding) from data whose rows carry a state from step to step.
"""


class DataError(ValueError):
    """Data that cannot be used as it is. The message names the thing and says what to do."""


@runtime_checkable
class Batches(Protocol):
    """An endless iterator whose next batch is a pure function of its config and its state.

    Every process draws the same batches, all rows of them.
    A curriculum has one more method, `observe(metrics)`, called after every step with that step's metrics.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch drawn, as JSON-able values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state` was taken.

        Raises:
          DataError: `state` belongs to other data or to another config.
        """
        ...

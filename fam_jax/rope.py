"""Frequencies of the rotary positions: plain, stretched for longer texts, and other ones in local layers."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from fam_jax.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies were lowered to make a model read longer texts than it was first trained on.

    Attributes:
        kind: "linear" divides all by `factor`. "llama3" divides those whose wavelength is above `original / low`
            tokens, keeps those below `original / high`, and goes smoothly from one to the other between.
        factor: Above 0.
        low: "llama3" only: wavelengths in the original length, below which none is kept as it is.
        high: "llama3" only, above `low`.
        original: "llama3" only: tokens of the texts of the first training.
    """

    kind: str = "linear"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"RopeScaling.kind={self.kind!r} is not known; allowed: 'linear', 'llama3'")
        for field in ("factor", "low", "high", "original"):
            value = getattr(self, field)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
            if not good:
                raise ValueError(f"RopeScaling.{field}={value!r} is not allowed; it must be a number above 0")
        if self.high <= self.low:
            raise ValueError(f"RopeScaling.high={self.high!r} is not allowed; it must be above low={self.low!r}")

    def apply(self, frequencies: np.ndarray) -> np.ndarray:
        """Scaled frequencies [k/2], in radians per token."""
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * np.pi)  # in a text of the original length
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def frequencies(config: "DecoderConfig", local: Array | None) -> Array:
    """Radians per token of each pair of channels, base^(-2i/k) unless scaled: [k/2].

    Args:
        config: The decoder's.
        local: The layer is a local one, bool []; None if the model has none.
    """
    exponents = -np.arange(config.head_dim // 2) / (config.head_dim // 2)
    everywhere = config.rope_base**exponents
    if config.rope_scaling is not None:
        everywhere = config.rope_scaling.apply(everywhere)
    if local is None or config.local_rope_base is None:
        return jnp.asarray(everywhere)
    return jnp.where(local, config.local_rope_base**exponents, everywhere)

"""Checks of config fields: a wrong one is a `ValueError` that names the field, the value and what is allowed."""

from typing import Any

import numpy as np


def check_choice(owner: str, field: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}.{field}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def check_int(owner: str, field: str, value: Any, minimum: int) -> None:
    """Raises a ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise ValueError(f"{owner}.{field}={value!r} is not allowed; it must be an integer of at least {minimum}")


def check_bool(owner: str, field: str, value: Any) -> None:
    """Raises a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}.{field}={value!r} is not allowed; it must be True or False")


def check_real(owner: str, field: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises a ValueError unless `low <= value <= high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == float("inf"):
        limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{owner}.{field}={value!r} is not allowed; it must be a finite number {limit}")

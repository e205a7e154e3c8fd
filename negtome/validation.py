"""Checks of numbers that a user gives, each with one line that says what was expected."""

import math
import sys
from typing import Any

#: No float is larger; whole numbers may be, which `math.isfinite` would not take.
_LARGEST = sys.float_info.max


def to_python_scalar(value: Any) -> Any:
    """Return a number of NumPy's or of a tensor as Python's, and anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def check_float(name: str, value: object, low: float, high: float) -> float:
    """Return a finite number in [low, high] as a float, so that 1 and 1.0 are one setting, or refuse it.

    Raises:
        ValueError: it is no number, not finite, or out of range.
    """
    value = to_python_scalar(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value}.")
    return float(value)


def check_int(name: str, value: object, low: int, high: float = math.inf, advice: str = "") -> int:
    """Return a whole number in [low, high], or refuse it.

    Args:
        name: of the setting, for the message.
        value: to check; 6.0 and True are no whole numbers.
        low: least value.
        high: largest value.
        advice: what the message ends with, such as "; make more by further runs".

    Raises:
        ValueError: it is no whole number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {limits}, got {value!r}{advice}")
    return value

"""Check numbers from users; each error is one line that says what was expected. Print texts of others as one line."""

import math
import sys
from typing import Any

#: The largest float. `math.isfinite` raises for larger integers.
_LARGEST = sys.float_info.max


def one_line(text: str) -> str:
    """Return a text, which may come from somebody's file, as one line with ? for control characters."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def to_python_scalar(value: Any) -> Any:
    """Return a NumPy or tensor scalar as a Python number, and anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value


def check_float(name: str, value: object, low: float, high: float) -> float:
    """Return a finite number in [low, high] as a float, so that 1 and 1.0 are one setting.

    Raises:
        ValueError: the value is no number, not finite, or out of range.
    """
    value = to_python_scalar(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {limits}, got {value}.")
    return float(value)


def read_step_range(text: str) -> tuple[int, int] | tuple[float, float]:
    """Read FIRST:LAST: two steps, such as 0:2, or two shares if one is a fraction, such as 0:0.25.

    Raises:
        ValueError: the text is something else; `NegToMeConfig` checks the range.
    """
    try:
        first, last = text.split(":")
        if "." in text or "e" in text.lower():
            return float(first), float(last)
        return int(first), int(last)
    except ValueError as error:
        raise ValueError(f"must be FIRST:LAST, such as 0:0 for the first step or 0:0.25, got {text!r}") from error


def check_int(name: str, value: object, low: int, high: float = math.inf, advice: str = "") -> int:
    """Return an integer in [low, high].

    Args:
        name: of the setting, for the message.
        value: to check; 6.0 and True are refused.
        low, high: bounds, inclusive.
        advice: end of the message, such as "; make more by further runs".

    Raises:
        ValueError: the value is no integer, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {limits}, got {value!r}{advice}")
    return value

"""One sentence for a number that is not allowed."""

from numbers import Real
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a real number, numpy's too."""
    return isinstance(value, Real)


def check_int(name: str, value, low: int, high: float, wanted: str) -> None:
    """Raise ValueError, "<name> is <value>; <wanted>", unless ``value`` is an int (no bool) in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; {wanted}")

"""Numbers of command lines, for argparse, which names the function's `__name__` where a text is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(kind: type[Number], most: float = math.inf) -> Callable[[str], Number]:
    """Reads a finite int or float above zero and up to `most`."""

    def number(text: str) -> Number:
        value = kind(text)
        if not 0 < value <= most or value == math.inf:
            raise ValueError
        return value

    number.__name__ = f"positive {'whole number' if kind is int else 'number'}"
    return number


def not_negative(text: str) -> float:
    """Reads a finite float of zero or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


not_negative.__name__ = "number of 0 or more"

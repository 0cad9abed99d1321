"""Which rate points to encode a photo at. Pure; a budget of bytes relies on sizes that grow with the rate point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Generic, TypeVar

from service.codec.config import RATE_POINTS

DEFAULT_RATE = 4
"""The rate point of a request that states neither a rate nor a budget, and the first that is tried for a budget."""

MOST_BPP = 64.0
"""The largest budget in bits per pixel; no photo takes that many."""

Stream = TypeVar("Stream")

_GROWTH = 0.30
"""Of the logarithm of a photo's bytes from one rate point to the next, on Kodak."""


class UnmeetableBudget(ValueError):
    """Not even the smallest rate point fits."""


def next_rate(sizes: Mapping[int, int], budget: int) -> int | None:
    """The rate point to encode next, given the bytes of those encoded so far; None when nothing is left to learn.

    Each try is where the sizes so far, their logarithm a line over the rate point, put the last one that fits. It ends
    with one that fits next to one that does not, mostly after three encodings.
    """
    if not sizes:
        return DEFAULT_RATE
    low = max((rate for rate, size in sizes.items() if size <= budget), default=0)
    high = min((rate for rate, size in sizes.items() if size > budget and rate > low), default=RATE_POINTS + 1)
    if high - low == 1:
        return None
    wanted = math.log(max(1, budget))
    near = sorted(sizes, key=lambda rate: abs(math.log(sizes[rate]) - wanted))[:2]
    growth = _GROWTH
    if len(near) == 2:
        growth = max(0.01, math.log(sizes[near[0]] / sizes[near[1]]) / (near[0] - near[1]))
    guess = near[0] + (wanted - math.log(sizes[near[0]])) / growth
    return math.floor(min(max(guess, low + 1), high - 1))


def best_rate(sizes: Mapping[int, int], budget: int) -> int:
    """The highest rate point that fits.

    Raises:
        UnmeetableBudget: none does; the message has the smallest size.
    """
    fitting = [rate for rate, size in sizes.items() if size <= budget]
    if not fitting:
        smallest = min(sizes.values())
        raise UnmeetableBudget(f"expected a budget of at least {smallest} bytes for this photo, got {budget}")
    return max(fitting)


def budget_bytes(max_bytes: int | None, target_bpp: float | None, pixels: int) -> int | None:
    """A budget in bytes from one in bytes or in bits per pixel; None where there is neither."""
    return int(target_bpp * pixels / 8) if target_bpp is not None else max_bytes


class RateSearch(Generic[Stream]):
    """The rate points of one photo: the one that is asked for, or those that lead to the best within a budget.

    Args:
        rate: None for the default one, or where there is a budget.
        budget: bytes, or None.
    """

    def __init__(self, rate: int | None, budget: int | None) -> None:
        self._rate, self._budget = rate or DEFAULT_RATE, budget
        self._streams: dict[int, Stream] = {}
        self._sizes: dict[int, int] = {}

    @property
    def begun(self) -> bool:
        return bool(self._streams)

    @property
    def wanted(self) -> int | None:
        """The rate point to encode next; None once `best` is known."""
        if self._budget is None:
            return None if self._streams else self._rate
        return next_rate(self._sizes, self._budget)

    def add(self, rate: int, stream: Stream, size: int) -> None:
        """Tell what came of it, and its bytes."""
        self._streams[rate], self._sizes[rate] = stream, size

    def best(self) -> Stream:
        """Raises:
        UnmeetableBudget: even rate point 1 does not fit.
        """
        return self._streams[self._rate if self._budget is None else best_rate(self._sizes, self._budget)]

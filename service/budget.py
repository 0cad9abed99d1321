"""Which rate point to try next for a budget of bytes. Pure; relies on sizes that grow with the rate point."""

from __future__ import annotations

import math
from collections.abc import Mapping

from service.codec.config import RATE_POINTS

DEFAULT_RATE = 4
"""The rate point of a request that states neither a rate nor a budget, and the first that is tried for a budget."""

MOST_BPP = 64.0
"""The largest budget in bits per pixel; no photo takes that many."""

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

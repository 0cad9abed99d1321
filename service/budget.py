"""Which rate points to try for a budget of bytes. Pure; relies on sizes that grow with the rate point."""

from __future__ import annotations

from collections.abc import Mapping

from service.codec.config import RATE_POINTS

DEFAULT_RATE = 4
"""The rate point of a request that states neither a rate nor a budget."""


class UnmeetableBudget(ValueError):
    """Not even the smallest rate point fits."""


def rates_to_try(sizes: Mapping[int, int], budget: int) -> list[int]:
    """The rate points to encode next, given the bytes of those encoded so far; empty when nothing is left to learn.

    Every second rate point goes first, together; then the one above the best that fitted: two passes at most.
    """
    if not sizes:
        return list(range(2, RATE_POINTS + 1, 2))
    after = 1 + max((rate for rate, size in sizes.items() if size <= budget), default=0)
    return [] if after > RATE_POINTS or after in sizes else [after]


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

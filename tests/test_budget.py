"""`service.budget`: the best rate point is found, in few encodings, whatever the sizes."""

from __future__ import annotations

import random

import pytest

from service.budget import DEFAULT_RATE, RateSearch, UnmeetableBudget, best_rate, next_rate
from service.codec.config import RATE_POINTS


def searched(sizes: dict[int, int], budget: int) -> dict[int, int]:
    """The sizes of the rate points that a search encodes."""
    tried: dict[int, int] = {}
    while (rate := next_rate(tried, budget)) is not None:
        assert rate not in tried
        tried[rate] = sizes[rate]
    return tried


def photo_sizes(first: float, growths: list[float]) -> dict[int, int]:
    sizes = {1: round(first)}
    for rate, growth in enumerate(growths, 2):
        sizes[rate] = max(round(sizes[rate - 1] * growth), sizes[rate - 1])
    return sizes


def test_the_best_rate_point_is_found_after_about_three_encodings() -> None:
    draw, counts = random.Random(1), []
    for _ in range(2000):
        sizes = photo_sizes(draw.uniform(1e3, 1e5), [draw.uniform(1.2, 1.6) for _ in range(RATE_POINTS - 1)])
        budget = draw.randint(sizes[1], round(1.2 * sizes[RATE_POINTS]))
        tried = searched(sizes, budget)
        assert best_rate(tried, budget) == max(rate for rate, size in sizes.items() if size <= budget)
        counts.append(len(tried))
    assert max(counts) <= 5
    assert sum(counts) / len(counts) < 3.1


@pytest.mark.parametrize("growth", [1.0, 1.01, 9.0])
def test_odd_sizes_end_the_search_too(growth: float) -> None:
    sizes = photo_sizes(200, [growth] * (RATE_POINTS - 1))
    for budget in (*sizes.values(), 10**9):
        assert best_rate(searched(sizes, budget), budget) == max(r for r, size in sizes.items() if size <= budget)


@pytest.mark.parametrize("budget", [0, 1, 99])
def test_a_budget_below_the_smallest_size_is_refused_with_that_size(budget: int) -> None:
    tried = searched(photo_sizes(100, [1.4] * 7), budget)
    with pytest.raises(UnmeetableBudget, match="at least 100 bytes"):
        best_rate(tried, budget)


@pytest.mark.parametrize(
    ("rate", "budget", "best"), [(None, None, DEFAULT_RATE), (7, None, 7), (None, 350, 3), (None, 100, 1)]
)
def test_a_search_ends_with_what_was_asked_for(rate: int | None, budget: int | None, best: int) -> None:
    search = RateSearch[str](rate, budget)
    begun = search.begun
    while wanted := search.wanted:
        search.add(wanted, f"stream {wanted}", 100 * wanted)
    assert (begun, search.begun) == (False, True)
    assert search.best() == f"stream {best}"


def test_a_search_in_vain_names_the_smallest_size() -> None:
    search = RateSearch[str](None, 99)
    while wanted := search.wanted:
        search.add(wanted, "stream", 100 * wanted)
    with pytest.raises(UnmeetableBudget, match="at least 100 bytes"):
        search.best()

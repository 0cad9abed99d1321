"""A bounded, seeded share of `tests/bench/fuzz.py`."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.bench import fuzz


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["bitstreams", "images"])
def test_mutations_get_4xx_or_a_valid_answer_quickly(client: TestClient, kind: str) -> None:
    make = fuzz.bitstreams(client) if kind == "bitstreams" else fuzz.images()
    seen = fuzz.run(500, 42, make, client)
    assert seen.bad == []
    assert seen.slowest_s < 2
    assert seen.rss_after - seen.rss_before < 60e6
    assert len(seen.statuses) >= 2

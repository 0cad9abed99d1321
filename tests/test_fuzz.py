"""A bounded, seeded share of `tests/bench/fuzz.py`, and every call of the served OpenAPI under Schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from service.app import create_app
from service.openapi import TIMEOUT_HEADER
from tests.bench import fuzz
from tests.served import served

schema = schemathesis.openapi.from_dict(create_app().openapi())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(max_pixels=1_000_000, max_body_bytes=2**20) as (base, _):
        yield base


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_call_keeps_its_openapi_promises(case: schemathesis.Case[Any], server: str) -> None:
    """All checks but one: random bytes fit the schema's `binary` and still are no photo.

    A deadline that is none is left as it is; a good one becomes one that can be met.
    """
    with suppress(ValueError):
        if float(str(case.headers.get(TIMEOUT_HEADER))) > 0:
            case.headers[TIMEOUT_HEADER] = "30"
    case.call_and_validate(base_url=server, excluded_checks=[positive_data_acceptance])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["bitstreams", "images"])
def test_mutations_get_4xx_or_a_valid_answer_quickly(client: TestClient, kind: str) -> None:
    make = fuzz.bitstreams(client) if kind == "bitstreams" else fuzz.images()
    seen = fuzz.run(500, 42, make, client)
    assert seen.bad == []
    assert seen.slowest_s < 2
    assert seen.rss_after - seen.rss_before < 60e6
    assert len(seen.statuses) >= 2

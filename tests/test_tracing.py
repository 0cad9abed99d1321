"""`service.tracing`: a trace per request that continues the caller's and holds its stages."""

from __future__ import annotations

from itertools import pairwise

import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, get_current_span
from starlette.testclient import TestClient

from service.app import create_app
from service.engine import Photo
from service.exchange import STAGES
from service.settings import Settings
from service.tracing import set_up_tracing
from tests.conftest import image_bytes, until, wait_ready


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans leave at once, not every five seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


def test_stages_are_children_of_the_request_in_the_callers_trace() -> None:
    app, exporter = FastAPI(), InMemorySpanExporter()
    stage_span = set_up_tracing(app, "http://127.0.0.1:9/unused", exporter)

    @app.post("/compress")
    async def compress() -> str:
        stage_span("transform", 0.25, 0.5)
        return format(get_current_span().get_span_context().trace_id, "032x")

    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with TestClient(app) as client:
        answer = client.post("/compress", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    assert answer.json() == trace
    until(lambda: any(span.name == "POST /compress" for span in exporter.get_finished_spans()))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    stage, request = spans["transform"], spans["POST /compress"]
    assert format(stage.context.trace_id, "032x") == trace
    assert stage.parent is not None
    assert stage.parent.span_id == request.context.span_id
    assert stage.end_time is not None
    assert stage.start_time is not None
    assert abs((stage.end_time - stage.start_time) / 1e9 - 0.25) < 0.001


def test_a_compress_is_one_span_and_one_per_stage_in_order(monkeypatch: pytest.MonkeyPatch, bikes: Photo) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("service.app.set_up_tracing", lambda app, url: set_up_tracing(app, url, exporter))
    settings = Settings(otlp_endpoint="http://metrics.example/v1/traces")
    upload = image_bytes(bikes)
    with TestClient(create_app(settings), base_url="http://readyz.metrics.example") as client:
        wait_ready(client)
        chunks = iter([upload[start : start + 1000] for start in range(0, len(upload), 1000)])
        assert client.post("/compress", content=chunks).status_code == 200
    until(lambda: any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()))
    *stages, request = sorted(exporter.get_finished_spans(), key=lambda span: span.end_time or 0)
    assert [span.name for span in stages] == list(STAGES["compress"])
    assert request.name == "POST /compress"
    assert all((a.end_time or 0) <= (b.start_time or 0) + 1_000_000 for a, b in pairwise(stages))

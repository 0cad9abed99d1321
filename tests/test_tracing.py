"""`service.tracing`: a trace per request that continues the caller's and holds its stages."""

from __future__ import annotations

import time

from fastapi import FastAPI
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import get_current_span
from starlette.testclient import TestClient

from service.tracing import set_up_tracing


def test_stages_are_children_of_the_request_in_the_callers_trace() -> None:
    app, exporter = FastAPI(), InMemorySpanExporter()
    stage_span = set_up_tracing(app, "http://127.0.0.1:9/unused", exporter)

    @app.post("/compress")
    async def compress() -> str:
        stage_span("transform", 0.25)
        return format(get_current_span().get_span_context().trace_id, "032x")

    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with TestClient(app) as client:
        answer = client.post("/compress", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    assert answer.json() == trace
    deadline = time.monotonic() + 15
    while not (spans := {span.name: span for span in exporter.get_finished_spans()}).get("POST /compress"):
        assert time.monotonic() < deadline, spans
        time.sleep(0.2)
    stage, request = spans["transform"], spans["POST /compress"]
    assert format(stage.context.trace_id, "032x") == trace
    assert stage.parent is not None
    assert stage.parent.span_id == request.context.span_id
    assert stage.end_time is not None
    assert stage.start_time is not None
    assert abs((stage.end_time - stage.start_time) / 1e9 - 0.25) < 0.001

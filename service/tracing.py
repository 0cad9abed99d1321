"""Optional OpenTelemetry traces (extra `limpid[otel]`): a span per request and one per stage, sent over OTLP/HTTP.

Without `LIMPID_OTLP_ENDPOINT` nothing of OpenTelemetry is imported. The caller's `traceparent` is continued.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI

from service import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

StageSpan = Callable[[str, float, float], None]
"""Records a stage as a child of the request's span: its name, its seconds, and how many seconds ago it ended."""


_PATIENCE_S = 2
"""With a collector that does not answer, which would else delay the end of the process by ten seconds."""


def no_span(stage: str, seconds: float, ago: float) -> None:
    """Tracing is off."""


def set_up_tracing(app: FastAPI, endpoint: str, exporter: SpanExporter | None = None) -> StageSpan:
    """Trace every request of `app`.

    Args:
        endpoint: of an OTLP collector, for example http://collector:4318/v1/traces.
        exporter: takes the spans instead of the collector; for tests.

    Raises:
        ValueError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(f"LIMPID_OTLP_ENDPOINT needs the extra limpid[otel]: {error}") from error
    provider = TracerProvider(resource=Resource({"service.name": "limpid", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint, timeout=_PATIENCE_S)))
    app.add_middleware(
        OpenTelemetryMiddleware,
        tracer_provider=provider,
        excluded_urls="/(livez|readyz|metrics)$",
        exclude_spans=["receive", "send"],  # of which an upload has one per piece
    )
    atexit.register(provider.shutdown)  # sends what is left
    tracer = provider.get_tracer("limpid", __version__)

    def record(stage: str, seconds: float, ago: float) -> None:
        ended = time.time_ns() - int(1e9 * ago)
        tracer.start_span(stage, start_time=ended - int(1e9 * seconds)).end(ended)

    return record

"""What the two calls share: the body of a request, the choice of an answer's format, the times of its stages."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from service.engine import StageTimes
from service.errors import EMPTY, MALFORMED, NOT_ACCEPTABLE, Problem
from service.imaging import OutputFormat
from service.metrics import Metrics

T = TypeVar("T")

BODY_FIELD = "file"


def body_schema(media_type: str, what: str) -> dict[str, object]:
    """The OpenAPI request body of a call that takes `what` raw or as the multipart field `file`."""
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": [BODY_FIELD], "properties": {BODY_FIELD: binary}}
    content = {"multipart/form-data": {"schema": form}, media_type: {"schema": binary}}
    return {"requestBody": {"required": True, "description": what, "content": content}}


async def read_body(request: Request) -> bytes:
    """The uploaded bytes: the multipart field `file`, or the raw body for any other content type.

    Raises:
        Problem: 400, no bytes or no such field. 413 comes from the middleware while the body streams.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=8) as form:
            upload = form.get(BODY_FIELD)
            if not isinstance(upload, UploadFile):
                raise Problem(MALFORMED, f"expected a multipart field {BODY_FIELD!r} with a file, got {sorted(form)}")
            data = await upload.read()
    else:
        data = await request.body()
    if not data:
        raise Problem(EMPTY, "expected a file in the body, got no bytes")
    return data


def choose_format(accept: str | None) -> OutputFormat:
    """The best format for an `Accept` header (RFC 9110, section 12.5.1); ties go to the order of `OutputFormat`.

    Raises:
        Problem: 406, none of ours is acceptable.
    """
    if not accept or not accept.strip():
        return OutputFormat.PNG
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        try:
            ranges[name] = min(1.0, max(0.0, float(weight)))
        except ValueError:
            raise Problem(MALFORMED, f"Accept: expected a weight from 0 to 1, got {weight!r}") from None

    def quality(output: OutputFormat) -> float:
        for name in (output.media_type, "image/*", "*/*"):
            if name in ranges:
                return ranges[name]
        return 0.0

    best = max(OutputFormat, key=quality)
    if quality(best) <= 0:
        offered = ", ".join(output.media_type for output in OutputFormat)
        raise Problem(NOT_ACCEPTABLE, f"Accept: expected one of {offered}, got {accept!r}")
    return best


class Stopwatch:
    """Times of one request's stages: for the histograms and for the `Server-Timing` header (W3C)."""

    def __init__(self, operation: str, metrics: Metrics) -> None:
        self._operation, self._metrics = operation, metrics
        self._seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        self._metrics.stage_seconds.labels(self._operation, stage).observe(seconds)

    def add_engine(self, queued: float, times: StageTimes) -> None:
        self.add("queue", queued)
        self.add("transform", times.transform)
        self.add("entropy", times.entropy)

    async def in_thread(self, stage: str, work: Callable[[], T]) -> T:
        """Run blocking `work` in the thread pool and time it."""
        started = time.perf_counter()
        pending: Awaitable[T] = run_in_threadpool(work)
        result = await pending
        self.add(stage, time.perf_counter() - started)
        return result

    def header(self) -> str:
        return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in self._seconds.items())

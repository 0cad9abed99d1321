"""Problems as clients see them: RFC 9457 `application/problem+json`, and the one table from exceptions to problems.

A `type` is stable, a `detail` says what was expected and what came, where that helps. Unknown exceptions become a 500
that says nothing of the inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.batching import DeviceBroken, QueueFull
from service.budget import UnmeetableBudget
from service.codec.bitstream import BitstreamError, NotABitstream, UnsupportedVersion
from service.engine import UnknownModel
from service.imaging import CorruptImage, NotAnImage, TooManyPixels

PROBLEM_MEDIA_TYPE = "application/problem+json"

CLIENT_GONE = 499
"""The status that a request is counted under when its client closed it, as nginx does."""


@dataclass(frozen=True)
class Kind:
    """A kind of problem: the last part of its `type`, the status, and a title."""

    slug: str
    status: int
    title: str


MALFORMED = Kind("malformed-request", 400, "Malformed request")
EMPTY = Kind("empty-body", 400, "Empty body")
BAD_KEY = Kind("invalid-api-key", 401, "API key missing or wrong")
NOT_FOUND = Kind("not-found", 404, "Not found")
METHOD = Kind("method-not-allowed", 405, "Method not allowed")
NOT_ACCEPTABLE = Kind("not-acceptable", 406, "No acceptable format")
BODY_TIMEOUT = Kind("body-timeout", 408, "Body too slow")
TOO_LARGE = Kind("body-too-large", 413, "Body too large")
NOT_AN_IMAGE = Kind("not-an-image", 415, "Not an image")
NOT_A_BITSTREAM = Kind("not-a-bitstream", 415, "Not a Limpid bitstream")
CORRUPT_IMAGE = Kind("corrupt-image", 422, "Corrupt image")
CORRUPT_BITSTREAM = Kind("corrupt-bitstream", 422, "Corrupt bitstream")
UNSUPPORTED_VERSION = Kind("unsupported-version", 422, "Unsupported bitstream version")
UNKNOWN_MODEL = Kind("unknown-model", 422, "Unknown model")
TOO_MANY_PIXELS = Kind("too-many-pixels", 422, "Too many pixels")
BUDGET = Kind("unmeetable-budget", 422, "Budget cannot be met")
QUEUE_FULL = Kind("queue-full", 429, "Too many requests")
NOT_READY = Kind("not-ready", 503, "Not ready")
DRAINING = Kind("draining", 503, "Shutting down")
OUT_OF_MEMORY = Kind("out-of-memory", 503, "Out of memory")
DEADLINE = Kind("deadline-exceeded", 504, "Deadline exceeded")
INTERNAL = Kind("internal-error", 500, "Internal error")

LOGGED = (INTERNAL, OUT_OF_MEMORY)
"""The service's own failures, of which its log tells the cause."""

KINDS = tuple(value for value in list(globals().values()) if isinstance(value, Kind))

EXCHANGE = (MALFORMED, EMPTY, BAD_KEY, BODY_TIMEOUT, TOO_LARGE, UNKNOWN_MODEL, TOO_MANY_PIXELS, QUEUE_FULL,
            NOT_READY, DRAINING, OUT_OF_MEMORY, DEADLINE)  # fmt: skip
"""What both calls may answer with."""

_TABLE: tuple[tuple[type[Exception], Kind], ...] = (  # the first match counts, so subclasses come first
    (UnmeetableBudget, BUDGET),
    (UnknownModel, UNKNOWN_MODEL),
    (NotABitstream, NOT_A_BITSTREAM),
    (UnsupportedVersion, UNSUPPORTED_VERSION),
    (BitstreamError, CORRUPT_BITSTREAM),
    (NotAnImage, NOT_AN_IMAGE),
    (TooManyPixels, TOO_MANY_PIXELS),
    (CorruptImage, CORRUPT_IMAGE),
    (QueueFull, QUEUE_FULL),
    (DeviceBroken, NOT_READY),
    (torch.OutOfMemoryError, OUT_OF_MEMORY),
    (MemoryError, OUT_OF_MEMORY),
)
_STATUSES = {404: NOT_FOUND, 405: METHOD}


class ProblemBody(BaseModel):
    """RFC 9457: what every problem's body holds. `type` is stable; `request_id` is also in `X-Request-ID`."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


_SENT_WITH: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}}},
    429: {"Retry-After": {"description": "Seconds until another try may succeed.", "schema": {"type": "integer"}}},
    503: {"Retry-After": {"description": "Seconds, unless memory was short.", "schema": {"type": "integer"}}},
}
"""Headers of problems, as OpenAPI tells them."""


def documented(*kinds: Kind) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of a call for the kinds of problems it may answer with."""
    by_status: dict[int, list[Kind]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    return {
        status: {
            "description": "; ".join(kind.title for kind in listed) + ".",
            "content": {PROBLEM_MEDIA_TYPE: {"schema": ProblemBody.model_json_schema()}},
            "headers": _SENT_WITH.get(status, {}),
        }
        for status, listed in by_status.items()
    }


class Problem(Exception):
    """Raised where a request is found to be wrong and no exception of the layers below says so."""

    def __init__(self, kind: Kind, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.headers = kind, detail, headers or {}


def problem_of(error: Exception) -> Problem:
    """The problem that a client is told for an exception."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        parts = [f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in error.errors()]
        return Problem(MALFORMED, "; ".join(parts))
    if isinstance(error, HTTPException):
        kind = _STATUSES.get(error.status_code, MALFORMED if error.status_code < 500 else INTERNAL)
        allowed = dict(error.headers or {})
        if allowed.get("Allow") == "GET":
            allowed["Allow"] = "GET, HEAD"
        return Problem(kind, str(error.detail), allowed)
    for known, kind in _TABLE:
        if isinstance(error, known):
            headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull) else None
            return Problem(kind, str(error) or kind.title, headers)
    return Problem(INTERNAL, "the service failed in a way that it did not foresee; its log knows more")


def problem_response(problem: Problem, request: Request) -> JSONResponse:
    """The answer for a problem, with the request's id in its body; `request.state.problem` keeps its kind."""
    request.state.problem = problem.kind
    body = ProblemBody(
        type=f"urn:limpid:problem:{problem.kind.slug}",
        title=problem.kind.title,
        status=problem.kind.status,
        detail=problem.detail,
        request_id=getattr(request.state, "request_id", ""),
    )
    return JSONResponse(body.model_dump(), problem.kind.status, problem.headers, media_type=PROBLEM_MEDIA_TYPE)

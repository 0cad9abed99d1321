"""What OpenAPI, and so `/docs`, tells of the calls besides what FastAPI reads from their functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer

from service.codec.config import RATE_POINTS

BINARY: dict[str, object] = {"type": "string", "format": "binary"}
BODY_FIELD, TIMEOUT_HEADER = "file", "Limpid-Timeout"

KEYS = (
    Security(HTTPBearer(auto_error=False)),
    Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
)
"""Either of them, for the routes of a service that has keys; `service.exchange` checks what comes."""


def _header(kind: str, description: str, **limits: object) -> dict[str, object]:
    return {"required": True, "description": description, "schema": {"type": kind, **limits}}


HEADERS: Mapping[str, dict[str, object]] = {
    "Limpid-Rate": _header("integer", "Rate point.", minimum=1, maximum=RATE_POINTS),
    "Limpid-Model": _header("string", "The model that wrote the bitstream."),
    "Limpid-Degradation": _header(
        "string", "What was wrong with the photo, and how badly from 0 to 1: `noise;0.82, haze;0.31`; or `unknown`."
    ),
    "Server-Timing": _header("string", "Milliseconds per stage."),
    "X-Request-ID": _header("string", "Of the request, or a new one; also in the log.", pattern="^[\\w.-]{1,64}$"),
}
BPP_HEADER = {"Limpid-Bpp": _header("number", "Bits per pixel: 8 times the bytes, over width times height.")}


def body_schema(media_type: str, what: str) -> dict[str, Any]:
    """The OpenAPI request of a call that takes `what` raw or as the multipart field `file`, and a deadline."""
    form = {"type": "object", "required": [BODY_FIELD], "properties": {BODY_FIELD: BINARY}}
    content = {"multipart/form-data": {"schema": form}, media_type: {"schema": BINARY}}
    timeout = {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "required": False,
        "description": "Seconds after which the answer is of no use; can only shorten the service's own limit.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    return {"requestBody": {"required": True, "description": what, "content": content}, "parameters": [timeout]}

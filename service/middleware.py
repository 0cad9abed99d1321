"""What wraps every request: its id, its body limit while the body streams, its log line, its metrics.

Plain ASGI, so that nothing is buffered here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import ExitStack

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import CLIENT_GONE, DRAINING, LOGGED, QUEUE_FULL, TOO_LARGE, Problem, problem_of, problem_response
from service.metrics import Metrics

log = logging.getLogger("limpid")

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
PIECE = 2**16
"""Bytes of an answer that are handed to the server at a time: beyond so many it waits for the client."""

SLOWEST = 2**15
"""Bytes per second at which a client has to take its answer, `body_timeout_s` besides."""

OPERATIONS = {"/compress": "compress", "/decompress": "decompress"}


def as_routed(scope: Scope) -> Scope:
    """The request as routes see it: HEAD is GET, and a range that is not one of bytes, or of HEAD, is ignored.

    RFC 9110, sections 9.3.2 and 14.2.
    """
    ranged = scope["method"] == "GET" and dict(scope["headers"]).get(b"range", b"").startswith(b"bytes=")
    unknown = () if ranged else (b"range", b"if-range")
    headers = [(name, value) for name, value in scope["headers"] if name not in unknown]
    return {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"], "headers": headers}


class RequestMiddleware:
    """Gives each request an id, cuts bodies at `max_body_bytes`, counts and logs what was answered.

    The id is the client's `X-Request-ID` where that is at most 64 letters, digits, dots, dashes and underscores. HEAD
    is answered as GET without the body (RFC 9110, section 9.3.2). An answer goes out as fast as its client takes it,
    in pieces of `PIECE` bytes; a client that takes longer than `body_timeout_s` and `SLOWEST` allow is cut off.
    `request.state.until_sent` ends what a request holds until then.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int, body_timeout_s: float) -> None:
        self.app, self.metrics = app, metrics
        self.max_body_bytes, self.body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        request.state.request_id = request_id
        request.state.until_sent = until_sent = ExitStack()
        operation = OPERATIONS.get(scope["path"], "other")
        head_only = scope["method"] == "HEAD"
        started = begun = time.perf_counter()
        received, answered, status, stalled = 0, 0, 0, False

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise Problem(TOO_LARGE, f"expected at most {self.max_body_bytes} bytes of body")
            return message

        async def counted_send(message: Message) -> None:
            nonlocal answered, begun, status
            if message["type"] == "http.response.start":
                status, begun = message["status"], time.perf_counter()
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                if not {name for name, _ in headers} & {b"cache-control", b"etag"}:  # the latter: files of the page
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
                await taken(message)
                return
            if head_only:
                message["body"] = b""
            body = message.get("body", b"")
            for start in range(0, max(1, len(body)), PIECE):
                piece, rest = body[start : start + PIECE], start + PIECE < len(body)
                await taken({**message, "body": piece, "more_body": True} if rest else {**message, "body": piece})
                answered += len(piece)

        async def taken(message: Message) -> None:
            nonlocal stalled, status
            patience = self.body_timeout_s + answered / SLOWEST
            try:
                async with asyncio.timeout(begun + patience - time.perf_counter()):
                    await send(message)
            except TimeoutError:
                stalled, status = True, CLIENT_GONE
                self.metrics.disconnects.labels("answer").inc()
                raise

        try:
            stated = request.headers.get("content-length", "")
            if stated.isdecimal() and int(stated) > self.max_body_bytes:
                problem = Problem(TOO_LARGE, f"expected at most {self.max_body_bytes} bytes of body, got {stated}")
                await problem_response(problem, request)(scope, receive, counted_send)
            else:
                await self.app(as_routed(scope), limited_receive, counted_send)
        except asyncio.CancelledError:  # by the server, whose grace after SIGTERM is over
            if status:
                raise
            problem = Problem(DRAINING, "the service stopped before it could answer")
            await problem_response(problem, request)(scope, receive, counted_send)
        except Exception as error:
            if stalled:  # without the rest of its answer the server closes the connection
                return
            problem = problem_of(error)
            if problem.kind in LOGGED:
                log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if status:  # too late for another answer
                raise
            await problem_response(problem, request)(scope, receive, counted_send)
        finally:
            until_sent.close()
            seconds = time.perf_counter() - started
            self.metrics.requests.labels(operation, str(status)).inc()
            if operation != "other":
                if status != QUEUE_FULL.status:  # else the more are refused, the faster it looks
                    self.metrics.request_seconds.labels(operation).observe(begun - started if status else seconds)
                self.metrics.request_bytes.labels(operation).observe(received)
                self.metrics.response_bytes.labels(operation).observe(answered)
                if refused := getattr(request.state, "problem", None):
                    self.metrics.rejected.labels(refused.slug).inc()
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "milliseconds": round(1000 * seconds, 1),
                "bytes_in": received,
                "bytes_out": answered,
            }
            log.info("request answered", extra={"fields": fields})

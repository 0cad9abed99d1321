"""What wraps every request: its id, its body limit while the body streams, its log line, its metrics.

Plain ASGI, so that nothing is buffered here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import DRAINING, INTERNAL, TOO_LARGE, Problem, problem_of, problem_response
from service.metrics import Metrics

log = logging.getLogger("limpid")

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
OPERATIONS = {"/compress": "compress", "/decompress": "decompress"}


class RequestMiddleware:
    """Gives each request an id, cuts bodies at `max_body_bytes`, counts and logs what was answered.

    The id is the client's `X-Request-ID` where that is at most 64 letters, digits, dots, dashes and underscores. HEAD
    is answered as GET without the body (RFC 9110, section 9.3.2).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        request.state.request_id = request_id
        operation = OPERATIONS.get(scope["path"], "other")
        head_only = scope["method"] == "HEAD"
        started, received, answered, status = time.perf_counter(), 0, 0, 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise Problem(TOO_LARGE, f"expected at most {self.max_body_bytes} bytes of body")
            return message

        async def counted_send(message: Message) -> None:
            nonlocal answered, status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                if not {name for name, _ in headers} & {b"cache-control", b"etag"}:  # the latter: files of the page
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
            elif head_only:
                message["body"] = b""
            answered += len(message.get("body", b""))
            await send(message)

        try:
            stated = request.headers.get("content-length", "")
            if stated.isdigit() and int(stated) > self.max_body_bytes:
                problem = Problem(TOO_LARGE, f"expected at most {self.max_body_bytes} bytes of body, got {stated}")
                await problem_response(problem, request)(scope, receive, counted_send)
            else:
                asked = {**scope, "method": "GET"} if head_only else scope
                await self.app(asked, limited_receive, counted_send)
        except asyncio.CancelledError:  # by the server, whose grace after SIGTERM is over
            if status:
                raise
            problem = Problem(DRAINING, "the service stopped before it could answer")
            await problem_response(problem, request)(scope, receive, counted_send)
        except Exception as error:
            problem = problem_of(error)
            if problem.kind is INTERNAL:
                log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if status:  # too late for another answer
                raise
            await problem_response(problem, request)(scope, receive, counted_send)
        finally:
            seconds = time.perf_counter() - started
            self.metrics.requests.labels(operation, str(status)).inc()
            if operation != "other":
                self.metrics.request_seconds.labels(operation).observe(seconds)
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

"""One request on its way: admission, deadline, body, the client's presence, and the time of every stage.

    async with exchange(request, service, "compress") as call:
        data = await call.body()
        photo = await call.in_thread("image_decode", ...)
        result = await call.submit(...)

Whatever ends a request early (deadline, hang-up) cancels what it waits for; the batcher drops it before launch.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.batching import DeadlineExceeded
from service.errors import BAD_KEY, BODY_TIMEOUT, DEADLINE, EMPTY, MALFORMED, QUEUE_FULL, Problem
from service.openapi import BODY_FIELD, TIMEOUT_HEADER
from service.settings import Settings
from service.state import Ready, Service, ServiceDependency, Work

T = TypeVar("T")

STAGES = {
    "compress": ("body", "image_decode", "queue", "transform", "entropy"),
    "decompress": ("body", "queue", "entropy", "transform", "image_encode"),
}
"""What the time of a request goes to, in order."""

PHASES = ("body", "image_decode", "queue", "image_encode", "answer")
"""What a request may be waiting for when its client hangs up; the last: for it to take its answer."""


MultiPartParser.spool_max_size = sys.maxsize
"""A form's file stays in memory, where it is counted; the folder for temporary files may be small."""


class ClientGone(Exception):
    """The client hung up; there is no one to answer."""


async def check_key(request: Request, service: ServiceDependency) -> None:
    """A dependency of routes, so that nothing else of a request is judged before.

    Raises:
        Problem: 401, keys are configured and the request shows none of them. Takes the same time for every wrong key.
    """
    if not (keys := service.settings.api_keys):
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    matches = [hmac.compare_digest(key.get_secret_value().encode(), given.encode()) for key in keys]
    if not any(matches):
        raise Problem(
            BAD_KEY, "expected a valid API key as Authorization: Bearer or X-API-Key", {"WWW-Authenticate": "Bearer"}
        )


def timeout_of(request: Request, settings: Settings) -> float:
    """Seconds that the request may take: the service's limit, which the header `Limpid-Timeout` can only shorten.

    Raises:
        Problem: 400, the header is not a positive number of seconds.
    """
    stated = request.headers.get(TIMEOUT_HEADER)
    if stated is None:
        return settings.request_timeout_s
    try:
        seconds = float(stated)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise Problem(MALFORMED, f"{TIMEOUT_HEADER}: expected a positive number of seconds, got {stated!r}")
    return min(seconds, settings.request_timeout_s)


class Exchange:
    """One admitted request; see the module. Made by `exchange` alone."""

    def __init__(self, request: Request, service: Service, ready: Ready, operation: str, deadline: float) -> None:
        self.request = Request(request.scope, self._receive)
        self.service, self.ready, self.operation, self.deadline = service, ready, operation, deadline
        self.expected = 0
        self.phase = "body"
        self.gone = False
        self._seconds: dict[str, float] = {}
        self._task = asyncio.current_task()
        self.watcher: asyncio.Task[None] | None = None
        self._arrives, self._arrived = request.receive, 0
        self.unfinished: Future[Any] | None = None

    def expect(self, more: int) -> None:
        """Count bytes of the body among those in progress.

        Raises:
            Problem: 429, with the bodies of others they are more than may be.
        """
        service = self.service
        others = service.body_bytes - self.expected
        if others and service.body_bytes + more > service.settings.max_queue_bytes:
            raise self.refusal(f"bodies of {service.body_bytes} bytes are in progress")
        service.body_bytes += more
        self.expected += more

    def hold(self, answer: bytes) -> None:
        """Count the answer among the bytes in progress until its client has taken it."""
        self.service.body_bytes += len(answer)
        self.request.state.until_sent.callback(self._let_go, len(answer))

    def _let_go(self, sent: int) -> None:
        self.service.body_bytes -= sent

    def refusal(self, full: str) -> Problem:
        """The 429 that says what there is enough of."""
        seconds = self.ready.batcher.retry_after()
        return Problem(QUEUE_FULL, f"{full}, the most that may", {"Retry-After": str(seconds)})

    async def _receive(self) -> Message:
        message = await self._arrives()
        self._arrived += len(message.get("body", b""))
        if self._arrived > self.expected:  # of a chunked body, which announces no length
            self.expect(self._arrived - self.expected)
        return message

    async def body(self) -> bytes:
        """The uploaded bytes: the multipart field `file`, or the raw body for any other content type.

        Raises:
            Problem: 400, no bytes or no such field; 408, it came too slowly. 413 comes from the middleware.
        """
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.service.settings.body_timeout_s) as limit:
                data = await self._read()
        except TimeoutError:
            if limit.expired():
                seconds = self.service.settings.body_timeout_s
                raise Problem(
                    BODY_TIMEOUT, f"expected the body within {seconds:g} seconds", {"Connection": "close"}
                ) from None
            raise
        self._add("body", time.perf_counter() - started)
        if not data:
            raise Problem(EMPTY, "expected a file in the body, got no bytes")
        self.watcher = asyncio.create_task(self._watch())
        return data

    async def _read(self) -> bytes:
        if not self.request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await self.request.body()
        try:
            async with self.request.form(max_files=1, max_fields=8) as form:
                upload = form.get(BODY_FIELD)
                if not isinstance(upload, UploadFile):
                    got = sorted(form)
                    raise Problem(MALFORMED, f"expected a multipart field {BODY_FIELD!r} with a file, got {got}")
                if others := sorted(form.keys() - {BODY_FIELD}):
                    raise Problem(
                        MALFORMED, f"expected the multipart field {BODY_FIELD!r} alone, got {others} too; "
                        "parameters go into the query, as in ?rate=4"
                    )  # fmt: skip
                return await upload.read()
        except UnicodeError as error:  # of a charset that cannot decode the names of the fields
            raise Problem(MALFORMED, f"the multipart form is not readable: {error}") from None

    async def _watch(self) -> None:
        """Cancel the request when its client hangs up."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        if self._task:
            self._task.cancel()

    async def in_thread(self, stage: str, work: Callable[[], T]) -> T:
        """Run blocking `work` in an image thread and time it.

        Nobody can stop it once it has begun. So a request that ends before stays counted, with its bytes, until then.
        """
        self.phase = stage
        started = time.perf_counter()
        waiting = [work]
        future = self.ready.image_threads.submit(lambda: waiting.pop()())
        try:
            result = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with suppress(IndexError):
                waiting.pop()  # it has not begun, and holds the upload no longer
                raise
            self.unfinished = future
            raise
        self._add(stage, time.perf_counter() - started)
        return result

    async def submit(self, item: Work, key: Hashable, *, pixels: int, bytes: int, begun: bool = False) -> object:
        """Send one item through the batcher; returns what the engine made of it. `begun` as there."""
        self.phase = "queue"
        started = time.perf_counter()
        try:
            done = await self.ready.batcher.submit(
                item, key, pixels=pixels, bytes=bytes, deadline=self.deadline, begun=begun
            )
        except (asyncio.CancelledError, DeadlineExceeded):  # whatever of it the device has done is not known here
            self._add("queue", time.perf_counter() - started)
            raise
        value, times = done.result
        spent = {"queue": done.queued + times.queue, "transform": times.transform, "entropy": times.entropy}
        ago = sum(spent.values())
        for stage in filter(spent.__contains__, STAGES[self.operation]):  # as if each were done at a go
            ago -= spent[stage]
            self._add(stage, spent[stage], ago)
        return value

    def _add(self, stage: str, seconds: float, ago: float = 0.0) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        self.service.stage_span(stage, seconds, ago)

    def observe_stages(self) -> None:
        """Once per request, at its end: a budget passes some stages several times."""
        for stage, seconds in self._seconds.items():
            self.service.metrics.stage_seconds.labels(self.operation, stage).observe(seconds)

    def server_timing(self) -> str:
        """The `Server-Timing` header (W3C): milliseconds per stage."""
        return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in self._seconds.items())


def check_query(request: Request) -> None:
    """Raises:
    Problem: 400, a query parameter that the call does not have, or one given twice.
    """
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in (given := request.query_params):
        if name not in known:
            raise Problem(MALFORMED, f"expected query parameters among {', '.join(sorted(known))}, got {name!r}")
        if len(given.getlist(name)) > 1:
            raise Problem(MALFORMED, f"{name}: expected one value, got {len(given.getlist(name))}")


def _soon(loop: asyncio.AbstractEventLoop, then: Callable[[], None], _: Future[Any]) -> None:
    with suppress(RuntimeError):  # the loop has ended meanwhile
        loop.call_soon_threadsafe(then)


@asynccontextmanager
async def exchange(request: Request, service: Service, operation: str) -> AsyncIterator[Exchange]:
    """Admit a request, before any of its body is read, and see it to its answer.

    Raises:
        Problem, QueueFull: 400, 429, 503 at once; 504 when the deadline passes.
        ClientGone: the client hung up.
    """
    check_query(request)
    ready = service.require()
    timeout = timeout_of(request, service.settings)
    call = Exchange(request, service, ready, operation, time.monotonic() + timeout)
    if service.admitted >= service.settings.max_queue_items:
        raise call.refusal(f"{service.admitted} requests are in progress")
    ready.batcher.check_room(deadline=call.deadline)  # before the body comes and is decoded for nothing
    announced = request.headers.get("content-length", "")
    call.expect(int(announced) if announced.isdecimal() else 0)
    in_progress = service.metrics.in_progress.labels(operation)
    service.admitted += 1
    in_progress.inc()

    def leave() -> None:
        service.admitted -= 1
        in_progress.dec()
        service.body_bytes -= call.expected

    try:
        async with asyncio.timeout(timeout):
            yield call
    except DeadlineExceeded as error:
        raise Problem(DEADLINE, f"no answer within {timeout:g} seconds: {error}") from None
    except TimeoutError:
        phase = "its turn, or the device" if call.phase == "queue" else call.phase
        raise Problem(DEADLINE, f"no answer within {timeout:g} seconds; it waited for: {phase}") from None
    except (asyncio.CancelledError, ClientDisconnect) as error:
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if not call.gone or task is None:
                raise
            task.uncancel()
        service.metrics.disconnects.labels(call.phase).inc()
        raise ClientGone(call.phase) from None
    finally:
        if call.unfinished:
            call.unfinished.add_done_callback(partial(_soon, asyncio.get_running_loop(), leave))
        else:
            leave()
        call.observe_stages()
        if call.watcher:
            call.watcher.cancel()

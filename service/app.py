"""`create_app(settings)`: puts engine, queues, metrics and routes together, and brings them up and down.

The models load in a thread while the app already answers `/livez`; `/readyz` says 200 once every variant has run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import cast

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.batching import Batcher, DeviceBroken, Events, Limits
from service.codec.bitstream import Bitstream, DegradationKind
from service.codec.config import MOST_EFFORT, RATE_POINTS
from service.codec.refine import trust
from service.codec.shipped import Watch
from service.engine import DeviceFailure, EncodeJob, Engine, StageTimes
from service.errors import CLIENT_GONE, KINDS, LOGGED, Problem, problem_of, problem_response
from service.exchange import PHASES, STAGES, ClientGone, check_key
from service.middleware import OPERATIONS, RequestMiddleware
from service.openapi import KEYS
from service.routes import compress, decompress, health, variants
from service.routes.compress import UNKNOWN, pixels_of
from service.routes.page import mount_page
from service.settings import Settings
from service.state import Product, Ready, Service, Work
from service.store import ModelStore
from service.tracing import set_up_tracing

log = logging.getLogger("limpid")


def _load(settings: Settings) -> Engine:
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision, settings.threads)
    engine.warm_up()
    return engine


def _start_series(service: Service) -> None:
    """Let every series begin at zero, so that the first event shows in a rate and no dashboard panel is empty."""
    metrics = service.metrics
    metrics.ready.set_function(lambda: service.accepts)
    metrics.admission_limit.set(service.settings.max_queue_items)
    metrics.bytes_in_progress.set_function(lambda: service.body_bytes)
    metrics.byte_limit.set(service.settings.max_queue_bytes)
    for problem in KINDS:
        metrics.rejected.labels(problem.slug)
    for label in (*(kind.label for kind in DegradationKind), UNKNOWN):
        metrics.degradations.labels(label)
    for effort in range(MOST_EFFORT + 1):
        metrics.efforts.labels(str(effort))
    for operation in OPERATIONS.values():
        for status in {200, CLIENT_GONE, *(problem.status for problem in KINDS)}:
            metrics.requests.labels(operation, str(status))
        for stage in STAGES[operation]:
            metrics.stage_seconds.labels(operation, stage)
        metrics.in_progress.labels(operation)
        for histogram in (metrics.request_seconds, metrics.request_bytes, metrics.response_bytes):
            histogram.labels(operation)
    for phase in PHASES:
        metrics.disconnects.labels(phase)
    for reason in ("out-of-memory", "error"):
        metrics.batch_retries.labels(reason)
    for outcome in ("done", "failed"):
        metrics.store_reloads.labels(outcome)


def _start_models(service: Service, engine: Engine, names: Iterable[str]) -> None:
    """The same for the series of models, and tell that they are loaded."""
    metrics = service.metrics
    for name in names:
        metrics.model_loaded.labels(name, str(engine.device)).set(1)
        for operation in STAGES:
            for series in (metrics.pixels, metrics.bitstream_bytes, metrics.image_bytes, metrics.batch_size):
                series.labels(operation, name)
    for rate in range(1, RATE_POINTS + 1):
        metrics.bits_per_pixel.labels(engine.default.entry.name, str(rate))


async def _bring_up(service: Service) -> None:
    try:
        engine = await asyncio.to_thread(_load, service.settings)
    except Exception as error:  # whatever it is, the operator reads it at /readyz and in the log
        log.exception("the models could not be loaded")
        service.failure = f"the models could not be loaded: {error}"
        await _reload_if_asked(service)
        return

    threads = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="image")
    batcher = _batcher(engine, service)
    service.ready = Ready(engine, batcher, threads)
    metrics = service.metrics
    _start_models(service, engine, engine.models)
    metrics.queue_items.set_function(lambda: batcher.waiting_items)
    metrics.queue_bytes.set_function(lambda: batcher.waiting_bytes)
    metrics.queue_seconds.set_function(lambda: batcher.seconds_ahead if batcher.waiting_items else 0.0)
    metrics.batches.set_function(lambda: batcher.running)
    fields = {"models": list(engine.models), "device": str(engine.device), "precision": engine.precision}
    log.info("ready", extra={"fields": fields})
    await _reload_if_asked(service)


async def _reload_if_asked(service: Service) -> None:
    """By a SIGHUP that came while the models loaded."""
    asked, service.reload_asked = service.reload_asked, False
    if asked:
        await reload_store(service)


async def reload_store(service: Service) -> None:
    """Take up what changed in the store while requests go on. A store that cannot be used changes nothing.

    Where the models could not be loaded at start-up, they are tried again.
    """
    metrics = service.metrics
    if service.failure:
        service.failure = None
        await _bring_up(service)
        metrics.store_reloads.labels("failed" if service.failure else "done").inc()
        return
    if service.ready is None:
        log.info("the models are still loading; the store is read again after that")
        service.reload_asked = True
        return
    engine = service.ready.engine
    try:
        added = await asyncio.to_thread(engine.refresh, service.settings.store)
    except Exception:
        log.exception("the store could not be reloaded; the models stay as they were")
        metrics.store_reloads.labels("failed").inc()
        return
    _start_models(service, engine, added)
    metrics.store_reloads.labels("done").inc()
    log.info("store reloaded", extra={"fields": {"added": added, "default": engine.default.entry.name}})


class _Awaited(Watch):
    """Counts the steps of work, and ends what nobody waits for: its clients hung up, or their deadlines passed."""

    def __init__(self, awaited: Callable[[], bool], service: Service) -> None:
        self._awaited, self._service = awaited, service

    def step(self) -> None:
        self._service.metrics.device_steps.inc()
        self._service.last_step = time.monotonic()
        if not self._awaited():
            raise RuntimeError("nobody waits for it any more")


def _batcher(engine: Engine, service: Service) -> Batcher[Work, Product]:
    settings, metrics = service.settings, service.metrics
    limits = Limits(
        settings.max_batch_items,
        settings.max_batch_pixels,
        settings.max_batch_wait_ms / 1000,
        settings.max_queue_items,
        settings.max_queue_bytes,
    )
    threads = ThreadPoolExecutor(limits.in_flight, thread_name_prefix="engine")

    def run(items: Sequence[Work], awaited: Callable[[], bool]) -> Sequence[Product]:
        times, watch = StageTimes(), _Awaited(awaited, service)
        try:
            if isinstance(items[0], EncodeJob):
                streams = engine.encode([item for item in items if isinstance(item, EncodeJob)], times, watch)
                return [(stream, times) for stream in streams]
            photos = engine.decode([item for item in items if isinstance(item, Bitstream)], times, watch)
            return [(photo, times) for photo in photos]
        except DeviceFailure as error:
            raise DeviceBroken(str(error)) from error

    async def runner(_: Hashable, items: Sequence[Work], awaited: Callable[[], bool]) -> Sequence[Product]:
        return await asyncio.get_running_loop().run_in_executor(threads, run, items, awaited)

    def launched(key: Hashable, items: int) -> None:
        service.last_step = time.monotonic()
        operation, model, _ = cast(tuple[str, str, object], key)
        metrics.batch_size.labels(operation, model).observe(items)

    def retried(error: Exception) -> None:
        log.warning("a batch failed and is halved", exc_info=error)
        reason = "out-of-memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "error"
        metrics.batch_retries.labels(reason).inc()

    def took(item: Work, product: Product) -> int | None:
        made, _ = product
        if isinstance(item, EncodeJob) and isinstance(made, Bitstream):
            return pixels_of(item, refined=trust(made.degradations) > 0)
        return None

    return Batcher(runner, limits, events=Events(launched, retried), took=took)


def create_app(settings: Settings | None = None, *, load_first: bool = False) -> FastAPI:
    """The whole service as an ASGI app.

    Args:
        settings: default to the environment's.
        load_first: start up only once the models are loaded, for servers that send requests as soon as they may.
    """
    service = Service(settings or Settings())
    _start_series(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_bring_up(service))
        if load_first:
            await loading
        yield
        loading.cancel()

    app = FastAPIOffline(
        redoc_url=None,
        redirect_slashes=False,  # a client that follows no redirect would take the empty answer for its file
        static_url="/docs-files",
        title="Limpid",
        version=__version__,
        description="Compress a degraded photo to a small bitstream; get the clean photo back.",
        lifespan=lifespan,
    )
    app.state.service = service
    keys = [Depends(check_key), *(KEYS if service.settings.api_keys else ())]
    for module in (compress, decompress, variants):
        app.include_router(module.router, tags=["photos"], dependencies=keys)
    app.include_router(health.router, tags=["health"])
    mount_page(app, enabled=service.settings.demo_page)

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGone):
            return Response(status_code=CLIENT_GONE)
        problem = problem_of(error)
        if problem.kind in LOGGED:
            log.error("request failed", exc_info=error, extra={"fields": {"request_id": request.state.request_id}})
        return problem_response(problem, request)

    for kind in (Problem, ClientGone, RequestValidationError, HTTPException, ValueError, RuntimeError, Exception):
        app.add_exception_handler(kind, answer)
    if service.settings.otlp_endpoint:
        service.stage_span = set_up_tracing(app, service.settings.otlp_endpoint)
    app.add_middleware(
        RequestMiddleware,
        metrics=service.metrics,
        max_body_bytes=service.settings.max_body_bytes,
        body_timeout_s=service.settings.body_timeout_s,
    )
    if service.settings.cors_origins:  # around all the rest: its refusals too are for the page to read
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app

"""`create_app(settings)`: puts engine, queues, metrics and routes together, and brings them up and down.

The models load in a thread while the app already answers `/livez`; `/readyz` says 200 once every variant has run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service import __version__
from service.batching import SerialQueue
from service.codec.bitstream import Bitstream
from service.engine import EncodeJob, Engine, Photo, StageTimes
from service.errors import INTERNAL, Problem, problem_of, problem_response
from service.middleware import RequestMiddleware
from service.routes import compress, decompress, health, variants
from service.settings import Settings
from service.state import Ready, Service
from service.store import ModelStore

log = logging.getLogger("limpid")


def _load(settings: Settings) -> Engine:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    engine = Engine(ModelStore(settings.store), settings.device, settings.precision)
    engine.warm_up()
    return engine


async def _bring_up(service: Service) -> None:
    try:
        engine = await asyncio.to_thread(_load, service.settings)
    except Exception as error:  # whatever it is, the operator reads it at /readyz and in the log
        log.exception("the models could not be loaded")
        service.failure = f"the models could not be loaded: {error}"
        return

    def encode(jobs: Sequence[EncodeJob]) -> list[tuple[Bitstream, StageTimes]]:
        times = StageTimes()
        return [(stream, times) for stream in engine.encode(jobs, times)]

    def decode(streams: Sequence[Bitstream]) -> list[tuple[Photo, StageTimes]]:
        times = StageTimes()
        return [(photo, times) for photo in engine.decode(streams, times)]

    device, most = asyncio.Lock(), service.settings.max_queue_items
    service.ready = Ready(engine, SerialQueue(encode, device, most), SerialQueue(decode, device, most))
    metrics = service.metrics
    metrics.ready.set(1)
    for name in engine.models:
        metrics.model_loaded.labels(name, str(engine.device)).set(1)
    compress, decompress = service.ready.compress, service.ready.decompress
    metrics.queue_items.labels("compress").set_function(lambda: compress.waiting)
    metrics.queue_items.labels("decompress").set_function(lambda: decompress.waiting)
    log.info("ready: %s on %s in %s", ", ".join(engine.models), engine.device, engine.precision)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The whole service as an ASGI app. Settings default to the environment's."""
    service = Service(settings or Settings())
    service.metrics.ready.set(0)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_bring_up(service))
        yield
        loading.cancel()

    app = FastAPI(
        title="Limpid",
        version=__version__,
        description="Compress a degraded photo to a small bitstream; get the clean photo back.",
        lifespan=lifespan,
    )
    app.state.service = service
    for module in (compress, decompress, variants, health):
        app.include_router(module.router)

    async def answer(request: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        if problem.kind is INTERNAL:
            log.error("request %s failed", request.state.request_id, exc_info=error)
        service.metrics.rejected.labels(problem.kind.slug).inc()
        return problem_response(problem, request)

    for kind in (Problem, RequestValidationError, HTTPException, ValueError, RuntimeError):
        app.add_exception_handler(kind, answer)
    app.add_middleware(RequestMiddleware, metrics=service.metrics, max_body_bytes=service.settings.max_body_bytes)
    return app

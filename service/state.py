"""What the routes share: settings, metrics, and the engine with its batcher once it is ready."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.batching import Batcher
from service.codec.bitstream import Bitstream
from service.engine import EncodeJob, Engine, Photo, StageTimes
from service.errors import DRAINING, NOT_READY, Problem
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import StageSpan, no_span

STALLED_S = 600.0
"""Seconds without a step after which a device that has work hangs: the longest steps take a few."""

Work = EncodeJob | Bitstream
Product = tuple[Bitstream | Photo, StageTimes]


@dataclass(frozen=True)
class Ready:
    """A warmed-up engine, the batcher in front of it, and the threads that decode and encode images."""

    engine: Engine
    batcher: Batcher[Work, Product]
    image_threads: ThreadPoolExecutor


@dataclass
class Service:
    """What the routes share.

    Attributes:
        stage_span: records the stages of a request in its trace.
        ready: None while the models load, or with a `failure` that says why until they are tried again.
        admitted: requests between their admission and their answer.
        body_bytes: of their bodies, as announced, or as they have come where nothing was, and of the answers that
            clients have yet to take.
        last_step: when the device last got work or made a step of it, on the monotonic clock.
        draining: set by SIGTERM; nothing more is admitted.
        reload_asked: by a SIGHUP while the models load.
    """

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    stage_span: StageSpan = no_span
    ready: Ready | None = None
    failure: str | None = None
    admitted: int = 0
    body_bytes: int = 0
    last_step: float = 0.0
    draining: bool = False
    reload_asked: bool = False

    @property
    def accepts(self) -> bool:
        """Whether requests are admitted now."""
        return self.ready is not None and not self.draining and not self.broken()

    def broken(self) -> str | None:
        """Why a restart is needed, if one is."""
        if self.ready and self.ready.batcher.broken:
            return f"the device failed: {self.ready.batcher.broken}"
        if self.ready and self.ready.batcher.running and time.monotonic() - self.last_step > STALLED_S:
            return f"the device hangs: it has work, and has made no step for {STALLED_S:g} seconds"
        return self.failure

    def require(self) -> Ready:
        """Raises:
        Problem: 503, while the service admits no request.
        """
        if self.draining:
            raise Problem(DRAINING, "the service is shutting down", {"Retry-After": "5", "Connection": "close"})
        reason = self.broken()
        if reason or self.ready is None:
            raise Problem(NOT_READY, reason or "the models are still loading", {"Retry-After": "2"})
        return self.ready


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]

"""What the routes share: settings, metrics, and the engine with its queues once it is ready."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.batching import SerialQueue
from service.codec.bitstream import Bitstream
from service.engine import EncodeJob, Engine, Photo, StageTimes
from service.errors import NOT_READY, Problem
from service.metrics import Metrics
from service.settings import Settings


@dataclass(frozen=True)
class Ready:
    """A warmed-up engine and the queues in front of it."""

    engine: Engine
    compress: SerialQueue[EncodeJob, tuple[Bitstream, StageTimes]]
    decompress: SerialQueue[Bitstream, tuple[Photo, StageTimes]]


@dataclass
class Service:
    """What the routes share. `ready` is None while the models load, or for good with a `failure` that says why."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    ready: Ready | None = None
    failure: str | None = None

    def require(self) -> Ready:
        """Raises:
        Problem: 503, while the models are not ready.
        """
        if self.ready is None:
            raise Problem(NOT_READY, self.failure or "the models are still loading", {"Retry-After": "2"})
        return self.ready


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(_service)]

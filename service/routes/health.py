"""`/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from service.errors import DRAINING, NOT_READY, Problem, documented
from service.state import ServiceDependency

router = APIRouter()


class Health(BaseModel):
    status: str


@router.get("/livez", responses=documented(NOT_READY))
async def livez(service: ServiceDependency) -> Health:
    """200 while a restart would not help; 503 with the reason when the models or the device failed."""
    if reason := service.broken():
        raise Problem(NOT_READY, reason)
    return Health(status="alive")


@router.get("/readyz", responses=documented(NOT_READY, DRAINING))
async def readyz(service: ServiceDependency) -> Health:
    """200 once every variant is on the device and has run; 503 with the reason before, and when draining or broken."""
    service.require()
    return Health(status="ready")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: ServiceDependency) -> Response:
    """All series in the Prometheus text format."""
    service.metrics.observe_gpu_memory()
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

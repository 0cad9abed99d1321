"""Limpid on Ray Serve: each replica carries the whole app of `service.app`, its batcher included.

    serve run deploy.ray.app:build                       # on one machine
    kubectl apply -f deploy/ray/rayservice.yaml          # on a cluster with KubeRay

Ray spreads requests over the replicas and replaces those that die; both calls are idempotent, so a client may retry.
There is no `serve.batch` here: its timer would form batches before the device is free.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from service.app import create_app, reload_store
from service.logs import set_up_logging
from service.settings import service_settings
from service.state import Service


class Options(BaseModel):
    """Arguments of `build`, given after `serve run` as name=value or in a config file under `args`.

    Attributes:
        min_replicas, max_replicas: between which Ray scales.
        target_ongoing_requests: per replica, that it aims at; 16 are one full batch on the device.
        store_version: any number; a new one lets the running replicas take up what changed in the model store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(8, ge=1)
    target_ongoing_requests: float = Field(16, gt=0)
    store_version: int = 0


def _app() -> FastAPI:
    settings = service_settings()
    set_up_logging(settings)
    return create_app(settings, load_first=True)


@serve.ingress(_app)
class Limpid:
    """One replica. Its settings are the `LIMPID_*` variables of its process."""

    app: FastAPI  # set by serve.ingress

    @property
    def _service(self) -> Service:
        service: Service = self.app.state.service
        return service

    async def reconfigure(self, _: dict[str, Any]) -> None:
        """Ray calls this at the start and whenever `user_config` has changed."""
        if hasattr(self, "_asgi_app"):
            await reload_store(self._service)

    def check_health(self) -> None:
        """Raises:
        RuntimeError: only a new replica helps.
        """
        if reason := self._service.broken():
            raise RuntimeError(reason)


def build(args: dict[str, Any]) -> Application:
    """The Serve application; `args` as in `Options`, as Ray hands them over.

    A replica takes a GPU where `LIMPID_DEVICE` names one, `LIMPID_THREADS` CPUs else.
    """
    options, settings = Options.model_validate(args), service_settings()
    gpu = settings.device.startswith("cuda")
    deployment = serve.deployment(
        name="limpid",
        ray_actor_options={"num_gpus": 1 if gpu else 0, "num_cpus": settings.threads or 1},
        max_ongoing_requests=settings.max_queue_items,
        max_queued_requests=4 * settings.max_queue_items,
        graceful_shutdown_timeout_s=settings.drain_grace_s,
        health_check_period_s=5,
        health_check_timeout_s=10,
        user_config={"store_version": options.store_version},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        },
    )
    return deployment(Limpid).bind()

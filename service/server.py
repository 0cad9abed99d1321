"""The server process: uvicorn, with a shutdown that loses no admitted request.

SIGTERM or SIGINT: `/readyz` and new requests get 503 while what was admitted is finished, for at most `drain_grace_s`;
then the process exits with 0. A second signal ends it at once. SIGHUP: takes up what changed in the model store.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.app import create_app, reload_store
from service.connection import Connection
from service.logs import set_up_logging
from service.settings import Settings
from service.state import Service

log = logging.getLogger("limpid")

KEEP_ALIVE = 75
"""Seconds that an idle connection stays: nginx and AWS's balancers keep theirs for 60, and would post into its end."""


class DrainingServer(uvicorn.Server):
    """Drains the service before uvicorn closes its sockets."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_until: float | None = None
        self._untold: int | None = None
        self._reloading: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once the event loop runs."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a client that reads nothing keeps its connection, though cut off
            milliseconds = math.ceil(1000 * self._service.settings.body_timeout_s)
            for listening in (one for server in self.servers for one in server.sockets):
                with socket.fromfd(
                    listening.fileno(), listening.family, listening.type
                ) as own:  # what it accepts inherits it
                    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(reload_store(self._service))
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """For SIGINT and SIGTERM; does not chain to uvicorn, which would raise the signal again at its end.

        It may interrupt a line of the log that is being written, and another line within would raise: `on_tick` tells.
        """
        if self._service.draining:
            self.force_exit = self.should_exit = True
            return
        self._service.draining = True
        self._untold = sig
        self._drain_until = time.monotonic() + self._service.settings.drain_grace_s

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        if self._untold is not None:
            log.info("draining", extra={"fields": {"signal": self._untold, "admitted": self._service.admitted}})
            self._untold = None
        if self._drain_until is not None:
            left = self._service.admitted
            if not left:  # answers may still be on their way to slow clients
                self.config.timeout_graceful_shutdown = max(5, math.ceil(self._drain_until - time.monotonic()))
                return True
            if time.monotonic() > self._drain_until:
                log.error("the grace period is over", extra={"fields": {"unanswered": left}})
                return True
        return await super().on_tick(counter)


def serve(settings: Settings) -> None:
    """Run the service until a signal ends it."""
    set_up_logging(settings)
    # The device thread holds the interpreter lock between kernels; the event loop shall not wait 5 ms for it each time.
    sys.setswitchinterval(0.001)
    app: FastAPI = create_app(settings)
    if not settings.api_keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("no LIMPID_API_KEYS: whoever reaches the service may use it")
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
    )
    server = DrainingServer(config, app.state.service)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve())

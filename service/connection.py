"""Connections as uvicorn has them, and an end to those from which no request comes.

uvicorn's own timer begins with the first answer and stops at the next byte, whatever it is; a head may have any length.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD = 2**16
"""Bytes of a request's line and headers after the first read, which has 256 kB at most."""


class Connection(HttpToolsProtocol):
    """Closes where no request has begun `timeout_keep_alive` seconds after the connection, the last answer or the first
    byte of a head, and where a head is longer than `LARGEST_HEAD`."""

    _ends = 0.0
    _heads = 0
    _in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_to_wait()
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        head = self._heads if self._in_head else None
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and head == self._heads:
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD:
                self.send_400_response(f"expected at most {LARGEST_HEAD} bytes of headers")
                return
        if self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._set_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads += 1
        self._in_head, self._head_bytes = True, 0
        self._begin_to_wait()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._begin_to_wait()

    def _begin_to_wait(self) -> None:
        self._ends = self.loop.time() + self.timeout_keep_alive

    def _set_timer(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(self._ends, self.timeout_keep_alive_handler)

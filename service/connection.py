"""Connections as uvicorn has them, with an end to those from which no request comes, and to offers of another protocol.

uvicorn's own timer begins with the first answer and stops at the next byte, whatever it is; heads and trailers may have
any length; and of a request that offers an upgrade, as Java's client does with each, it loses the body.
"""

from __future__ import annotations

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD = 2**16
"""Bytes of a request's line and headers, or of its trailers, after the first read, which has 256 kB at most."""

_OF_AN_OFFER = (b"connection", b"upgrade", b"http2-settings")


class Connection(HttpToolsProtocol):
    """Closes where no request has begun `timeout_keep_alive` seconds after the connection, the last answer or the first
    byte of a head, and where a head or trailers are longer than `LARGEST_HEAD`. A request that offers an upgrade is
    answered as if it did not (RFC 9110, section 7.8); for servers without WebSockets (`ws="none"`)."""

    _ends = 0.0
    _steps = 0
    """Of messages: begun, head read, a piece of a body, complete."""
    _between = 0
    """Bytes since the last step."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_to_wait()
        self._set_timer()

    def data_received(self, data: bytes) -> None:
        steps = self._steps
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the latter: CONNECT
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")
        if self.transport.is_closing():
            return
        self._between = self._between + len(data) if steps == self._steps else 0
        if self._between > LARGEST_HEAD:
            self.send_400_response(f"expected at most {LARGEST_HEAD} bytes of headers")
            return
        if self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._set_timer()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:  # behind the head; the parser would take no body
                if not self._is_offer():
                    raise
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    def _is_offer(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        headers = [(name, value) for name, value in self.headers if name not in _OF_AN_OFFER]
        if not self.parser.should_keep_alive():
            headers.append((b"connection", b"close"))
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        return b"\r\n".join([*lines, *(name + b": " + value for name, value in headers), b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._steps += 1
        self._begin_to_wait()

    def on_headers_complete(self) -> None:
        self._steps += 1
        if not self._is_offer():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._steps += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._steps += 1
        if not self._is_offer():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._begin_to_wait()

    def _begin_to_wait(self) -> None:
        self._ends = self.loop.time() + self.timeout_keep_alive

    def _set_timer(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_at(self._ends, self.timeout_keep_alive_handler)

"""`service.connection` on a real socket: what comes of connections from which no request comes, and of offers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.connection import LARGEST_HEAD, Connection
from tests.conftest import until
from tests.served import free_port

POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """An answer before the body, but for /echo, of which it is the body."""
    if scope["path"] == "/echo":
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        length = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.start", "status": 429, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    number = free_port()
    config = uvicorn.Config(
        refuse, port=number, http=Connection, log_config=None, lifespan="off", timeout_keep_alive=1, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield number
    server.should_exit = True
    thread.join(10)


def opened(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(sent)
    return client


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    said = b""
    while piece := client.recv(4096):
        said += piece
    return said


def is_cut_off(client: socket.socket, piece: bytes, times: int) -> bool:
    """Before it has sent a piece so many times."""
    for _ in range(times):
        try:
            client.sendall(piece)
        except ConnectionError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("sent", [b"", GET[:20], GET, GET + GET[:20]])
def test_a_connection_that_asks_nothing_is_closed(port: int, sent: bytes) -> None:
    begun = time.monotonic()
    said = all_of(opened(port, sent))
    assert said.count(b"429") == sent.count(GET)
    assert 0.9 < time.monotonic() - begun < 5


@pytest.mark.parametrize("first", [GET[:-2], POST % 10**6])
def test_bytes_that_complete_nothing_keep_no_connection(port: int, first: bytes) -> None:
    client = opened(port, first)
    begun = time.monotonic()
    assert is_cut_off(client, b"x", 160)
    assert 0.9 < time.monotonic() - begun < 5


def test_a_slow_head_is_read(port: int) -> None:
    client = opened(port, GET[:5])
    for start in range(5, len(GET), 4):
        time.sleep(0.05)
        client.sendall(GET[start : start + 4])
    assert b"429" in client.recv(4096)


def test_a_head_without_end_is_refused(port: int) -> None:
    client = opened(port, GET[:-2] + b"X: ")
    assert is_cut_off(client, b"x" * LARGEST_HEAD, 16)
    long = b"X: " + b"x" * (LARGEST_HEAD - 100) + b"\r\n\r\n"
    assert b"429" in opened(port, GET[:-2] + long).recv(4096)


def test_a_body_before_the_next_request_counts_for_no_head(port: int) -> None:
    body = 3 * LARGEST_HEAD
    client = opened(port, POST % body + b"x" * body + GET[:10])
    time.sleep(0.2)
    client.sendall(GET[10:])
    until(lambda: client.recv(4096, socket.MSG_PEEK).count(b"429") == 2)


OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n",
}
BODIES = {
    "length": (b"Content-Length: 10\r\n", b"0123456789"),
    "chunks": (b"Transfer-Encoding: chunked\r\n", b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("pause_at", [None, 30, -12, -5])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_of_another_protocol_is_passed_over(port: int, offer: str, body: str, pause_at: int | None) -> None:
    """Java's client makes one with every request, and its body lies behind it."""
    header, sent = BODIES[body]
    request = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + OFFERS[offer] + header + b"\r\n" + sent
    twice = request + request
    client = opened(port, twice[:pause_at])
    time.sleep(0.05)
    client.sendall(twice[len(twice[:pause_at]) :])
    until(lambda: client.recv(4096, socket.MSG_PEEK).count(b"0123456789") == 2)
    said = client.recv(4096)
    assert said.count(b"HTTP/1.1 200") == 2
    assert b"upgrade" not in said.lower()


def test_an_offer_that_closes_or_waits_is_heeded(port: int) -> None:
    offer = OFFERS["h2c"].replace(b"Upgrade,", b"close, Upgrade,")
    assert all_of(opened(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n")).count(b"429") == 1
    waits = OFFERS["h2c"] + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    client = opened(port, b"POST /echo HTTP/1.1\r\nHost: x\r\n" + waits)
    assert client.recv(4096).startswith(b"HTTP/1.1 100")
    client.sendall(b"ok")
    until(lambda: client.recv(4096, socket.MSG_PEEK).endswith(b"ok"))


def test_a_tunnel_is_refused(port: int) -> None:
    assert all_of(opened(port, b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n")).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("piece", [b"X-A: " + b"a" * 1000 + b"\r\n", b"a" * 1000])
def test_trailers_without_end_are_refused(port: int, piece: bytes) -> None:
    client = opened(port, b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: ")
    assert is_cut_off(client, piece * 64, 16)
    short = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
    client = opened(port, short + (b"X-A: " + b"a" * 1000 + b"\r\n") * 50 + b"\r\n")
    until(lambda: client.recv(4096, socket.MSG_PEEK).endswith(b"ok"))

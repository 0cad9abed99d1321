"""`service.connection` on a real socket: what comes of connections from which no request comes."""

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
    """An answer before the body."""
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

"""`service.server` and what surrounds a request, on a real server: drain, deadlines, slow and vanishing clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import generate_latest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from service.app import create_app
from service.codec.bitstream import MEDIA_TYPE
from service.engine import Photo
from service.exchange import timeout_of
from service.logs import TextFormatter
from service.metrics import Metrics
from service.middleware import PIECE, RequestMiddleware
from service.server import DrainingServer
from service.settings import Settings
from service.state import Service
from tests.conftest import image_bytes, until
from tests.served import served


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with served(body_timeout_s=1, request_timeout_s=50, max_queue_items=24, max_body_bytes=2**24) as (base, _):
        yield base


def connect(base: str, receives: int = 0) -> socket.socket:
    """`receives`: bytes that the socket takes before its owner reads, where not the system's own choice."""
    url, client = urlsplit(base), socket.socket()
    client.settimeout(20)
    if receives:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    client.connect((url.hostname or "", url.port or 0))
    return client


def metric(base: str, name: str) -> float:
    lines = httpx2.get(f"{base}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_sigterm_loses_no_admitted_request_and_exits_with_0(parrots: Photo) -> None:
    upload = image_bytes(np.tile(parrots, (2, 2, 1)))
    with served(max_batch_wait_ms=2000) as (base, process):  # so that the first waits for the last
        with ThreadPoolExecutor(12) as pool:
            posts = [pool.submit(httpx2.post, f"{base}/compress", content=upload, timeout=60) for _ in range(12)]
            until(lambda: metric(base, 'limpid_requests_in_progress{operation="compress"}') == 12)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(f"{base}/readyz").status_code == 503)
            refused = httpx2.get(f"{base}/readyz")
            assert refused.json()["type"] == "urn:limpid:problem:draining"
            answers = [post.result() for post in posts]
        assert [answer.status_code for answer in answers] == [200] * 12
        assert process.wait(20) == 0


def test_what_outlives_the_grace_is_told_so_and_the_exit_status_is_0(bikes: Photo) -> None:
    with served(drain_grace_s=1, max_batch_wait_ms=1000) as (base, process), ThreadPoolExecutor(40) as pool:
        upload = image_bytes(np.tile(bikes, (8, 8, 1)))
        posts = [pool.submit(httpx2.post, f"{base}/compress", content=upload, timeout=60) for _ in range(40)]
        until(lambda: metric(base, 'limpid_requests_in_progress{operation="compress"}') >= 40)
        process.send_signal(signal.SIGINT)
        answers = [post.result() for post in posts]
        assert process.wait(20) == 0
    left = [answer for answer in answers if answer.status_code != 200]
    assert left
    assert {(answer.status_code, answer.json()["type"]) for answer in left} == {(503, "urn:limpid:problem:draining")}


def test_a_signal_writes_nothing_where_it_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come while a line of the log is being written, where another one raises and the signal would be lost."""

    def reentrant(*_: object, **__: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    service = Service(Settings())
    server = DrainingServer(uvicorn.Config(FastAPI()), service)
    with monkeypatch.context() as patch:
        patch.setattr("service.server.log.info", reentrant)
        server.handle_exit(signal.SIGTERM, None)
    assert service.draining
    assert not server.force_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit, "a second signal ends it at once"


def test_answers_on_their_way_have_the_rest_of_the_grace() -> None:
    server = DrainingServer(uvicorn.Config(FastAPI()), Service(Settings(drain_grace_s=40)))
    server.handle_exit(signal.SIGTERM, None)
    assert asyncio.run(server.on_tick(1))
    assert 35 <= cast(int, server.config.timeout_graceful_shutdown) <= 40
    server._drain_until = 0.0
    assert asyncio.run(server.on_tick(2))
    assert server.config.timeout_graceful_shutdown == 5


def test_a_process_that_loads_or_drains_is_alive() -> None:
    app = create_app(Settings())
    client = TestClient(app)  # which is not entered: nothing loads
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    app.state.service.draining = True
    assert "draining" in client.get("/readyz").json()["type"]
    assert client.get("/livez").status_code == 200


def test_a_slow_body_is_cut_off(server: str) -> None:
    with connect(server) as client:
        client.sendall(b"POST /compress HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        started = time.monotonic()
        for _ in range(3):
            client.sendall(b"x")
            time.sleep(0.2)
        answer = b"".join(iter(lambda: client.recv(65536), b""))  # until the service closes
        assert 0.8 < time.monotonic() - started < 5
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body-timeout" in answer


def test_a_body_over_the_limit_is_cut_while_it_streams(server: str) -> None:
    part = bytes(2**20)
    with connect(server) as client:
        client.sendall(b"POST /compress HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it may close before all of it is sent
            for _ in range(17):
                client.sendall(b"%x\r\n%s\r\n" % (len(part), part))  # and no end
        assert client.recv(65536).startswith(b"HTTP/1.1 413")


def test_the_client_can_shorten_the_deadline_but_not_lengthen_it(server: str, parrots: Photo) -> None:
    upload = image_bytes(np.tile(parrots, (4, 4, 1)))
    late = httpx2.post(f"{server}/compress", content=upload, headers={"Limpid-Timeout": "0.02"})
    assert late.status_code == 504
    assert late.json()["type"] == "urn:limpid:problem:deadline-exceeded"
    longer = httpx2.post(f"{server}/compress", content=upload, headers={"Limpid-Timeout": "900"}, timeout=60)
    assert longer.status_code == 200
    asked = Request({"type": "http", "headers": [(b"limpid-timeout", b"900")]})
    assert timeout_of(asked, Settings(request_timeout_s=50)) == 50
    for wrong in ("soon", "-1", "0", "nan"):
        assert httpx2.post(f"{server}/compress", content=upload, headers={"Limpid-Timeout": wrong}).status_code == 400


def test_a_client_that_hangs_up_frees_its_place(server: str, parrots: Photo) -> None:
    upload = image_bytes(np.tile(parrots, (4, 4, 1)))
    head = f"POST /compress HTTP/1.1\r\nHost: x\r\nContent-Length: {len(upload)}\r\n\r\n".encode()
    before = metric(server, "limpid_client_disconnects_total")
    for _ in range(6):
        with connect(server) as client:
            client.sendall(head + upload)
            time.sleep(0.05)
    until(lambda: not metric(server, 'limpid_requests_in_progress{operation="compress"}'))
    until(lambda: not metric(server, "limpid_queue_items"))
    assert metric(server, "limpid_client_disconnects_total") > before
    in_body = metric(server, 'limpid_client_disconnects_total{phase="body"}')
    with connect(server) as client:
        client.sendall(head + upload[: len(upload) // 2])  # gone in the middle of its body
    until(lambda: metric(server, 'limpid_client_disconnects_total{phase="body"}') == in_body + 1)
    assert metric(server, 'limpid_requests_in_progress{operation="compress"}') == 0
    assert metric(server, 'limpid_http_requests_total{operation="compress",status="499"}') >= 2
    assert metric(server, 'limpid_http_requests_total{operation="compress",status="500"}') == 0
    assert httpx2.post(f"{server}/compress", content=image_bytes(parrots)).status_code == 200


def test_a_burst_gets_429_at_once_or_a_right_answer(server: str, parrots: Photo) -> None:
    upload = image_bytes(np.tile(parrots, (2, 2, 1)))
    barrier = threading.Barrier(60)
    quick: list[float] = []

    def post() -> httpx2.Response:
        barrier.wait()
        started = time.monotonic()
        answer = httpx2.post(f"{server}/compress", content=upload, timeout=60)
        if answer.status_code == 429:
            quick.append(time.monotonic() - started)
        return answer

    with ThreadPoolExecutor(60) as pool:
        answers = [future.result() for future in [pool.submit(post) for _ in range(60)]]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert sorted(quick)[len(quick) // 2] < 3  # while those that were admitted take their turns
    assert statuses.count(200) >= 24
    for answer in answers:
        if answer.status_code == 200:
            assert answer.headers["content-type"] == MEDIA_TYPE
        else:
            assert answer.json()["type"] == "urn:limpid:problem:queue-full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert metric(server, "limpid_batch_size_count") < metric(server, "limpid_batch_size_sum")  # it did batch


def test_an_answer_that_its_client_does_not_take_counts_and_ends(parrots: Photo) -> None:
    upload = image_bytes(np.tile(parrots, (9, 9, 1)))
    with served(body_timeout_s=3, max_queue_bytes=2**20) as (base, _):  # its answer is larger than both sockets hold
        stream = httpx2.post(f"{base}/compress?rate=8", content=upload, timeout=60).content
        with connect(base, receives=4096) as client:
            head = f"POST /decompress HTTP/1.1\r\nHost: x\r\nContent-Length: {len(stream)}\r\n\r\n".encode()
            client.sendall(head + stream)
            done = 'limpid_stage_duration_seconds_count{operation="decompress",stage="image_encode"}'
            until(lambda: metric(base, done))
            statuses: list[int] = []

            def answered() -> bool:
                statuses.append(httpx2.post(f"{base}/compress", content=image_bytes(parrots)).status_code)
                return statuses[-1] != 429

            until(answered)
            assert len(statuses) > 1  # refused while the answer was held
            assert statuses[-1] == 200  # its connection has ended, though nothing was read


def test_an_answer_that_its_client_takes_too_slowly_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Message] = []
    metrics, answer = Metrics(), bytes(10 * PIECE)
    until_sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["until_sent"].callback(until_sent.append, 1)
        await Response(answer)(scope, receive, send)

    async def send(message: Message) -> None:
        await asyncio.sleep(0.03 if slow else 0)
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    monkeypatch.setattr("service.middleware.SLOWEST", 2**30)
    for slow in (False, True):
        sent.clear()
        scope = {"type": "http", "method": "GET", "path": "/compress", "headers": [], "query_string": b""}
        asyncio.run(RequestMiddleware(app, metrics, 1000, 0.1)(scope, receive, send))
        assert (b"".join(message.get("body", b"") for message in sent) == answer) is not slow
        assert all(len(message.get("body", b"")) <= PIECE for message in sent)
    assert until_sent == [1, 1]
    exposed = generate_latest(metrics.registry).decode()
    assert 'limpid_client_disconnects_total{phase="answer"} 1.0' in exposed
    assert 'limpid_http_requests_total{operation="compress",status="499"} 1.0' in exposed


def test_a_path_forges_no_line_of_a_log_for_people() -> None:
    record = logging.LogRecord("limpid", logging.INFO, "", 0, "request answered", None, None)
    record.fields = {"path": "/\n2026-01-01 ERROR limpid: forged", "status": 404}
    line = TextFormatter().format(record)
    assert "\n" not in line
    assert line.endswith("status=404")


def test_the_log_is_one_json_object_per_request(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with served(log=log) as (base, _):
        httpx2.post(f"{base}/compress", content=b"x", headers={"X-Request-ID": "gate-1"})
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (event,) = [event for event in events if event.get("request_id") == "gate-1"]
    assert (event["status"], event["path"], event["bytes_in"]) == (415, "/compress", 1)
    assert any(event["message"] == "ready" for event in events)
    assert any(event["message"] == "draining" for event in events)


def test_a_request_that_the_server_gives_up_is_told_so() -> None:
    """As uvicorn does when the grace after SIGTERM is over."""

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def given_up() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        scope = {"type": "http", "method": "POST", "path": "/compress", "headers": [], "query_string": b""}
        call = asyncio.create_task(RequestMiddleware(endless, Metrics(), 1000, 30)(scope, receive, send))
        await asyncio.sleep(0.05)
        call.cancel()
        await call
        return sent

    start, body = asyncio.run(given_up())
    assert start["status"] == 503
    assert json.loads(body["body"])["type"] == "urn:limpid:problem:draining"

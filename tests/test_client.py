"""`service.client`: retries, deadlines and typed errors, against a scripted transport and against the real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

from model_store.images import psnr
from service.calls import Call, retry_after
from service.client import (
    AsyncClient,
    Body,
    BudgetUnmeetable,
    Client,
    DeadlineExceeded,
    LimpidError,
    Policy,
    RequestRefused,
    ServiceBusy,
    ServiceUnavailable,
    Unauthorized,
)
from service.engine import Photo
from service.imaging import read_photo
from tests.conftest import image_bytes, noisy
from tests.served import Quiet, answering

FAST = Policy(deadline=5, attempts=4, backoff=0.001)
GOOD_HEADERS = {
    "limpid-rate": "4",
    "limpid-bpp": "0.5",
    "limpid-model": "edge-1",
    "limpid-degradation": "noise;0.82, haze;0.31",
    "server-timing": 'queue;dur=1.5, transform;dur=80, cdn-cache; desc=HIT, edge;desc="x"',
    "x-request-id": "abc",
}

Answer = httpx.Response | Exception


def problem(status: int, slug: str, **headers: str) -> httpx.Response:
    body = {"type": f"urn:limpid:problem:{slug}", "title": "t", "status": status, "detail": "said so"}
    return httpx.Response(status, content=json.dumps(body), headers={"x-request-id": "r1", **headers})


def good() -> httpx.Response:
    return httpx.Response(200, content=b"stream", headers=GOOD_HEADERS)


class Script:
    """A transport that gives the listed answers in turn and keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = iter(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def both(script: Callable[[], Script], call: str, *args: object, policy: Policy = FAST, **kwargs: object) -> Iterator:  # type: ignore[type-arg]
    """Run a call on the sync and on the async client; yields (script, result or error) of each."""
    sync, other = script(), script()
    with Client("http://x", "key", policy, httpx.MockTransport(sync)) as client:
        try:
            yield sync, getattr(client, call)(*args, **kwargs)
        except LimpidError as error:
            yield sync, error

    async def run() -> object:
        async with AsyncClient("http://x", "key", policy, httpx.MockTransport(other)) as client:
            try:
                return await getattr(client, call)(*args, **kwargs)
            except LimpidError as error:
                return error

    yield other, asyncio.run(run())


def test_what_failed_on_the_way_is_sent_again_in_full(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"j" * 200_000)

    def script() -> Script:
        return Script(httpx.ConnectError("down"), problem(503, "draining"), httpx.ReadError("cut"), good())

    for body in (b"j" * 200_000, tmp_path / "a.jpg", lambda: iter([b"j" * 100_000] * 2)):
        for sent, result in both(script, "compress", body, rate=5):
            assert result.bitstream == b"stream"
            assert result.degradations == {"noise": 0.82, "haze": 0.31}
            assert result.timing == {"queue": 1.5, "transform": 80.0}
            assert len(sent.requests) == 4
            for request in sent.requests:
                assert request.content == b"j" * 200_000
                assert ("content-length" in request.headers) is not callable(body)
                assert request.url.params["rate"] == "5"
                assert request.headers["authorization"] == "Bearer key"
                assert 0 < float(request.headers["limpid-timeout"]) <= FAST.deadline


@pytest.mark.parametrize("answer", [httpx.Response(502, text="<html>proxy"), problem(408, "body-timeout")])
def test_what_a_proxy_or_a_slow_line_broke_is_sent_again(answer: httpx.Response) -> None:
    for sent, result in both(lambda: Script(answer, good()), "compress", b"photo"):
        assert result.bitstream == b"stream"
        assert len(sent.requests) == 2


@pytest.mark.parametrize(
    ("status", "slug", "kind"),
    [
        (401, "invalid-api-key", Unauthorized),
        (415, "not-an-image", RequestRefused),
        (422, "unmeetable-budget", BudgetUnmeetable),
        (500, "internal-error", ServiceUnavailable),
        (504, "deadline-exceeded", DeadlineExceeded),
    ],
)
def test_what_will_not_succeed_is_not_repeated(status: int, slug: str, kind: type[LimpidError]) -> None:
    for script, error in both(lambda: Script(problem(status, slug)), "compress", b"photo"):
        assert type(error) is kind
        assert (error.kind, error.status, error.detail, error.request_id) == (slug, status, "said so", "r1")
        assert len(script.requests) == 1


def test_the_last_answer_is_raised_when_the_attempts_are_used_up() -> None:
    for script, error in both(lambda: Script(*(problem(429, "queue-full") for _ in range(4))), "compress", b"photo"):
        assert type(error) is ServiceBusy
        assert len(script.requests) == 4
    for _, error in both(lambda: Script(*[httpx.ConnectError("no route")] * 4), "decompress", b"stream"):
        assert type(error) is ServiceUnavailable
        assert error.status is None
        assert "no route" in error.detail


def test_an_answer_without_words_is_told_by_its_status() -> None:
    def script() -> Script:
        return Script(httpx.Response(308, headers={"location": "https://x/compress"}))

    for _, error in both(script, "compress", b"photo"):
        assert error.detail == "status 308, to https://x/compress"


def test_the_service_says_that_time_is_up_before_the_client_stops_listening() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(float(request.headers["limpid-timeout"]) + 0.005)
        return problem(504, "deadline-exceeded", **{"x-request-id": "late"})

    with (
        Client("http://x", policy=Policy(deadline=1), transport=httpx.MockTransport(answer)) as c,
        pytest.raises(DeadlineExceeded) as caught,
    ):
        c.compress(b"photo")
    assert caught.value.request_id == "late"


def test_those_that_were_sent_away_together_do_not_return_together() -> None:
    busy = problem(429, "queue-full", **{"retry-after": "10"})
    pauses = [Call("GET", "/variants", Policy(), attempt=1).pause_after(busy) or 0 for _ in range(200)]
    assert min(pauses) >= 10
    assert max(pauses) <= 15
    assert max(pauses) - min(pauses) > 3


def test_a_call_beside_the_end_of_its_client_ends_too() -> None:
    for _ in range(20):
        client = Client("http://x", transport=httpx.MockTransport(lambda _: httpx.Response(200, json={"models": []})))
        client.variants()

        def on_and_on(client: Client = client) -> None:
            with suppress(RuntimeError, LimpidError):
                while True:
                    client.variants()

        threads = [threading.Thread(target=on_and_on, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        client.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_patience_may_be_endless() -> None:
    call = Call("GET", "/variants", Policy(deadline=10**6, attempts=10**6), attempt=5000)
    assert 0 < (call.pause_after(httpx.ConnectError("down")) or 0) <= Policy().backoff_max


def test_retry_after_is_obeyed_and_never_past_the_deadline() -> None:
    started = time.monotonic()
    with Client(
        "http://x", transport=httpx.MockTransport(Script(problem(429, "q", **{"retry-after": "1"}), good()))
    ) as c:
        c.compress(b"photo")
    assert time.monotonic() - started >= 1
    hurry = Policy(deadline=2, backoff=0.001)
    started = time.monotonic()
    late = [problem(429, "queue-full", **{"retry-after": "30"})]
    with (
        Client("http://x", policy=hurry, transport=httpx.MockTransport(Script(*late))) as c,
        pytest.raises(ServiceBusy) as caught,
    ):
        c.compress(b"photo")
    assert caught.value.retry_after == 30
    assert time.monotonic() - started < 1


def slowly() -> Iterator[bytes]:
    yield b"photo"
    time.sleep(0.7)


@pytest.mark.parametrize(("drips", "body"), [("body", b"photo"), ("headers", b"photo"), ("nothing", slowly)])
def test_the_deadline_ends_an_answer_that_only_drips(drips: str, body: Body) -> None:
    class Drip(Quiet):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" if drips == "headers" else b"")
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" if drips == "body" else b"")
            with suppress(OSError):
                for _ in range(30):
                    self.wfile.write({"headers": b"a: b\r\n", "body": b"x", "nothing": b""}[drips])
                    time.sleep(0.1)

    patience = Policy(deadline=1, attempts=1)
    with answering(Drip) as url:

        async def drink() -> None:
            async with AsyncClient(url, policy=patience) as client:
                await client.compress(body)

        def sip() -> None:
            with Client(url, policy=patience) as client:
                client.compress(body)

        for call in (sip, lambda: asyncio.run(drink())):
            started = time.monotonic()
            with pytest.raises(ServiceUnavailable, match="not done within 1 s"):
                call()
            assert time.monotonic() - started < 1.6


def test_waiting_can_be_given_up() -> None:
    busy = [problem(429, "queue-full", **{"retry-after": "30"}) for _ in range(2)]
    with Client("http://x", transport=httpx.MockTransport(Script(*busy))) as client:
        threading.Timer(0.2, client.give_up).start()
        started = time.monotonic()
        with pytest.raises(ServiceBusy):
            client.compress(b"photo")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "script",
    [
        "",
        "def held(limpid): raise SystemExit(0)\nheld(limpid)",
        "limpid.me = limpid; del limpid",
        "import os\nif not os.fork(): raise SystemExit(0)\nos.wait()",
    ],
)
def test_a_client_that_nobody_closes_lets_the_process_end(script: str) -> None:
    used = """
from service.client import Client, LimpidError, Policy
limpid = Client('http://127.0.0.1:9', policy=Policy(attempts=1))
try:
    limpid.variants()
except LimpidError:
    pass
"""
    code = used + script
    subprocess.run([sys.executable, "-c", code], timeout=20, check=True)


def test_a_forked_client_says_so_at_once() -> None:
    script = """
import os
from service.client import Client, LimpidError, Policy
fresh, used = (Client('http://127.0.0.1:9', policy=Policy(attempts=1)) for _ in range(2))
def call(limpid):
    try:
        limpid.variants()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
call(used)
if not os.fork():
    call(used)
    call(fresh)
    os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=20, capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first.startswith("ServiceUnavailable")
    assert second.startswith("RuntimeError")
    assert "after the fork" in second
    assert third.startswith("ServiceUnavailable")


def test_closing_ends_the_waiting_of_others() -> None:
    busy = [problem(429, "queue-full", **{"retry-after": "30"}) for _ in range(2)]
    client = Client("http://x", transport=httpx.MockTransport(Script(*busy)))
    errors: list[Exception] = []

    def wait() -> None:
        try:
            client.compress(b"photo")
        except LimpidError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    started = time.monotonic()
    client.close()
    waiting.join(10)
    assert time.monotonic() - started < 3
    assert [type(error) for error in errors] == [ServiceBusy]
    client.give_up()  # as harmless as closing again
    client.close()


def test_a_body_that_blocks_does_not_hold_up_the_end() -> None:
    def stuck() -> Iterator[bytes]:
        yield b"photo"
        time.sleep(5)

    async def answer(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return good()

    started = time.monotonic()
    with (
        Client("http://x", policy=Policy(deadline=0.5, attempts=1), transport=httpx.MockTransport(answer)) as client,
        pytest.raises(ServiceUnavailable),
    ):
        client.compress(stuck)
    assert time.monotonic() - started < 3


def test_a_key_of_a_file_is_read_and_one_that_no_header_carries_is_not_told() -> None:
    with Client("http://x", "key\n", transport=httpx.MockTransport(script := Script(good()))) as client:
        client.compress(b"photo")
    assert script.requests[0].headers["authorization"] == "Bearer key"
    with pytest.raises(ValueError, match="visible ASCII") as told:
        Client("http://x", "top\nsecret")
    assert "secret" not in str(told.value)


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="expected a URL, got 'http://limpid:port'"):
        Client("http://limpid:port")


def test_an_answer_that_is_damaged_is_asked_for_again() -> None:
    def script() -> Script:
        damaged = httpx.ByteStream(b"not gzip at all")
        return Script(httpx.Response(200, headers={"content-encoding": "gzip"}, stream=damaged), good())

    for sent, result in both(script, "compress", b"photo"):
        assert result.bitstream == b"stream"
        assert len(sent.requests) == 2


def test_a_name_is_no_upload() -> None:
    with Client("http://limpid") as limpid, pytest.raises(TypeError, match="got str"):
        limpid.compress("photo.jpg")  # type: ignore[arg-type]


def test_retry_after_is_read_as_seconds_or_date() -> None:
    def asked(value: str, **headers: str) -> float:
        return retry_after({"retry-after": value, **headers})

    assert asked("3") == 3
    assert 8 < asked(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert asked(formatdate(70, usegmt=True), date=formatdate(60, usegmt=True)) == 10  # whatever the clock here says
    assert asked("Sat, 28 Nov 2026 99999999999999999999:00:00 GMT") == 0
    assert retry_after({}) == asked("soon") == asked("²") == asked(formatdate(0)) == 0
    assert asked("9" * 400) == asked(formatdate(time.time() + 10**8)) == 86_400


def test_no_attempt_begins_so_late_that_its_end_would_hide_the_last_answer() -> None:
    times = iter([0.0, 8.9, 9.1])  # its start, and the ends of two attempts
    call = Call("GET", "/", Policy(deadline=10, backoff=0), clock=lambda: next(times))
    assert call.pause_after(problem(503, "not-ready")) == 0
    assert call.pause_after(problem(503, "not-ready")) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTP_PROXY", "foo:bar"), ("SSL_CERT_FILE", "/missing.pem")],
)
def test_an_environment_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="expected proxies and certificates"):
        AsyncClient("https://limpid")


def test_a_key_goes_beside_a_password_for_a_proxy() -> None:
    seen: list[httpx.Headers] = []

    async def work() -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request.headers)
            return httpx.Response(200, json={"models": []})

        for url in ("http://me:pw@limpid", "http://limpid"):
            async with AsyncClient(url, "sesame", transport=httpx.MockTransport(answer)) as limpid:
                await limpid.variants()

    asyncio.run(work())
    assert seen[0]["authorization"].startswith("Basic ")
    assert seen[0]["x-api-key"] == "sesame"
    assert seen[1]["authorization"] == "Bearer sesame"


def test_a_client_that_was_given_up_before_its_first_call_makes_none() -> None:
    with Client("http://127.0.0.1:9") as limpid:
        limpid.give_up()
        with pytest.raises(ServiceUnavailable, match="given up"):
            limpid.variants()


def test_an_answer_that_is_not_ours_is_said_to_be(tmp_path: Path) -> None:
    for _, error in both(lambda: Script(httpx.Response(400, text="<html>proxy")), "variants"):
        assert error.kind == "unexpected-answer"
        assert "proxy" in error.detail
    for _, error in both(
        lambda: Script(httpx.Response(403, json={"type": "about:blank", "detail": "WAF"})), "variants"
    ):
        assert (type(error), error.kind, error.status) == (ServiceUnavailable, "unexpected-answer", 403)
        assert "WAF" in error.detail
    for call in ("compress", "decompress"):  # as a captive portal says it
        for _, error in both(lambda: Script(httpx.Response(200, text="<html>portal")), call, b"x"):
            assert (type(error), error.kind, error.status) == (ServiceUnavailable, "unexpected-answer", 200)
            assert "portal" in error.detail


def test_a_photo_goes_there_and_back_on_the_real_server(parrots: Photo, tmp_path: Path, guarded: str) -> None:
    degraded = noisy(parrots)
    (tmp_path / "in.png").write_bytes(image_bytes(degraded))
    with Client(guarded, "sesame") as client:
        compressed = client.compress(tmp_path / "in.png", max_bytes=5000)
        assert len(compressed.bitstream) <= 5000
        refined = client.compress(tmp_path / "in.png", rate=compressed.rate, effort=2)
        assert refined.bitstream != compressed.bitstream
        restored = client.decompress(compressed.bitstream, media_type="image/webp", quality=95)
        assert restored.media_type == "image/webp"
        assert restored.rate == compressed.rate
        assert [model["default"] for model in client.variants()["models"]].count(True) == 1
        with pytest.raises(BudgetUnmeetable, match="at least"):
            client.compress(tmp_path / "in.png", max_bytes=20)
    back = read_photo(restored.image, 10**6)
    assert psnr(back, parrots) > psnr(degraded, parrots) + 3

    async def many() -> list[int]:
        async with AsyncClient(guarded, "sesame") as client:
            answers = await asyncio.gather(*(client.compress(tmp_path / "in.png", rate=r) for r in range(1, 9)))
            return [len(answer.bitstream) for answer in answers]

    sizes = asyncio.run(many())
    assert sizes == sorted(sizes)
    with Client(guarded, "wrong") as client, pytest.raises(Unauthorized):
        client.variants()

"""`deploy.camera`: streams as cameras send them, whole or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest

from deploy.camera import boundary, camera_frames, parts, snapshot, steady, thinned
from tests.served import Quiet, answering


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_is_cut_into_its_parts_however_it_arrives(size: int) -> None:
    body = b"".join(
        b"--x y\r\nContent-Type: image/jpeg\r\n\r\n" + part + b"\r\n" for part in (b"one", b"two\r\n", b"cut")
    )

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def all_parts() -> list[bytes]:
        return [part async for part in parts(chunks(), boundary('multipart/x-mixed-replace; boundary="--x y"'))]

    assert asyncio.run(all_parts()) == [b"one", b"two\r\n"]


async def parts_of(*chunks: bytes, then: BaseException | None = None) -> list[bytes]:
    async def arriving() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        if then:
            raise then

    found = []
    with suppress(httpx.ReadTimeout):
        async for part in parts(arriving(), b"--frame"):
            found.append(part)  # noqa: PERF401
    return found


def test_a_part_that_tells_its_length_is_whole_when_it_is_there() -> None:
    """A camera that films on motion only sends the next boundary minutes later; and a JPEG may hold any bytes."""
    photo = b"\xff\xd8 --frame\r\n\r\n\xff\xd9"
    part = b"--frame\r\ncontent-length: %d\r\nContent-Type: image/jpeg\r\n\r\n%s" % (len(photo), photo)
    quiet = httpx.ReadTimeout("ten seconds")
    assert asyncio.run(parts_of(part, then=quiet)) == [photo]
    assert asyncio.run(parts_of(part[:-1], part[-1:] + b"\r\n" + part, then=quiet)) == [photo, photo]
    assert asyncio.run(parts_of(part[:-1], then=quiet)) == []


def test_a_stream_of_bare_line_feeds_is_read() -> None:
    body = b"".join(b"--frame\nContent-Type: image/jpeg\n\n" + part + b"\n" for part in (b"one", b"t\r\n\r\nwo", b""))
    assert asyncio.run(parts_of(body + b"--frame\n")) == [b"one", b"t\r\n\r\nwo"]


def test_a_stream_can_be_thinned() -> None:
    async def film() -> AsyncIterator[bytes]:
        for number in range(8):
            yield bytes([number])
            await asyncio.sleep(0.05)

    async def kept(every: float) -> list[int]:
        return [frame[0] async for frame in thinned(film(), every)]

    assert asyncio.run(kept(0)) == list(range(8))
    first, *others = asyncio.run(kept(0.17))
    assert first == 0
    assert 1 <= len(others) <= 2


def test_a_stream_that_names_no_boundary_is_not_cut() -> None:
    assert boundary("multipart/x-mixed-replace;Boundary=abc") == b"--abc"
    with pytest.raises(httpx.RemoteProtocolError, match="boundary"):
        boundary("multipart/x-mixed-replace")


def test_a_password_of_a_camera_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Camera(Quiet):
        def do_GET(self) -> None:
            self.send_error(401)

    async def first() -> None:
        asked = asyncio.ensure_future(anext(camera_frames(url.replace("//", "//admin:hunter2@"), 1)))
        async with asyncio.timeout(20):
            while "it answers 401" not in caplog.text:
                await asyncio.sleep(0.02)
        asked.cancel()

    with answering(Camera) as url:
        asyncio.run(first())
    assert "it answers 401" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_camera_is_asked_again_after_whatever_it_answered(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([(401, "text/plain", b"no"), (200, "text/html", b"log in"), (200, "image/jpeg", b"")])
    photo = b"\xff\xd8photo"  # as some cameras send it

    class Camera(Quiet):
        def do_GET(self) -> None:
            status, kind, body = next(answers, (200, "text/plain", photo))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    async def first() -> bytes:
        async with asyncio.timeout(30):
            return await anext(camera_frames(url, 1))

    with answering(Camera) as url:
        assert asyncio.run(first()) == photo
    said = [line.getMessage() for line in caplog.records]
    assert [words in line for words, line in zip(("401", "got text/html", "empty"), said, strict=True)] == [True] * 3


def test_a_stream_may_be_silent_where_an_answer_may_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A camera that films on motion only has nothing to send for long."""
    monkeypatch.setattr("deploy.camera.PATIENCE", 1.0)
    asked = 0

    class Camera(Quiet):
        def do_GET(self) -> None:
            nonlocal asked
            asked += 1
            if asked == 1:
                time.sleep(2.5)
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for part in (b"one", b"two"):
                self.wfile.write(b"--frame\r\nContent-Length: 3\r\n\r\n" + part)
                time.sleep(1.5)

    async def film() -> list[bytes]:
        frames = camera_frames(url, None)
        async with asyncio.timeout(30):
            return [await anext(frames), await anext(frames)]

    with answering(Camera) as url:
        assert asyncio.run(film()) == [b"one", b"two"]
    assert asked == 2
    assert [line.getMessage() for line in caplog.records] == ["camera: TimeoutError: it is silent"]


def test_a_snapshot_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.camera.PATIENCE", 0.05)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(snapshot(steady(stalled())))


def test_a_snapshot_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.camera.LARGEST_FRAME", 1000)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100

    with pytest.raises(httpx.RemoteProtocolError, match="more than 1000 bytes"):
        asyncio.run(snapshot(endless()))


def test_a_part_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.camera.LARGEST_FRAME", 1000)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100

    async def all_parts() -> list[bytes]:
        return [part async for part in parts(endless(), b"--frame")]

    with pytest.raises(httpx.RemoteProtocolError, match="no boundary"):
        asyncio.run(all_parts())

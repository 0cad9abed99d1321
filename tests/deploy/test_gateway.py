"""The camera gateway against a real service that is killed and comes back, with a camera and with a folder."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from deploy.gateway import Gateway, State, _film, greet
from service.client import AsyncClient
from service.codec.bitstream import Bitstream
from service.engine import Engine, Photo
from service.files import write_whole
from tests.conftest import image_bytes, until
from tests.served import Quiet, answering, free_port, served

FRAMES, BUDGET = 24, 3000


def frame(bikes: Photo, index: int) -> bytes:
    """A frame that tells its number in five black or white squares."""
    picture = np.array(bikes[:96, :160])
    for bit in range(5):
        picture[:32, 32 * bit : 32 * (bit + 1)] = 255 * (index >> bit & 1)
    return image_bytes(picture, "JPEG", quality=90)


def number(photo: Photo) -> int:
    return sum((photo[8:24, 32 * bit + 8 : 32 * bit + 24].mean() > 128) << bit for bit in range(5))


async def run_until(holds: Callable[[], object], gateway: Gateway, poll: float, looks: int = 5) -> None:
    """Let a gateway work until something holds and it has looked a few times more, then stop it.

    Raises:
        TimeoutError: it never holds.
    """
    stop, looked = asyncio.Event(), 0
    waiting = gateway.waiting

    def counted() -> list[tuple[Path, State]]:
        nonlocal looked
        looked += 1
        return waiting()

    gateway.waiting = counted  # type: ignore[method-assign]
    work = asyncio.create_task(gateway.run(stop, poll))
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)
        enough = looked + looks
        while looked < enough:
            await asyncio.sleep(0.01)
    assert not work.done()
    stop.set()
    await work


class Service:
    """A service that takes every frame but `b"bad"`, and keeps what it got."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(await request.aread())
        if self.sent[-1] == b"bad":
            return httpx.Response(422, json={"type": "urn:limpid:problem:corrupt-image", "detail": "truncated"})
        headers = {"limpid-rate": "4", "limpid-bpp": "0.5", "limpid-model": "m"}
        return httpx.Response(200, content=b"of " + self.sent[-1], headers=headers)

    def client(self) -> AsyncClient:
        return AsyncClient("x", transport=httpx.MockTransport(self))


def always(answer: httpx.Response) -> tuple[AsyncClient, list[httpx.Request]]:
    """A client that gets one answer to everything, and what it asked."""
    asked: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return answer

    return AsyncClient("http://x", transport=httpx.MockTransport(handler)), asked


@contextmanager
def camera(frames: list[bytes]) -> Iterator[str]:
    """An MJPEG camera that films `frames` once, ten a second, and then only holds the line."""
    waiting = iter(frames)

    class Film(Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for data in waiting:
                head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
                self.wfile.write(head + data + b"\r\n")
                time.sleep(0.1)
            self.wfile.write(b"--frame\r\n")
            done.wait(60)

    done = threading.Event()
    with answering(Film) as url:
        yield f"{url}stream.mjpg"
        done.set()


@contextmanager
def gateway(frames: Path, out: Path, port: int, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "deploy.gateway", str(frames), str(out), "--url", f"http://127.0.0.1:{port}"]
    process = subprocess.Popen([*command, "--max-bytes", str(BUDGET), *args], stderr=subprocess.DEVNULL)
    yield process
    process.terminate()
    assert process.wait(60) in (0, -9)


def check(out: Path, engine: Engine) -> None:
    """Every frame has arrived, each within the budget and each only once."""
    streams = [path.read_bytes() for path in sorted(out.glob("*.lmp"))]
    assert all(len(data) <= BUDGET for data in streams)
    assert [number(engine.decode([Bitstream.from_bytes(data)])[0]) for data in streams] == list(range(FRAMES))


def test_no_frame_of_a_camera_is_lost_while_the_service_restarts(tmp_path: Path, bikes: Photo, engine: Engine) -> None:
    frames, out, port = tmp_path / "frames", tmp_path / "out", free_port()
    with camera([frame(bikes, index) for index in range(FRAMES)]) as film:
        with served(port) as (_, process), gateway(frames, out, port, "--camera", film):
            until(lambda: len(list(out.glob("*.lmp"))) >= 3)
            process.kill()
            process.wait()
            until(lambda: len(list(frames.glob("*.jpg"))) + len(list(out.glob("*.lmp"))) >= FRAMES)
            assert len(list(out.glob("*.lmp"))) < FRAMES
            with served(port):
                until(lambda: len(list(out.glob("*.lmp"))) == FRAMES)
        assert not list(frames.glob("*.jpg"))
    check(out, engine)


def test_no_frame_of_a_folder_is_lost_when_the_gateway_is_killed(tmp_path: Path, bikes: Photo, engine: Engine) -> None:
    frames, out, port = tmp_path / "frames", tmp_path / "out", free_port()
    frames.mkdir()
    for index in range(FRAMES):
        (frames / f"{index:03}.jpg").write_bytes(frame(bikes, index))
    (frames / "bad.jpg").write_bytes(b"no photo")
    with served(port):
        with gateway(frames, out, port, "--at-once", "1") as process:
            until(lambda: len(list(out.glob("*.lmp"))) >= 3)
            process.kill()
        assert len(list(out.glob("*.lmp"))) < FRAMES
        with gateway(frames, out, port):
            until(lambda: len(list(out.glob("*.lmp"))) == FRAMES and (out / "refused/bad.jpg").exists())
    assert "not-an-image" in (out / "refused/bad.jpg.txt").read_text()
    assert len(list(frames.glob("*.jpg"))) == FRAMES + 1
    check(out, engine)


def test_it_stops_at_once_while_frames_wait_for_a_service_that_is_silent(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(b"frame")

    async def silence(*_: object, **__: object) -> None:
        await asyncio.sleep(60)

    async def stopped_after() -> float:
        async with AsyncClient("http://127.0.0.1:9") as limpid:
            limpid.compress = silence  # type: ignore[assignment, method-assign]
            stop = asyncio.Event()
            work = asyncio.create_task(Gateway(limpid, tmp_path, tmp_path / "out", {}, 1, False).run(stop, 0.05))
            await asyncio.sleep(0.3)
            stop.set()
            start = time.monotonic()
            await work
            return time.monotonic() - start

    assert asyncio.run(stopped_after()) < 1
    assert len(list(tmp_path.glob("*.jpg"))) == 3


def test_a_frame_that_has_its_result_goes_if_the_last_stop_left_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, frame_time, result_time in (("left", 20, 20), ("new", 30, 20), ("early", 10, 20)):
        (tmp_path / f"{name}.jpg").write_bytes(b"frame")
        (out / f"{name}.jpg.lmp").write_bytes(b"result")
        os.utime(tmp_path / f"{name}.jpg", (frame_time, frame_time))
        os.utime(out / f"{name}.jpg.lmp", (result_time, result_time))

    async def waiting(delete: bool) -> list[str]:
        async with AsyncClient("http://127.0.0.1:9") as limpid:
            gateway = Gateway(limpid, tmp_path, out, {}, 1, delete)
            gateway.waiting()
            return [path.name for path, _ in gateway.waiting()]

    assert asyncio.run(waiting(delete=False)) == ["early.jpg", "new.jpg"]
    os.chmod(tmp_path / "left.jpg", 0o600)
    os.link(tmp_path / "left.jpg", tmp_path / "backup")
    assert asyncio.run(waiting(delete=False)) == ["early.jpg", "new.jpg"]
    (tmp_path / "left.jpg").unlink()
    (tmp_path / "left.jpg").write_bytes(b"frame")
    os.utime(tmp_path / "left.jpg", (20, 20))
    os.utime(out / "left.jpg.lmp", (20, 20))
    assert asyncio.run(waiting(delete=True)) == ["early.jpg", "new.jpg"]
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["early.jpg", "new.jpg"]


def test_a_frame_that_goes_while_it_waits_its_turn_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.gateway.PAUSE", 1000)  # what a frame that is gone need not have

    class Taking(Service):
        async def __call__(self, request: httpx.Request) -> httpx.Response:
            (tmp_path / "b.jpg").unlink(missing_ok=True)
            return await super().__call__(request)

    service = Taking()

    async def work() -> None:
        async with service.client() as limpid:
            for name in "abc":
                (tmp_path / f"{name}.jpg").write_bytes(name.encode())
            await run_until(
                lambda: len(service.sent) == 2, Gateway(limpid, tmp_path, tmp_path / "out", {}, 1, False), 0.02
            )

    asyncio.run(work())
    assert service.sent == [b"a", b"c"]


def test_a_frame_that_came_after_the_result_of_its_name_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.jpg.lmp").write_bytes(b"result")
    time.sleep(0.05)  # more than a tick of the file system's clock
    (tmp_path / "a.jpg").write_bytes(b"another frame")
    os.utime(tmp_path / "a.jpg", (10, 10))  # delivered with the time at which it was taken

    async def start() -> None:
        async with AsyncClient("http://127.0.0.1:9") as limpid:
            Gateway(limpid, tmp_path, out, {}, 1, True)

    asyncio.run(start())
    assert (tmp_path / "a.jpg").exists()


@pytest.mark.parametrize("delete", [True, False])
def test_a_new_frame_of_a_known_name_is_sent_once_and_takes_nothing_away(tmp_path: Path, delete: bool) -> None:
    service, out, path = Service(), tmp_path / "out", tmp_path / "snapshot.jpg"
    frames, written = (b"one", b"bad", b"two", b"two"), 0

    def all_settled(gateway: Gateway) -> bool:
        """Writes each frame once what became of those before lies where it should, and nothing is under way."""
        nonlocal written
        settled = len([*out.glob("*.lmp"), *(out / "refused").glob("*.jpg")])
        if settled < written or gateway._under_way or (delete and path.exists()):
            return False
        if written == len(frames):
            return True
        path.write_bytes(frames[written])
        written += 1
        return False

    async def work() -> None:
        async with service.client() as limpid:
            gateway = Gateway(limpid, tmp_path, out, {}, 1, delete)
            await run_until(lambda: all_settled(gateway), gateway, 0.02)

    asyncio.run(work())
    assert service.sent == [b"one", b"bad", b"two", b"two"]
    assert sorted(result.read_bytes() for result in out.glob("*.lmp")) == [b"of one", b"of two", b"of two"]
    assert [result.read_bytes() for result in (out / "refused").glob("*.jpg")] == [b"bad"]
    assert path.exists() is not delete


def test_what_is_no_frame_is_told_once_and_holds_up_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service, out = Service(), tmp_path / "out"
    (tmp_path / "2026.jpg").mkdir()
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    (tmp_path / "z.jpg").write_bytes(b"good")

    async def work() -> None:
        async with service.client() as limpid:
            await run_until((out / "z.jpg.lmp").exists, Gateway(limpid, tmp_path, out, {}, 1, False), 0.02)

    asyncio.run(work())
    assert service.sent == [b"good"]
    assert sorted(line.getMessage().partition(":")[0] for line in caplog.records) == ["2026.jpg", "round.jpg"]


def test_a_folder_that_is_away_for_a_while_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.gateway.PAUSE", 0.01)
    service, out = Service(), tmp_path / "out"
    (tmp_path / "a.jpg").write_bytes(b"frame")

    async def work() -> None:
        async with service.client() as limpid:
            gateway = Gateway(limpid, tmp_path, out, {}, 1, False)
            out.rename(tmp_path / "away")
            asyncio.get_running_loop().call_later(0.1, (tmp_path / "away").rename, out)
            await run_until((out / "a.jpg.lmp").exists, gateway, 0.02)

    asyncio.run(work())
    assert service.sent == [b"frame"]


def test_while_results_cannot_be_written_frames_are_sent_ever_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.gateway.PAUSE", 0.05)
    service, times = Service(), []
    (tmp_path / "a.jpg").write_bytes(b"frame")

    def full(*_: object, **__: object) -> None:
        times.append(time.monotonic())
        if len(times) < 5:
            raise OSError(28, "No space left on device")

    async def work() -> None:
        async with service.client() as limpid:
            gateway = Gateway(limpid, tmp_path, tmp_path / "out", {}, 1, False)
            await run_until(lambda: len(times) >= 5, gateway, 0.01, looks=1)

    monkeypatch.setattr("deploy.gateway.write_whole", full)
    asyncio.run(work())
    pauses = np.diff(times[:5])
    assert (pauses >= [0.05, 0.1, 0.2, 0.4]).all()


def test_frames_that_are_done_cost_little_at_each_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay without --delete, a day's at a time. One whose result is taken away is to do again."""
    service, out = Service(), tmp_path / "out"
    for index in range(20):
        (tmp_path / f"{index:02}.jpg").write_bytes(b"frame")

    async def work() -> None:
        async with service.client() as limpid:
            gateway = Gateway(limpid, tmp_path, out, {}, 4, False)
            await run_until(lambda: len(list(out.glob("*.lmp"))) == 20, gateway, 0.01)
            await asyncio.to_thread(gateway.waiting)
            looked_at: list[str] = []

            def none(name: str) -> list[Path]:
                looked_at.append(name)
                return []

            monkeypatch.setattr(gateway, "_results", none)
            assert gateway.waiting() == []
            assert looked_at == []
            (out / "07.jpg.lmp").unlink()
            gateway.waiting()
            assert [path.name for path, _ in gateway.waiting()] == ["07.jpg"]

    asyncio.run(work())


def test_it_needs_no_more_than_httpx() -> None:
    script = (
        "import sys, deploy.gateway; print(sorted({'torch', 'numpy', 'PIL', 'pydantic', 'tqdm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("wrong", [["a-file", "out"], ["frames", "out", "--camera", "http://cam:port/x"]])
def test_what_it_is_started_with_wrongly_is_told_in_a_line(tmp_path: Path, wrong: list[str]) -> None:
    (tmp_path / "a-file").touch()
    command = [sys.executable, "-m", "deploy.gateway", *wrong, "--url", "http://127.0.0.1:9"]
    there = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("python -m deploy.gateway: error: ")


@pytest.mark.parametrize(("effort", "most"), [(0, 0), (None, 0), (4, 8), (4, 3), (1, None)])
@pytest.mark.parametrize("model", [None, "edge-8", "edge-7"])
def test_what_the_service_does_not_offer_is_told_at_once(
    caplog: pytest.LogCaptureFixture, effort: int | None, most: int | None, model: str | None
) -> None:
    offered = {"models": [{"name": "edge-8"}], **({} if most is None else {"max_effort": most})}

    async def work() -> None:
        answer = httpx.MockTransport(lambda _: httpx.Response(200, json=offered))
        async with AsyncClient("http://x", transport=answer) as limpid:
            await greet("http://me:hunter2@x", limpid, {"effort": effort, "model": model})

    caplog.set_level("INFO")
    asyncio.run(work())
    assert "serves edge-8" in caplog.text
    assert "hunter2" not in caplog.text
    assert ("allows an effort of" in caplog.text) is ((effort or 0) > (most or 0))
    assert ("has no model edge-7" in caplog.text) is (model == "edge-7")


@pytest.mark.parametrize(
    ("status", "slug", "refused"),
    [(404, "not-found", False), (400, "malformed-request", False), (422, "unknown-model", False),
     (504, "deadline-exceeded", False), (422, "corrupt-image", True)],
)  # fmt: skip
def test_only_what_the_frame_is_to_blame_for_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, slug: str, refused: bool
) -> None:
    monkeypatch.setattr("deploy.gateway.PAUSE", 0.01)
    (tmp_path / "a.TIF").write_bytes(b"frame")
    client, asked = always(httpx.Response(status, json={"type": f"urn:limpid:problem:{slug}", "detail": "said so"}))

    async def work() -> None:
        async with client as limpid:
            gateway = Gateway(limpid, tmp_path, tmp_path / "out", {}, 1, False)
            await run_until(lambda: len(asked) >= (1 if refused else 2), gateway, 0.01, looks=20)

    asyncio.run(work())
    assert (tmp_path / "out/refused/a.TIF").exists() is refused
    assert (len(asked) == 1) is refused


def test_a_frame_whose_writer_pauses_is_not_lost(tmp_path: Path) -> None:
    sent: list[bytes] = []
    out, path = tmp_path / "out", tmp_path / "a.jpg"

    async def answer(request: httpx.Request) -> httpx.Response:
        sent.append(await request.aread())
        if len(sent) == 1:  # it goes on while the first part is under way
            path.write_bytes(b"whole frame")
        return httpx.Response(422, json={"type": "urn:limpid:problem:corrupt-image", "detail": "truncated"})

    async def work() -> None:
        async with AsyncClient("x", transport=httpx.MockTransport(answer)) as limpid:
            gateway = Gateway(limpid, tmp_path, out, {}, 1, True, 0.2)
            path.write_bytes(b"part")
            assert gateway.waiting() == []
            await asyncio.sleep(0.1)
            assert gateway.waiting() == []
            await run_until((out / "refused/a.jpg").exists, gateway, 0.02)

    asyncio.run(work())
    assert sent == [b"part", b"whole frame"]
    assert (out / "refused/a.jpg").read_bytes() == b"whole frame"


def test_the_rest_of_a_part_that_was_refused_is_not_lost(tmp_path: Path) -> None:
    """Where an upload stalls for longer than a frame has to be unchanged, its writer has it open still."""
    service, out = Service(), tmp_path / "out"

    async def work() -> None:
        async with service.client() as limpid:
            with (tmp_path / "a.jpg").open("wb", buffering=0) as upload:
                upload.write(b"bad")
                await run_until((out / "refused/a.jpg").exists, Gateway(limpid, tmp_path, out, {}, 1, True), 0.02)
                assert not (tmp_path / "a.jpg").exists()
                upload.write(b" and the rest")

    asyncio.run(work())
    assert (out / "refused/a.jpg").read_bytes() == b"bad and the rest"
    assert (out / "refused/a.jpg.txt").read_text() == "corrupt-image: truncated\n"


def test_what_is_no_frame_is_left_alone_at_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Though it has the name and the time of a result."""
    out = tmp_path / "out"
    (out / "refused").mkdir(parents=True)
    sidecar, reason = tmp_path / "a.jpg.txt", out / "refused/a.jpg.txt"
    for path in (sidecar, reason):
        path.write_text("bad")
        os.utime(path, ns=(10**18, 10**18))

    async def work() -> None:
        async with Service().client() as limpid:
            Gateway(limpid, tmp_path, out, {}, 1, True)

    asyncio.run(work())
    assert sidecar.exists()
    assert caplog.records == []


def test_a_service_that_asks_for_days_is_asked_again_sooner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.gateway.PAUSE", 0.01)
    monkeypatch.setattr("deploy.gateway.MOST_ASKED", 0.02)
    (tmp_path / "a.jpg").write_bytes(b"frame")
    client, asked = always(httpx.Response(503, headers={"Retry-After": "86400"}))

    async def work() -> None:
        async with client as limpid:
            gateway = Gateway(limpid, tmp_path, tmp_path / "out", {}, 1, False)
            await run_until(lambda: len(asked) >= 3, gateway, 0.01)

    asyncio.run(work())


def test_a_frame_that_may_not_be_read_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service, out = Service(), tmp_path / "out"
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    monkeypatch.setattr("os.access", lambda path, mode: path.name != "a.jpg")

    async def work() -> None:
        async with service.client() as limpid:
            await run_until((out / "b.jpg.lmp").exists, Gateway(limpid, tmp_path, out, {}, 1, False), 0.02)

    asyncio.run(work())
    assert service.sent == [b"b"]
    assert [line.getMessage() for line in caplog.records] == ["a.jpg: it may not be read; it is left alone for now"]


def test_a_frame_that_is_rewritten_while_its_result_is_written_is_sent_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, out, path = Service(), tmp_path / "out", tmp_path / "snapshot.jpg"

    def slow(result: Path, data: bytes, modified: int) -> None:
        write_whole(result, data, modified=modified)
        if len(service.sent) == 1:
            path.write_bytes(b"another")

    async def work() -> None:
        async with service.client() as limpid:
            path.write_bytes(b"one")
            gateway = Gateway(limpid, tmp_path, out, {}, 1, True)
            await run_until(lambda: len(service.sent) == 2 and not path.exists(), gateway, 0.02)

    monkeypatch.setattr("deploy.gateway.write_whole", slow)
    asyncio.run(work())
    assert service.sent == [b"one", b"another"]
    assert (out / "snapshot.jpg.lmp").read_bytes() == b"of another"


def test_snapshots_are_kept_while_there_is_room_for_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Camera(Quiet):
        asked = 0

        def do_GET(self) -> None:
            Camera.asked += 1
            body = b"snapshot %d" % Camera.asked
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def kept() -> list[bytes]:
        return [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]

    async def film() -> None:
        filming = asyncio.create_task(_film(url, 0.01, tmp_path, 3))
        async with asyncio.timeout(30):
            while "a new one is dropped" not in caplog.text:
                await asyncio.sleep(0.01)
            assert kept() == [b"snapshot 1", b"snapshot 2", b"snapshot 3"]
            min(tmp_path.glob("*.jpg")).unlink()
            while len(kept()) < 3:
                await asyncio.sleep(0.01)
        filming.cancel()

    with answering(Camera) as url:
        asyncio.run(film())
    assert kept()[:2] == [b"snapshot 2", b"snapshot 3"]
    assert kept()[2] not in (b"snapshot 1", b"snapshot 4")  # the fourth found no room


@pytest.mark.parametrize("kept", [1, 100, 10**7])
def test_a_frame_is_sent_once_whatever_times_its_result_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    service, frames, out, set_time = Service(), tmp_path / "in", tmp_path / "out", os.utime

    async def work() -> None:
        async with service.client() as limpid:
            gateway = Gateway(limpid, frames, out, {}, 1, False)
            await run_until(lambda: len(list(out.glob("*.lmp"))) == 3, gateway, 0.02)

    frames.mkdir()
    for name in "abc":
        (frames / f"{name}.jpg").write_bytes(name.encode())
    monkeypatch.setattr("os.utime", lambda path, ns: set_time(path, ns=(ns[0] // kept * kept, ns[1] // kept * kept)))
    asyncio.run(work())
    assert sorted(service.sent) == [b"a", b"b", b"c"]
    assert sorted(path.name for path in out.glob("*.lmp")) == ["a.jpg.lmp", "b.jpg.lmp", "c.jpg.lmp"]

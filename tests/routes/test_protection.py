"""Keys, CORS, failures of the device, and what one bad item does to its batch, through the whole app."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.app import _batcher, _load, create_app
from service.batching import _LEAST_PIXELS, Batcher, DeviceBroken, Limits
from service.codec.bitstream import Bitstream, Degradation, DegradationKind
from service.codec.shipped import Watch
from service.engine import DeviceFailure, EncodeJob, Engine, Photo, StageTimes
from service.exchange import Exchange
from service.routes.compress import _encode
from service.settings import Settings
from service.state import Service
from tests.conftest import copied_store, image_bytes, other_store, until, wait_ready

KEYS = "first-key,second-key"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Iterator[TestClient]:
    """An app of its own on the engine of all, with keys and one CORS origin."""
    monkeypatch.setattr("service.app._load", lambda settings: engine)
    monkeypatch.setenv("LIMPID_API_KEYS", KEYS)
    monkeypatch.setenv("LIMPID_CORS_ORIGINS", "https://example.org")
    with TestClient(create_app(Settings()), raise_server_exceptions=False) as client:
        wait_ready(client)
        client.headers["X-API-Key"] = "second-key"
        yield client


def state(client: TestClient) -> Service:
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    return service


def test_a_key_is_needed_where_keys_are_set(own: TestClient, bikes: Photo) -> None:
    data = image_bytes(bikes)
    assert own.post("/compress", content=data).status_code == 200
    bearer = {"Authorization": "Bearer first-key", "X-API-Key": ""}
    assert own.post("/compress", content=data, headers=bearer).status_code == 200
    for wrong in ({"X-API-Key": "third"}, {"X-API-Key": ""}, {"X-API-Key": "", "Authorization": "Basic first-key"}):
        answer = own.post("/compress", content=data, headers=wrong)
        assert answer.status_code == 401
        assert answer.json()["type"] == "urn:limpid:problem:invalid-api-key"
        assert "first-key" not in answer.text
        assert own.get("/variants", headers=wrong).status_code == 401
        assert own.post("/compress?rate=99", headers=wrong).status_code == 401  # whatever else is wrong
        assert own.post("/decompress", headers={**wrong, "Accept": "text/html"}).status_code == 401
    for open_path in ("/livez", "/readyz", "/metrics"):
        assert own.get(open_path, headers={"X-API-Key": ""}).status_code == 200


def test_openapi_tells_of_keys_and_of_the_headers_that_come(own: TestClient, client: TestClient, bikes: Photo) -> None:
    for asked, schemes in ((own, {"HTTPBearer", "APIKeyHeader"}), (client, set())):
        schema = asked.get("/openapi.json").json()
        assert set(schema["components"].get("securitySchemes", {})) == schemes
        for path, call in (("/compress", "post"), ("/decompress", "post"), ("/variants", "get")):
            assert {name for way in schema["paths"][path][call].get("security", []) for name in way} == schemes
    stream = client.post("/compress", content=image_bytes(bikes))
    for path, answer in (("/compress", stream), ("/decompress", client.post("/decompress", content=stream.content))):
        told = {name.lower() for name in schema["paths"][path]["post"]["responses"]["200"]["headers"]}
        assert {name for name in answer.headers if name.startswith("limpid")} < told <= set(answer.headers)


def test_cors_is_off_unless_an_origin_is_set(own: TestClient, client: TestClient) -> None:
    origin = {"Origin": "https://example.org"}
    assert own.get("/variants", headers=origin).headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in own.get("/variants", headers={"Origin": "https://evil.org"}).headers
    assert "access-control-allow-origin" not in client.get("/variants", headers=origin).headers


def test_a_page_of_an_allowed_origin_may_send_a_key_and_read_the_headers(own: TestClient) -> None:
    origin = {"Origin": "https://example.org"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key, limpid-timeout"}
    may = own.options("/compress", headers={**origin, **asks})
    assert may.status_code == 200
    assert {"x-api-key", "limpid-timeout"} <= set(may.headers["access-control-allow-headers"].lower().split(", "))
    assert own.get("/variants", headers=origin).headers["access-control-expose-headers"] == "*"


def test_a_page_of_an_allowed_origin_can_read_every_refusal(own: TestClient) -> None:
    origin = {"Origin": "https://example.org", "Content-Length": str(2**40)}
    answer = own.post("/compress", content=iter([b"x"]), headers=origin)
    assert answer.status_code == 413
    assert answer.headers["access-control-allow-origin"] == "https://example.org"


def test_settings_reach_the_batcher_and_every_variant_runs_before_the_service_is_ready(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copied_store(tmp_path / "store").add(other_store(tmp_path / "other", "edge-next"), "edge-next")
    ran: set[tuple[str | None, int]] = set()
    encode = Engine.encode

    def noted(self: Engine, jobs: Sequence[EncodeJob], *more: Any) -> list[Bitstream]:
        ran.update((job.model, job.rate) for job in jobs)
        return encode(self, jobs, *more)

    monkeypatch.setattr(Engine, "encode", noted)
    settings = Settings(
        store=tmp_path / "store", max_batch_items=3, max_batch_pixels=4, max_batch_wait_ms=20, max_queue_items=5
    )
    engine = _load(settings)
    assert len(engine.models) == 2
    assert ran == {(name, rate) for name in engine.models for rate in range(1, 9)}
    assert _batcher(engine, Service(settings))._limits == Limits(3, 4, 0.02, 5, settings.max_queue_bytes)


def test_seven_of_eight_succeed_beside_a_poisoned_item(
    own: TestClient, monkeypatch: pytest.MonkeyPatch, parrots: Photo
) -> None:
    """Slow requests keep the device busy; eight gather behind them in one batch, and one of them fails it."""
    encode, gathered = Engine.encode, Event()
    batches = []

    def injected(self: Engine, jobs: Sequence[EncodeJob], times: StageTimes, watch: Watch) -> list[Bitstream]:
        batches.append(len(jobs))
        if jobs[0].photo.shape[0] == 256:
            assert gathered.wait(60)
        if any((job.photo[0, 0] == 77).all() for job in jobs):
            raise RuntimeError("poison")
        return encode(self, jobs, times, watch)

    monkeypatch.setattr(Engine, "encode", injected)
    uploads = [parrots[:64, k : k + 64].copy() for k in range(8)]
    uploads[3][0, 0] = 77
    with ThreadPoolExecutor(10) as pool:
        slow = [pool.submit(own.post, "/compress", content=image_bytes(parrots)) for _ in range(2)]
        until(lambda: len(batches) == 2)
        answers = [pool.submit(own.post, "/compress", content=image_bytes(upload)) for upload in uploads]
        service = state(own).ready
        assert service
        until(lambda: service.batcher.waiting_items == 8)
        gathered.set()
        statuses = [answer.result().status_code for answer in answers]
        assert [one.result().status_code for one in slow] == [200, 200]
    assert statuses == [200, 200, 200, 500, 200, 200, 200, 200]
    assert 8 in batches
    assert 'limpid_batch_retries_total{reason="error"} 3.0' in own.get("/metrics").text


def test_what_nobody_waits_for_leaves_the_device(
    own: TestClient, monkeypatch: pytest.MonkeyPatch, parrots: Photo
) -> None:
    """Its deadline passes while it is in the transforms, which are held at their first step until then."""
    encode = Engine.encode
    ended: Queue[str] = Queue()
    answered = Event()

    class Held(Watch):
        def __init__(self, watch: Watch) -> None:
            self.step_of_all = watch.step

        def step(self) -> None:
            assert answered.wait(60)
            self.step_of_all()

    def listening(self: Engine, jobs: Sequence[EncodeJob], times: StageTimes, watch: Watch) -> list[Bitstream]:
        try:
            return encode(self, jobs, times, Held(watch))
        except RuntimeError as error:
            ended.put(str(error))
            raise

    monkeypatch.setattr(Engine, "encode", listening)
    late = {"X-API-Key": "first-key", "Limpid-Timeout": "2"}
    answer = own.post("/compress", content=image_bytes(parrots, "BMP"), headers=late)
    assert answer.status_code == 504
    series = own.get("/metrics").text
    assert "limpid_batches_in_progress 1.0" in series, "the device has it still"
    assert 'limpid_stage_duration_seconds_count{operation="compress",stage="queue"} 1.0' in series
    answered.set()
    assert ended.get(timeout=30) == "nobody waits for it any more"
    until(lambda: "limpid_batches_in_progress 0.0" in own.get("/metrics").text)
    assert 'limpid_batch_retries_total{reason="error"} 0.0' in own.get("/metrics").text


def test_a_failed_device_turns_the_service_unready_for_good(
    own: TestClient, monkeypatch: pytest.MonkeyPatch, bikes: Photo
) -> None:
    def failing(*_: object) -> None:
        raise DeviceFailure("cuda:0: an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "encode", failing)
    answer = own.post("/compress", content=image_bytes(bikes))
    assert answer.status_code == 503
    for path in ("/readyz", "/livez"):
        health = own.get(path)
        assert health.status_code == 503
        assert "illegal memory access" in health.json()["detail"]


def test_a_device_that_hangs_is_restarted(own: TestClient, monkeypatch: pytest.MonkeyPatch, bikes: Photo) -> None:
    """It has work, and makes no step of it."""
    monkeypatch.setattr("service.state.STALLED_S", 3.0)
    encode, begun, go = Engine.encode, Event(), Event()

    def hanging(self: Engine, jobs: Sequence[EncodeJob], times: StageTimes, watch: Watch) -> list[Bitstream]:
        begun.set()
        assert go.wait(60)
        return encode(self, jobs, times, watch)

    assert own.get("/livez").status_code == 200  # though it has been idle for longer
    monkeypatch.setattr(Engine, "encode", hanging)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own.post, "/compress", content=image_bytes(bikes))
        assert begun.wait(60)
        assert own.get("/livez").status_code == 200
        until(lambda: own.get("/livez").status_code == 503)
        assert "has made no step for 3 seconds" in own.get("/readyz").json()["detail"]
        go.set()
        assert answer.result().status_code == 200
    assert own.get("/livez").status_code == 200


def test_a_budget_takes_few_encodings(own: TestClient, monkeypatch: pytest.MonkeyPatch, bikes: Photo) -> None:
    passes = []
    encode = Engine.encode

    def counted(self: Engine, jobs: Sequence[EncodeJob], times: StageTimes, watch: Watch) -> list[Bitstream]:
        passes.append([job.rate for job in jobs])
        return encode(self, jobs, times, watch)

    data = image_bytes(np.tile(bikes, (2, 2, 1)))
    size = len(own.post("/compress", content=data, params={"rate": 5}).content)
    monkeypatch.setattr(Engine, "encode", counted)
    answer = own.post("/compress", content=data, params={"max_bytes": size})
    assert answer.headers["limpid-rate"] == "5"
    assert all(len(rates) == 1 for rates in passes)
    assert {(5,), (6,)} <= {tuple(rates) for rates in passes}
    assert len(passes) <= 4


def test_effort_ends_where_the_operator_says(own: TestClient, monkeypatch: pytest.MonkeyPatch, bikes: Photo) -> None:
    service = state(own)
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"max_effort": 1}))
    answers = [own.post(f"/compress?effort={effort}", content=image_bytes(bikes)) for effort in (1, 2)]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert "at most 1 here, got 2" in answers[1].json()["detail"]


def test_effort_makes_batches_smaller(bikes: Photo) -> None:
    asked: list[tuple[object, int]] = []

    async def submit(item: object, key: object, *, pixels: int, **_: object) -> None:
        asked.append((key, pixels))

    for effort in (0, 2):
        job = EncodeJob(bikes, 4, "edge-8", effort)
        asyncio.run(_encode(cast(Exchange, SimpleNamespace(submit=submit)), job, begun=False))
    (plain, small), (refined, large) = asked
    assert plain != refined
    assert (small, large) == (bikes[..., 0].size, 13 * bikes[..., 0].size)


def test_a_photo_that_no_effort_refines_does_not_make_others_look_fast(
    own: TestClient, bikes: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = state(own).ready
    assert service
    encode = service.engine.encode

    def as_rain(jobs: Sequence[EncodeJob], *more: Any) -> list[Bitstream]:
        rain = (Degradation(DegradationKind.RAIN, 0.5),)
        return [dataclasses.replace(one, degradations=rain) for one in encode(jobs, *more)]

    work = []
    for patched, effort in ((True, 0), (True, 2), (False, 0), (False, 2)):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(service.engine, "encode", as_rain)
            before = service.batcher._work
            assert own.post(f"/compress?effort={effort}", content=image_bytes(bikes)).status_code == 200
            work.append(service.batcher._work - 0.8 * before)
    pixels = bikes[..., 0].size
    assert pixels < _LEAST_PIXELS
    assert work == pytest.approx([*[_LEAST_PIXELS] * 3, 13 * pixels])


def test_a_device_without_memory_is_in_the_log(
    own: TestClient, bikes: Photo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = state(own).ready
    assert service

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(service.engine, "encode", full)
    answer = own.post("/compress", content=image_bytes(bikes))
    assert (answer.status_code, answer.json()["detail"]) == (503, "Out of memory")
    assert "request failed" in caplog.text


def test_who_would_come_too_late_is_refused_before_the_photo_is_read(
    own: TestClient, bikes: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = state(own).ready
    assert service
    with monkeypatch.context() as patch:
        patch.setattr(service.batcher, "waiting_items", 1)
        patch.setattr(Batcher, "seconds_ahead", 40.0)
        answer = own.post("/compress", content=image_bytes(bikes), headers={"Limpid-Timeout": "49"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "20")
    assert "too little time" in answer.json()["detail"]
    series = own.get("/metrics").text
    assert 'limpid_stage_duration_seconds_count{operation="compress",stage="image_decode"} 0.0' in series
    assert own.post("/compress", content=image_bytes(bikes)).status_code == 200


def test_bodies_are_admitted_up_to_the_bytes_of_the_queue(own: TestClient, bikes: Photo) -> None:
    service, data = state(own), image_bytes(bikes)
    service.body_bytes = service.settings.max_queue_bytes - 10
    answer = own.post("/compress", content=data)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    series = dict(line.split() for line in own.get("/metrics").text.splitlines() if "{" not in line and "#" not in line)
    assert float(series["limpid_bytes_in_progress"]) == service.body_bytes
    assert float(series["limpid_byte_limit"]) == service.settings.max_queue_bytes
    assert 'limpid_http_request_duration_seconds_count{operation="compress"} 0.0' in own.get("/metrics").text
    service.body_bytes = 0
    assert own.post("/compress", content=data).status_code == 200
    assert service.body_bytes == 0


def test_a_chunked_body_counts_as_it_comes(own: TestClient, bikes: Photo) -> None:
    service, data = state(own), image_bytes(bikes)
    service.body_bytes = others = service.settings.max_queue_bytes - 10
    answer = own.post("/compress", content=iter([data]))
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 429
    assert service.body_bytes == others
    service.body_bytes = 0
    assert own.post("/compress", content=iter([data])).status_code == 200
    assert service.body_bytes == 0


def test_image_work_that_outlives_its_request_keeps_its_place(
    own: TestClient, monkeypatch: pytest.MonkeyPatch, bikes: Photo
) -> None:
    service, begun, go = state(own), Queue[int](), Event()

    def stuck(data: bytes, _: int) -> Photo:
        begun.put(len(data))
        go.wait(60)
        return bikes

    monkeypatch.setattr("service.routes.compress.read_photo", stuck)
    assert service.ready
    threads = service.ready.image_threads._max_workers
    patience = {"Limpid-Timeout": "0.5"}
    data = image_bytes(bikes)
    with ThreadPoolExecutor(threads + 1) as pool:  # one more than can be worked on: that one holds nothing afterwards
        calls = [pool.submit(own.post, "/compress", content=data, headers=patience) for _ in range(threads + 1)]
        assert [call.result().status_code for call in calls] == [504] * (threads + 1)
    assert begun.qsize() == threads
    assert (service.admitted, service.body_bytes) == (threads, threads * len(data))
    assert f'limpid_requests_in_progress{{operation="compress"}} {float(threads)}' in own.get("/metrics").text
    go.set()
    until(lambda: not service.admitted)
    assert service.body_bytes == 0
    assert begun.qsize() == threads


def test_every_failure_begins_its_series_at_zero(own: TestClient) -> None:
    series = own.get("/metrics").text
    for status in ("200", "422", "429", "499", "500", "503", "504"):
        assert f'limpid_http_requests_total{{operation="compress",status="{status}"}} 0.0' in series
    assert 'limpid_stage_duration_seconds_count{operation="decompress",stage="transform"} 0.0' in series
    assert 'limpid_http_request_duration_seconds_count{operation="compress"} 0.0' in series
    for name in ("pixels_total", "bitstream_bytes_total", "image_bytes_total", "batch_size_count"):
        assert re.search(rf'limpid_{name}{{model="edge-\d+",operation="compress"}} 0.0', series), name
    assert len(re.findall(r'limpid_bits_per_pixel_count{model="edge-\d+",rate="[1-8]"} 0.0', series)) == 8


def test_a_failed_device_is_not_ready_in_the_metrics_either(own: TestClient) -> None:
    assert "limpid_ready 1.0" in own.get("/metrics").text
    service = state(own)
    assert service.ready
    service.ready.batcher.broken = DeviceBroken("the device is gone")
    assert "limpid_ready 0.0" in own.get("/metrics").text

"""SIGHUP: a new default without an interruption, old streams still readable, a store that was mended."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import threading
import weakref
from pathlib import Path
from typing import cast

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.app import create_app, reload_store
from service.engine import EncodeJob, Engine, Photo
from service.settings import Settings
from service.store import ModelStore, StoreError
from tests.conftest import copied_store, image_bytes, other_store, until
from tests.served import served


def test_a_new_default_is_taken_up_under_load_and_old_streams_stay_readable(tmp_path: Path, bikes: Photo) -> None:
    store = copied_store(tmp_path / "store")
    old, upload = store.index.default, image_bytes(bikes)
    with served(store=store.folder) as (base, process), httpx2.Client(base_url=base, timeout=60) as client:
        before = client.post("/compress", content=upload)
        assert before.headers["limpid-model"] == old

        done = threading.Event()
        statuses: list[int] = []

        def load() -> None:
            while not done.is_set():
                statuses.append(httpx2.post(f"{base}/compress", content=upload, timeout=60).status_code)

        clients = [threading.Thread(target=load) for _ in range(3)]
        for thread in clients:
            thread.start()
        store.add(other_store(tmp_path / "other", "edge-next"), "edge-next")
        store.set_default("edge-next")
        process.send_signal(signal.SIGHUP)
        until(lambda: client.post("/compress", content=upload).headers["limpid-model"] == "edge-next")
        done.set()
        for thread in clients:
            thread.join()
        assert set(statuses) == {200}

        back = client.post("/decompress", content=before.content)
        assert (back.status_code, back.headers["limpid-model"]) == (200, old)
        assert [model["default"] for model in client.get("/variants").json()["models"]] == [False, True]

        (store.folder / "store.json").write_text("{}")
        process.send_signal(signal.SIGHUP)
        until(lambda: 'limpid_store_reloads_total{outcome="failed"} 1.0' in client.get("/metrics").text)
        assert client.get("/readyz").status_code == 200
        assert client.post("/compress", content=upload).headers["limpid-model"] == "edge-next"


def test_new_weights_under_a_known_name_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    engine = Engine(copied_store(folder), "cpu")
    name = engine.default.entry.name
    other = other_store(tmp_path / "other", name)
    with pytest.raises(StoreError, match="new weights need a new name"):
        engine.refresh(other.folder)
    assert engine.default.entry.sha256 == ModelStore(folder).index.models[0].sha256


def test_a_model_that_cannot_run_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(copied_store(tmp_path / "store"), "cpu")
    before = engine.models
    other = other_store(tmp_path / "other", "edge-next")

    def fails(*_: object) -> None:
        raise RuntimeError("the device has no room for it")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "warm_up", fails)
        with pytest.raises(RuntimeError, match="no room"):
            engine.refresh(other.folder)
    assert engine.models is before
    assert engine.default.entry.name in before
    assert engine.refresh(other.folder) == ["edge-next"]


def test_streams_of_a_model_that_left_the_store_are_read_until_the_process_ends(tmp_path: Path, bikes: Photo) -> None:
    engine = Engine(copied_store(tmp_path / "store"), "cpu")
    streams = engine.encode([EncodeJob(bikes, 4)])
    assert engine.refresh(other_store(tmp_path / "other", "edge-next").folder) == ["edge-next"]
    assert engine.default.entry.name == "edge-next"
    assert engine.decode(streams)[0].shape == bikes.shape


def test_a_reload_keeps_the_loaded_models_and_nothing_of_what_was_told_before(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    engine = Engine(copied_store(folder), "cpu")
    name, same = engine.default.entry.name, engine.default
    assert engine.refresh(folder) == []
    assert engine.default is same
    before, codec = weakref.ref(same), same.codec
    index = json.loads((folder / "store.json").read_text())
    index["models"][0]["measured"].pop()
    (folder / "store.json").write_text(json.dumps(index))
    assert engine.refresh(folder) == []
    del same
    gc.collect()
    assert before() is None
    now = engine.models[name]
    assert len(now.entry.measured) == len(index["models"][0]["measured"])
    assert vars(now)["codec"] is codec  # at hand, whatever else is being loaded


def test_a_reload_asked_for_while_models_load_is_done_after() -> None:
    app = create_app(Settings())
    asyncio.run(reload_store(app.state.service))
    with TestClient(app) as client:
        until(lambda: 'limpid_store_reloads_total{outcome="done"} 1.0' in client.get("/metrics").text)
        assert not app.state.service.failure


def test_a_broken_store_is_told_at_readyz_and_may_be_mended(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text(json.dumps({"default": "a", "models": []}))
    with TestClient(create_app(Settings(store=tmp_path))) as client:
        until(lambda: "still loading" not in client.get("/readyz").text)
        answer = client.get("/readyz")
        assert "could not be loaded" in answer.json()["detail"]
        for refused in (answer, client.get("/livez"), client.post("/compress", content=b"x")):
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:limpid:problem:not-ready"
        assert "limpid_ready 0.0" in client.get("/metrics").text
        copied_store(tmp_path)  # an operator mends it and sends SIGHUP
        assert client.portal is not None
        client.portal.call(reload_store, cast(FastAPI, client.app).state.service)
        assert client.get("/readyz").status_code == 200
        assert 'limpid_store_reloads_total{outcome="done"} 1.0' in client.get("/metrics").text

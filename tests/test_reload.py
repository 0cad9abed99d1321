"""SIGHUP on a real server: a new default without an interruption, old streams still readable."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx2
import pytest

from service.engine import Engine, Photo
from service.store import ModelStore, StoreError
from tests.conftest import copied_store, image_bytes, other_store
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
        deadline = time.monotonic() + 60
        while client.post("/compress", content=upload).headers["limpid-model"] != "edge-next":
            assert time.monotonic() < deadline
        done.set()
        for thread in clients:
            thread.join()
        assert set(statuses) == {200}

        back = client.post("/decompress", content=before.content)
        assert (back.status_code, back.headers["limpid-model"]) == (200, old)
        assert [model["default"] for model in client.get("/variants").json()["models"]] == [False, True]

        (store.folder / "store.json").write_text("{}")
        process.send_signal(signal.SIGHUP)
        while 'limpid_store_reloads_total{outcome="failed"} 1.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get("/readyz").status_code == 200
        assert client.post("/compress", content=upload).headers["limpid-model"] == "edge-next"


def test_new_weights_under_a_known_name_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    engine = Engine(copied_store(folder), "cpu")
    name = engine.default.entry.name
    other = other_store(tmp_path / "other", name)
    with pytest.raises(StoreError, match="new weights need a new name"):
        engine.refresh(ModelStore(other.folder))
    assert engine.default.entry.sha256 == ModelStore(folder).index.models[0].sha256

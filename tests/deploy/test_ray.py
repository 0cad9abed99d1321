"""`deploy/ray/` on a real two-node Ray cluster on this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from model_store.images import psnr
from service.engine import Photo
from service.imaging import read_photo
from service.store import ModelStore
from tests.conftest import copied_store, image_bytes, noisy, other_store
from tests.served import free_port

ray = pytest.importorskip("ray", reason="the extra limpid[ray] is not installed")

ROOT = Path(__file__).parents[2]


class Cluster:
    """Two nodes with one CPU each, so that two replicas of one CPU each lie on different nodes."""

    def __init__(self, store: ModelStore) -> None:
        from ray import serve
        from ray.cluster_utils import Cluster as RayCluster

        self.store = store
        self.nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes.add_node(num_cpus=1)
        variables = {"PYTHONPATH": str(ROOT), "LIMPID_STORE": str(store.folder), "LIMPID_LOG_LEVEL": "error"}
        ray.init(address=self.nodes.address, runtime_env={"env_vars": variables}, log_to_driver=False)
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        self.deploy(store_version=1)

    def deploy(self, store_version: int) -> None:
        from ray import serve

        from deploy.ray.app import build

        args = {"min_replicas": 2, "max_replicas": 2, "store_version": store_version}
        serve.run(build(args), name="limpid", route_prefix="/")

    def close(self) -> None:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self.nodes.shutdown()

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        running = psutil.process_iter(["cmdline"])
        return [p for p in running if any("ServeReplica:limpid" in part for part in p.info["cmdline"] or [])]

    def answered(self, operation: str) -> float:
        """Answers with 200 of one replica, whichever Ray picks for /metrics."""
        lines = httpx2.get(f"{self.base}/metrics", timeout=30).text.splitlines()
        series = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return float(series[f'limpid_http_requests_total{{operation="{operation}",status="200"}}'])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Each node of a real cluster has a proxy that prefers its own replicas; here one proxy serves both nodes.
    os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
    cluster = Cluster(copied_store(tmp_path_factory.mktemp("ray") / "store"))
    yield cluster
    cluster.close()


@contextmanager
def load(base: str, upload: bytes, attempts: int) -> Iterator[list[int | str]]:
    """Four clients that post until the block ends, each call tried up to so often; yields their final outcomes."""
    done, outcomes = threading.Event(), []

    def client() -> None:
        while not done.is_set():
            for attempt in range(attempts):
                try:
                    outcome: int | str = httpx2.post(f"{base}/compress", content=upload, timeout=60).status_code
                except httpx2.TransportError as error:
                    outcome = type(error).__name__
                if outcome == 200:
                    break
                time.sleep(0.2 * 2**attempt)
            outcomes.append(outcome)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        yield outcomes
    finally:
        done.set()
        for thread in clients:
            thread.join()


def test_requests_spread_and_a_stream_of_one_replica_decodes_on_the_other(cluster: Cluster, parrots: Photo) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert len(cluster.replicas()) == 2
    degraded = noisy(parrots)
    streams = [httpx2.post(f"{cluster.base}/compress", content=image_bytes(degraded), timeout=60) for _ in range(12)]
    assert {answer.status_code for answer in streams} == {200}
    assert len({answer.content for answer in streams}) == 1
    backs = [httpx2.post(f"{cluster.base}/decompress", content=streams[0].content, timeout=60) for _ in range(12)]
    assert {back.status_code for back in backs} == {200}
    assert psnr(read_photo(backs[-1].content, 10**6), parrots) > psnr(degraded, parrots) + 3
    for operation in ("compress", "decompress"):
        assert 0 < cluster.answered(operation) < 12  # neither none nor all, so the other had the rest


def test_a_rolling_update_of_the_store_loses_no_request(cluster: Cluster, tmp_path: Path, bikes: Photo) -> None:
    upload = image_bytes(bikes)
    old = httpx2.post(f"{cluster.base}/compress", content=upload, timeout=60)
    with load(cluster.base, upload, attempts=1) as outcomes:
        cluster.store.add(other_store(tmp_path / "other", "edge-next"), "edge-next")
        cluster.store.set_default("edge-next")
        cluster.deploy(store_version=2)
        deadline, seen = time.monotonic() + 60, 0
        while seen < 8:  # on both replicas
            answer = httpx2.post(f"{cluster.base}/compress", content=upload, timeout=60)
            seen = seen + 1 if answer.headers["limpid-model"] == "edge-next" else 0
            assert time.monotonic() < deadline
    assert set(outcomes) == {200}
    back = httpx2.post(f"{cluster.base}/decompress", content=old.content, timeout=60)
    assert (back.status_code, back.headers["limpid-model"]) == (200, old.headers["limpid-model"])


def test_clients_that_retry_see_no_failure_when_a_replica_is_killed(cluster: Cluster, bikes: Photo) -> None:
    before = {process.pid for process in cluster.replicas()}
    assert len(before) == 2
    with load(cluster.base, image_bytes(bikes), attempts=8) as outcomes:
        time.sleep(2)
        os.kill(min(before), signal.SIGKILL)
        deadline = time.monotonic() + 90
        while len({process.pid for process in cluster.replicas()} - {min(before)}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(2)
    assert len(outcomes) > 10
    assert set(outcomes) == {200}

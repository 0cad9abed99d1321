"""Alerts under promtool, and every query of the dashboard on a real Prometheus that scrapes a real, busy service."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
import yaml

from service.engine import Photo
from tests.conftest import image_bytes, noisy, until
from tests.served import free_port, served

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "limpid.json"
UNPACKED = Path(sys.prefix) / "debian" / "usr" / "bin"
DECOMPRESSED = 'limpid_http_requests_total{operation="decompress", status="200"}'


def binary(name: str) -> str:
    found = shutil.which(name, path=f"{UNPACKED}:{os.environ['PATH']}")
    if found is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not here; `make test` unpacks it where there is apt")
    assert found, f"{name} is not here"
    return found


def test_the_configuration_is_valid() -> None:
    subprocess.run([binary("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yml"], check=True)


def test_every_alert_fires_when_it_should_and_stays_silent_when_not() -> None:
    tests = DEPLOY / "prometheus" / "alerts_test.yml"
    result = subprocess.run([binary("promtool"), "test", "rules", tests], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_test_a_runbook_line_and_a_place_in_the_guide() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    cases = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    tested = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert {rule["alert"] for rule in rules} == tested
    guide = (DEPLOY.parent / "docs" / "operations.md").read_text()
    for rule in rules:
        assert rule["annotations"]["runbook"]
        assert rule["alert"] in guide


def test_the_committed_dashboard_is_what_its_code_makes() -> None:
    spec = importlib.util.spec_from_file_location("dashboard", DEPLOY / "grafana" / "dashboard.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboard"] = module
    spec.loader.exec_module(module)
    assert module.build() == DASHBOARD.read_text()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, bikes: Photo) -> Iterator[str]:
    """A Prometheus that scraped a service under a little load every second, until it could tell a rate."""
    command, folder = binary("prometheus"), tmp_path_factory.mktemp("prometheus")
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with served() as (service, _):
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [service.removeprefix("http://")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        flags = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        process = subprocess.Popen(
            [command, *flags, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
        )
        try:
            with httpx2.Client(timeout=30) as client:
                upload = image_bytes(noisy(bikes), "JPEG")
                sent = 0

                def seen() -> bool:
                    """After a little more load: Prometheus can tell a rate of it."""
                    nonlocal sent
                    for rate in range(1, 9):
                        stream = client.post(f"{service}/compress", params={"rate": rate}, content=upload).content
                    assert client.post(f"{service}/decompress", content=stream).status_code == 200
                    assert client.post(f"{service}/compress", content=b"no photo").status_code == 415
                    sent += 1
                    with suppress(httpx2.TransportError):  # it may not listen yet
                        return bool(ask(base, f"count_over_time({DECOMPRESSED}[10s]) >= 4"))
                    return False

                until(seen)
                until(lambda: ask(base, f"{DECOMPRESSED} == {sent}"))  # the last scrape has seen all of it
            yield base
        finally:
            process.terminate()
            process.wait(20)


def ask(base: str, query: str) -> list[dict[str, object]]:
    answer = httpx2.get(f"{base}/api/v1/query", params={"query": query}, timeout=20).json()
    assert answer["status"] == "success", answer
    found: list[dict[str, object]] = answer["data"]["result"]
    return found


def test_no_query_of_the_dashboard_comes_back_empty(prometheus: str) -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    queries = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    assert len(queries) > 20
    for title, query in queries:
        resolved = re.sub(r"\$(namespace|job|instance)", ".*", query)
        resolved = re.sub(r"\$__(rate_interval|range)", "10s", resolved)
        assert "$" not in resolved
        rows = ask(prometheus, resolved)
        assert rows, f"{title}: {query}"
        values = [row["value"][1] for row in rows]  # type: ignore[index]
        assert any(value != "NaN" for value in values), f"{title}: {query}: {values}"


def test_every_alert_is_evaluated_without_an_error_and_none_fires_on_a_healthy_service(prometheus: str) -> None:
    groups = httpx2.get(f"{prometheus}/api/v1/rules", timeout=20).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 11
    for rule in rules:
        assert rule["health"] == "ok", rule
        assert rule["state"] == "inactive", rule


def test_the_counted_traffic_is_the_traffic(prometheus: str) -> None:
    (compressed,) = ask(prometheus, 'limpid_http_requests_total{operation="compress", status="200"}')
    (refused,) = ask(prometheus, 'limpid_rejected_total{reason="not-an-image"}')
    compressed_n, refused_n = (int(row["value"][1]) for row in (compressed, refused))  # type: ignore[index]
    assert compressed_n == 8 * refused_n > 0

"""`docker-compose.yml` and `deploy/Dockerfile`: what can be checked where no container engine runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.served import free_port

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
OURS = {name: service for name, service in COMPOSE["services"].items() if "build" in service}


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def instructions(stage: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of one stage, continuation lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    lines = [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    found, current = [], ""
    for line in lines:
        name, _, rest = line.partition(" ")
        if name == "FROM":
            current = rest.split()[-1]
        elif current == stage:
            found.append((name, rest.strip()))
    return found


def environment(stage: str) -> dict[str, str]:
    pairs = [pair for name, rest in instructions(stage) if name == "ENV" for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_compose_file_follows_the_published_schema() -> None:
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml")]
    subprocess.run(check, check=True)


def test_the_dockerfile_passes_hadolint() -> None:
    result = subprocess.run([tool("hadolint"), "deploy/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_mounted_file_exists() -> None:
    mounts = [volume for service in COMPOSE["services"].values() for volume in service["volumes"]]
    sources = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(sources) >= 5
    for source in sources:
        assert (ROOT / source).exists(), source
    for named in (mount.split(":")[0] for mount in mounts if not mount.startswith(".")):
        assert named in COMPOSE["volumes"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["healthcheck"]["test"][0] == "CMD"


def test_the_ports_and_paths_of_image_compose_and_prometheus_agree() -> None:
    settings = environment("cpu")
    port = settings["LIMPID_PORT"]
    assert ("EXPOSE", port) in instructions("cpu")
    user = dict(instructions("cpu"))["USER"]
    for service in OURS.values():
        assert service["ports"] == ["${PORT:-8000}:" + port]
        assert service["user"] == user
        assert service["volumes"] == [f"./model_store:{settings['LIMPID_STORE']}:ro"]
        assert f":{port}/readyz" in service["healthcheck"]["test"][-1]
        assert service["build"]["target"] in re.findall(r" AS (\w+)", DOCKERFILE)
        assert service["networks"]["default"]["aliases"] == ["limpid"]
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == [f"limpid:{port}"]


def test_grafana_finds_prometheus_and_its_dashboard_where_they_are_mounted() -> None:
    grafana = COMPOSE["services"]["grafana"]
    targets = {mount.split(":")[1] for mount in grafana["volumes"]}
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/limpid.yml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert f"{folder}/limpid.json" in targets
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/limpid.json"


def test_one_profile_runs_by_default_and_the_other_on_a_gpu() -> None:
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text()
    assert {service["profiles"][0] for service in OURS.values()} == {"cpu", "gpu"}


def test_the_commands_of_the_dockerfile_work_in_a_plain_virtual_environment(tmp_path: Path) -> None:
    """Dependencies come from the environment of the tests (a .pth file); everything else as in the image."""
    source, home, store = tmp_path / "src", tmp_path / "limpid", tmp_path / "store"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    packages = next((home / "lib").glob("python*")) / "site-packages"
    ours = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    for name, rest in instructions("build"):
        if name == "COPY":
            *paths, target = rest.split()
            for copied in paths:
                if (ROOT / copied).is_dir():
                    shutil.copytree(ROOT / copied, source / target / "", ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / copied, source / target)
        elif name == "RUN" and "--no-deps" in rest:
            shutil.rmtree(source / "build", ignore_errors=True)
            subprocess.run(
                rest, shell=True, check=True, cwd=source, env={**os.environ, "PATH": f"{home}/bin:/usr/bin:/bin"}
            )
    store.mkdir()
    for path in [ROOT / "model_store/store.json", *(ROOT / "model_store").glob("*.safetensors")]:
        shutil.copy(path, store)

    port = str(free_port())
    settings = {key: value for key, value in environment("cpu").items() if key.startswith("LIMPID_")}
    env = {**settings, "LIMPID_STORE": str(store), "LIMPID_PORT": port, "PATH": f"{home}/bin:/usr/bin:/bin"}
    (command,) = (rest for name, rest in instructions("cpu") if name == "CMD")
    (health,) = (rest for name, rest in instructions("cpu") if name == "HEALTHCHECK")
    check = yaml.safe_load(health.partition("CMD ")[2].replace(settings["LIMPID_PORT"], port))
    process = subprocess.Popen(yaml.safe_load(command), cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(check, env=env, stderr=subprocess.DEVNULL).returncode:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/variants") as answer:
            assert b"edge-1" in answer.read()
    finally:
        process.terminate()
        assert process.wait(60) == 0

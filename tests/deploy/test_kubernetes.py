"""`deploy/kubernetes/` and `deploy/ray/rayservice.yaml` against the published schemas, and against the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kubernetes" / "base"
OVERLAYS = sorted((BASE.parent / "overlays").iterdir())
MONITORING = BASE.parent / "monitoring"
VERSIONS = ("1.29", "1.33")

Manifest = dict[str, Any]


def load(path: Path) -> Manifest:
    manifest: Manifest = yaml.safe_load(path.read_text())
    return manifest


def merge(base: Any, patch: Any) -> Any:
    """A strategic merge as far as our patches go: maps by key, lists of named things by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merge(base[key], value) if key in base else value for key, value in patch.items()}
    if isinstance(base, list) and all("name" in item for item in [*base, *patch]):
        named = {item["name"]: item for item in base}
        return list((named | {item["name"]: merge(named.get(item["name"], {}), item) for item in patch}).values())
    return patch


def rendered(overlay: Path) -> list[Manifest]:
    """What `kubectl apply -k` sends."""
    kustomization = load(overlay / "kustomization.yaml")
    assert kustomization["resources"] == ["../../base"]
    manifests = [load(BASE / name) for name in load(BASE / "kustomization.yaml")["resources"]]
    for patch in (load(overlay / entry["path"]) for entry in kustomization["patches"]):
        index = next(i for i, m in enumerate(manifests) if m["kind"] == patch["kind"])
        manifests[index] = merge(manifests[index], patch)
    (image,) = kustomization["images"]
    for container in of_kind(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]:
        assert container["image"] == image["name"]
        container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


@pytest.fixture(params=OVERLAYS, ids=lambda path: path.name)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered(request.param)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_follows_the_published_schema(manifests: list[Manifest], version: str) -> None:
    assert len(manifests) == 5
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_manifest_with_a_typo_does_not_pass(manifests: list[Manifest]) -> None:
    deployment = of_kind(manifests, "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_the_pod_meets_the_restricted_standard(manifests: list[Manifest]) -> None:
    pod = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False  # else LIMPID_PORT is the Service's, an address
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]["memory"]


def test_the_grace_period_covers_prestop_drain_and_device(manifests: list[Manifest]) -> None:
    pod = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = next(float(entry["value"]) for entry in container["env"] if entry["name"] == "LIMPID_DRAIN_GRACE_S")
    sleep = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > sleep + drain + 5 + 7


def test_probes_settings_and_metrics_exist_in_the_service(manifests: list[Manifest]) -> None:
    from service.app import create_app

    app = create_app()
    paths = {getattr(route, "path", "") for route in app.routes} | set(app.openapi()["paths"])
    container = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert set(probes) <= paths
    for entry in container["env"]:
        assert entry["name"].removeprefix("LIMPID_").lower() in Settings.model_fields
    metrics = of_kind(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    series = {family.name for family in app.state.service.metrics.registry.collect()}
    assert {metric["pods"]["metric"]["name"] for metric in metrics} <= series


def test_every_selector_selects_the_pod(manifests: list[Manifest]) -> None:
    labels = of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind(manifests, "Service")["spec"]["selector"] == labels
    for kind, field in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert of_kind(manifests, kind)["spec"][field]["matchLabels"] == labels
    assert of_kind(manifests, "Service")["metadata"]["labels"] == labels


def test_the_monitor_scrapes_the_metrics_of_the_service(manifests: list[Manifest]) -> None:
    (name,) = load(MONITORING / "kustomization.yaml")["resources"]
    monitor, service = load(MONITORING / name)["spec"], of_kind(manifests, "Service")
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_the_ray_service_names_what_exists() -> None:
    service = load(ROOT / "deploy" / "ray" / "rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, _ = application["import_path"].partition(":")
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    cluster = service["spec"]["rayClusterConfig"]
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    policy = load(ROOT / "deploy" / "ray" / "networkpolicy.yaml")
    kubernetes_validate.validate(policy, VERSIONS[-1], strict=True)
    rules = [(port["port"], rule["from"]) for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    (operators,) = [who for port, who in rules if port == 8265]
    assert [one["podSelector"]["matchLabels"] for one in operators] == [{"app.kubernetes.io/name": "kuberay-operator"}]
    for template in templates:
        assert template["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
        assert template["spec"]["enableServiceLinks"] is False
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = template["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)

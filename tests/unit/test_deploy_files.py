"""What is deployed fits the service: its settings, its metrics, its health, and the runbook."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dedup_service.config.durations import parse_duration
from dedup_service.config.settings import SETTINGS, load_settings, variable_of
from dedup_service.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
COMPONENTS = ROOT / "deploy" / "kubernetes" / "components"
OBSERVABILITY = ROOT / "deploy" / "observability"

PODS = {
    "native-sidecar": COMPONENTS / "native-sidecar" / "sidecar.yaml",
    "plain-sidecar": COMPONENTS / "plain-sidecar" / "sidecar.yaml",
    "shared": ROOT / "deploy" / "kubernetes" / "shared" / "deployment.yaml",
}

# What Prometheus says of every target, and what redis_exporter shows.
METRICS_OF_OTHERS = {"up", "redis_evicted_keys_total", "redis_memory_used_bytes", "redis_memory_max_bytes"}


def pod(name: str) -> dict[str, Any]:
    """Return the pod of one way of deploying."""
    spec: dict[str, Any] = yaml.safe_load(PODS[name].read_text())["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    """Return the container of the service in it."""
    found: dict[str, Any] = next(
        one for one in pod(name).get("initContainers", []) + pod(name).get("containers", []) if one["name"] == "dedup"
    )
    return found


def image_environment() -> dict[str, str]:
    """Return the settings that the Dockerfile writes into the image."""
    return dict(re.findall(r"\b(DEDUP_[A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text()))


def environment(name: str) -> dict[str, str]:
    """Return the settings that the container of the service is started with."""
    written: dict[str, str]
    if name == "compose":
        written = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]["dedup"]["environment"]
    else:
        written = {one["name"]: one.get("value", "redis://redis:6379/0") for one in container(name)["env"]}
    return image_environment() | written


def queries() -> Iterator[str]:
    """Return every query of the dashboard and every expression of the alert rules."""
    dashboard = json.loads((OBSERVABILITY / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (annotation["expr"] for annotation in dashboard["annotations"]["list"])
    yield from (rule["expr"] for rule in alerts())


def alerts() -> list[dict[str, Any]]:
    """Return the alert rules."""
    groups = yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def shown_metrics() -> set[str]:
    """Return the name of every series that the service shows."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    families = Metrics("dedup.v1.DedupService", ("ClaimTransaction",), {"version": "0"}).registry.collect()
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


@pytest.mark.parametrize("name", [*PODS, "compose"])
def test_the_service_takes_its_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service would start with the variables of each way of deploying it; none is misspelt or refused."""
    for variable, value in environment(name).items():
        monkeypatch.setenv(variable, value)
    assert load_settings().store_url is not None


def test_every_variable_is_a_setting() -> None:
    """No file of the deployment names a variable that the service does not know."""
    files = [ROOT / "Dockerfile", ROOT / "docker-compose.yaml"]
    files += [file for file in (ROOT / "deploy").rglob("*") if file.suffix in {".yaml", ".tpl", ".json", ".md"}]
    named = {name: file for file in files for name in re.findall(r"\bDEDUP_[A-Z_]*[A-Z]", file.read_text())}
    known = {variable_of(name) for name in SETTINGS}
    assert {name: file for name, file in named.items() if name not in known} == {}


def test_every_metric_is_shown() -> None:
    """The dashboard and the alerts ask for series that the service shows, and for nothing else."""
    shown = shown_metrics()
    for query in queries():
        asked = set(re.findall(r"\b(?:dedup|grpc_server)_\w+", query))
        assert asked <= shown, query
        assert asked or set(re.findall(r"\w+", query)) & METRICS_OF_OTHERS, query


def test_every_alert_has_a_line_in_the_runbook() -> None:
    """Whoever is called by an alert finds a section of the runbook that says what to do."""
    headlines = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headlines}
    for rule in alerts():
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "docs/runbook.md"
        assert anchor in anchors, rule["alert"]


def test_every_alert_is_shown_to_ring() -> None:
    """No alert is without a case in which it rings."""
    shown = set(re.findall(r'alertname="(\w+)"', (OBSERVABILITY / "alerts_test.yaml").read_text()))
    assert {rule["alert"] for rule in alerts()} <= shown


@pytest.mark.parametrize("name", PODS)
def test_nothing_restarts_the_service_for_its_store(name: str) -> None:
    """While Redis is away no probe ends the service, since a restart would not bring Redis back."""
    probes = container(name)
    assert {probes[kind]["grpc"]["service"] for kind in ("startupProbe", "livenessProbe")} == {"liveness"}
    assert probes["readinessProbe"]["grpc"]["service"] == "readiness"
    assert {probes[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "liveness", "readiness")} == {
        int(environment(name)["DEDUP_HEALTH_LISTEN"].rpartition(":")[2])
    }


@pytest.mark.parametrize("name", PODS)
def test_the_drain_fits_into_the_grace_of_the_pod(name: str) -> None:
    """Calls under way get their grace before Kubernetes kills the pod."""
    sleep_s = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain_s = parse_duration(environment(name)["DEDUP_SHUTDOWN_GRACE"]) / 1000
    assert pod(name)["terminationGracePeriodSeconds"] >= sleep_s + drain_s + 5


def test_the_sidecars_differ_in_their_place_alone() -> None:
    """The native and the plain sidecar are the same container, but for what makes one of them native."""
    assert container("native-sidecar") == container("plain-sidecar") | {"restartPolicy": "Always"}

#!/usr/bin/env python3
"""Check the Dockerfile, the rendered manifests and charts, the alert rules and the dashboard."""
# ruff: noqa: S603
# Runs the tools and prints to a terminal.

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CHARTS = ROOT / "deploy" / "helm"
OBSERVABILITY = ROOT / "deploy" / "observability"

# The oldest supported Kubernetes: native sidecars need 1.29, the preStop sleep 1.30, and plain sidecars have the oldest
# available schema. NEWEST is the newest available schema.
OLDEST = {"native-sidecar": "1.29", "plain-sidecar": "1.25", "shared": "1.30", "shared-mutual-tls": "1.30"}
HELM_OLDEST = "1.30"
NEWEST = "1.37"

# Values that render the chart.
VALUES = (
    (),
    ("shared.tlsSecretName=dedup-tls",),
    ("settings.DEDUP_WORKERS=2", "shared.replicas=3", f"image.digest=sha256:{'0' * 64}"),
)
BAD_VALUES = ("readiness=maybe", "settings.DEDUP_LISTEN=0.0.0.0:1", "shared.replcas=2", "image.digest=latest")


class Failed(Exception):
    """A check failed; the message has the reason."""


def run(*command: str | Path) -> str:
    """Return a tool's output; raise Failed with it if the tool fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def validate(text: str, versions: set[str], what: str) -> None:
    """Validate rendered resources against these versions' strict schemas; raise Failed."""
    resources = [resource for resource in yaml.safe_load_all(text) if resource]
    if not resources:
        raise Failed(f"{what}: nothing was rendered")
    for resource in resources:
        for version in sorted(versions):
            try:
                kubernetes_validate.validate(resource, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                name = f"{resource['kind']}/{resource['metadata']['name']}"
                raise Failed(f"{what}: {name} on Kubernetes {version}: {error.message}") from None


def check_dockerfile() -> None:
    """Lint the Dockerfile."""
    run("hadolint", "--failure-threshold", "style", ROOT / "Dockerfile")


def check_kustomize() -> None:
    """Render and validate every overlay."""
    overlays = sorted(path.parent for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
    if {overlay.name for overlay in overlays} != set(OLDEST):
        raise Failed(f"OLDEST in {Path(__file__).name} does not name the overlays of {KUBERNETES}")
    for overlay in overlays:
        validate(run("kustomize", "build", overlay), {OLDEST[overlay.name], NEWEST}, f"kustomize {overlay.name}")


def check_helm() -> None:
    """Lint the chart, render and validate it and the example's, and see it reject invalid values."""
    run("helm", "lint", "--strict", CHARTS / "dedup")
    template = ("helm", "template", "--kube-version", HELM_OLDEST, "dedup")
    for values in VALUES:
        chosen = [part for value in values for part in ("--set-string" if "DEDUP_" in value else "--set", value)]
        validate(run(*template, CHARTS / "dedup", *chosen), {HELM_OLDEST, NEWEST}, f"helm {' '.join(values)}")
    for value in BAD_VALUES:
        try:
            run(*template, CHARTS / "dedup", "--set", value)
        except Failed:
            continue
        raise Failed(f"helm: the chart accepts {value}")
    with tempfile.TemporaryDirectory() as folder:
        # Helm copies the dependency into the chart.
        charts = Path(shutil.copytree(CHARTS, Path(folder) / "helm"))
        run("helm", "dependency", "update", "--skip-refresh", charts / "example-app")
        validate(run(*template, charts / "example-app"), {HELM_OLDEST, NEWEST}, "helm example-app")


def check_alerts() -> None:
    """Check and test the alert rules, and parse the dashboard's queries."""
    run("promtool", "check", "rules", OBSERVABILITY / "alerts.yaml")
    run("promtool", "test", "rules", OBSERVABILITY / "alerts_test.yaml")
    dashboard = json.loads((OBSERVABILITY / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    rules = [
        {"record": f"dashboard:query_{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dashboard.yaml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        run("promtool", "check", "rules", file)


CHECKS: dict[str, Callable[[], None]] = {
    "hadolint": check_dockerfile,
    "kustomize": check_kustomize,
    "helm": check_helm,
    "promtool": check_alerts,
}


def main() -> None:
    """Run the checks of installed tools, report missing ones, and exit with 1 for a failed check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--require", action="append", default=[], choices=CHECKS, help="fail if this tool is missing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    results: dict[str, str] = {}
    for tool, check in CHECKS.items():
        if shutil.which(tool) is None:
            results[tool] = "FAILED: the tool is required and missing" if tool in arguments.require else "NOT CHECKED"
        else:
            try:
                check()
                results[tool] = "ok"
            except Failed as failure:
                results[tool] = f"FAILED: {failure}"
        if not arguments.json:
            print(f"{tool}: {results[tool]}", flush=True)
    if arguments.json:
        print(json.dumps(results))
    missing = [tool for tool, result in results.items() if result == "NOT CHECKED"]
    if missing:
        print(f"NOT CHECKED, tools missing: {', '.join(missing)}", file=sys.stderr)
    sys.exit(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    main()

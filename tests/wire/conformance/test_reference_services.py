"""The reward service in each language, over a real dedup service and Redis: each passes, and so does their fleet."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dedup_service.cli.commands import app
from tests.support.processes import ServiceProcess

pytestmark = [pytest.mark.conformance, pytest.mark.one_store]

REWARDS = Path(__file__).parents[3] / "examples" / "rewards"
PROGRAMS = {
    "fastapi": "python/fastapi_service.py",
    "flask": "python/flask_service.py",
    "django": "python/django_service.py",
    "go": "go",
    "express": "node/express.js",
    "fastify": "node/fastify.js",
}
NEEDS = {"go": "go", "js": "node"}
# The slow body outlasts the lease, which keep-alive must then extend.
TTL_S = 8
SLOW_S = 10
BODIES = {
    "--body": {"unit": "u-1", "amount": 5},
    "--rejected-body": {"unit": "u-1", "amount": 0},
    "--failing-body": {"unit": "u-1", "amount": 5, "simulate": "error"},
    "--slow-body": {"unit": "u-1", "amount": 5, "simulate": "slow", "seconds": SLOW_S},
    "--large-body": {"unit": "u-1", "amount": 5, "simulate": "large"},
}
ALWAYS_SKIPPED = {"other-path", "response-not-stored-document"}

Command = Callable[[str], list[str]]


def missing(name: str) -> str | None:
    """Return the program that a service needs and this machine does not have."""
    needed = NEEDS.get(PROGRAMS[name].rpartition(".")[2])
    return needed if needed and not shutil.which(needed) else None


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Returns the command of a service. Builds the Go program once."""
    built: dict[str, str] = {}

    def of(name: str) -> list[str]:
        path = REWARDS / PROGRAMS[name]
        if path.suffix == ".py":
            return [sys.executable, str(path)]
        if path.suffix == ".js":
            assert (path.parent / "node_modules").exists(), f"run npm ci in {path.parent}, as `make conformance` does"
            return ["node", str(path)]
        if name not in built:
            binary = tmp_path_factory.mktemp("go") / "rewards"
            subprocess.run(["go", "build", "-o", str(binary), "."], cwd=path, check=True)
            built[name] = str(binary)
        return [built[name]]

    return of


@contextmanager
def running(command: list[str], name: str, target: str) -> Iterator[str]:
    """Run a service and yield its address. It must end cleanly by SIGTERM."""
    environment = {"DEDUP_TARGET": target, "PORT": "0", "NAME": name, "CLAIM_TTL": str(TTL_S)}
    clean = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    with subprocess.Popen(command, env=clean | environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            listening = re.fullmatch(r"listening on (127\.0\.0\.1:\d+)\n", first)
            assert listening, f"{name} printed {first!r}"
            yield f"http://{listening[1]}"
            process.terminate()
            assert process.wait() == 0
        finally:
            process.kill()


def report(*arguments: str) -> dict[str, Any]:
    """Return the report of the command, which must find no fault."""
    bodies = (part for option, body in BODIES.items() for part in (option, json.dumps(body)))
    result = CliRunner().invoke(
        app, ["conformance", "--json", "--timeout", "5m", "--route", "/rewards", *bodies, *arguments]
    )
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == 0, [check for check in found["checks"] if check["result"] not in ("passed", "skipped")]
    return found


def skipped(found: dict[str, Any]) -> set[str]:
    """Return the skipped checks."""
    return {check["check"] for check in found["checks"] if check["result"] == "skipped"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_guard_follows_the_contract(service: ServiceProcess, command: Command, name: str) -> None:
    """Every check that the service can reach passes, and SIGTERM ends it cleanly."""
    if program := missing(name):
        pytest.skip(f"{program} is missing: this guard was NOT tested.")
    with running(command(name), name, service.target) as url:
        found = report("--base-url", url, "--claimant", name)
    # It has no PATCH.
    assert skipped(found) == ALWAYS_SKIPPED | {"other-method"}


def test_a_mixed_fleet_is_one_service(service: ServiceProcess, command: Command) -> None:
    """The guards of all installed languages together follow the contract: each replays what any of them stored."""
    present = [name for name in PROGRAMS if not missing(name)]
    with ExitStack() as stack:
        urls = [stack.enter_context(running(command(name), "fleet", service.target)) for name in present]
        found = report(*(part for url in urls for part in ("--base-url", url)), "--claimant", "fleet")
    assert skipped(found) == ALWAYS_SKIPPED | {"other-method"}

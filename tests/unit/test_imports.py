"""Imports: a sidecar starts with every pod, so each process imports only what it uses."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dedup_service

# grpcio itself imports grpc_tools where that is installed.
NOT_FOR_SERVING = (
    "typer",
    "rich",
    "opentelemetry",
    "prometheus_client",
    "redis",
    "sqlite3",
    "dedup.client",
    # Read no TOML file by default.
    "tomllib",
    "pydantic",
    "dedup_service.cli.commands",
    "dedup_service.observability.metrics",
    "dedup_service.observability.metrics_endpoint",
    "dedup_service.observability.traces",
)
NOT_FOR_CLIENT_COMMANDS = (
    "rich",
    # From 0.29 on, typer imports it.
    "pydantic",
    "structlog",
    "argparse",
    "tomllib",
    "hiredis",
    "redis",
    "msgpack",
    "dedup_service.server",
    "dedup_service.stores",
)
NOT_FOR_SUPERVISING = (
    *NOT_FOR_SERVING,
    "grpc",
    "google.protobuf",
    "hiredis",
    "msgpack",
    "uvloop",
    "dedup",
    "dedup_service.claims",
    "dedup_service.config.settings",
    "dedup_service.server",
    "dedup_service.stores",
)


def modules_after(program: str) -> set[str]:
    """Return the modules a new interpreter has after these statements."""
    program = f"{program}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["cli.serve", "server.process"])
def test_serving_imports_no_command_no_client_and_no_unused_store(module: str) -> None:
    """`serve` and the server import no library of the commands, the client, a driver, metrics or traces.

    Each start would pay for them: 60 ms for rich, 80 for typer and 250 for redis, of half a second.
    """
    assert modules_after(f"import dedup_service.{module}").isdisjoint(NOT_FOR_SERVING)


def test_the_supervisor_imports_neither_grpc_nor_a_driver_nor_the_settings() -> None:
    """The supervisor stays small, since it must not fail."""
    assert modules_after("import dedup_service.supervisor.process").isdisjoint(NOT_FOR_SUPERVISING)


def test_a_client_command_imports_no_library_of_the_others() -> None:
    """A claim loads no library for tables, validation, logs or stores: each command, also a probe, would pay for it."""
    program = """
from dedup_service.cli.commands import app
try:
    app(["claim", "x", "--target", "unix:///nowhere", "--timeout", "1ms"])
except SystemExit as end:
    assert end.code == 1, end.code
"""
    assert modules_after(program).isdisjoint(NOT_FOR_CLIENT_COMMANDS)


def test_metrics_and_traces_are_imported_only_where_they_are_on() -> None:
    """The observers of a server without metrics and traces load neither library, and with metrics only that one."""
    program = """
from dedup_service.config.settings import load_settings
from dedup_service.observability.logs import logger
from dedup_service.observability.observers import observing
with observing(load_settings({flags}), logger(), "dedup.v1.DedupService", ("GetTransaction",)):
    pass
"""
    assert modules_after(program.format(flags={})).isdisjoint({"prometheus_client", "opentelemetry"})
    with_metrics = modules_after(program.format(flags={"metrics_listen": "127.0.0.1:0"}))
    assert with_metrics & {"prometheus_client", "opentelemetry"} == {"prometheus_client"}


def test_no_module_is_named_by_a_string() -> None:
    """The import contracts see every import: no source names a module of ours in a string, or imports by name."""
    named = re.compile(r"dedup_service(\.\w+)+")
    found = []
    for path in sorted((Path(dedup_service.__file__).parent).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and named.fullmatch(node.value):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Name) and node.id in {"__import__", "importlib"}:
                found.append(f"{path.name}:{node.lineno}")
    assert not found

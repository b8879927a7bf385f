"""What the service imports: a sidecar starts with every pod, so it carries nothing that serving does not use."""

import subprocess
import sys

# grpcio itself imports grpc_tools where that is installed.
NOT_FOR_SERVING = (
    "typer",
    "rich",
    "opentelemetry",
    "prometheus_client",
    "redis",
    "sqlite3",
    "dedup.client",
    "dedup_service.cli.commands",
)


def test_serving_imports_no_command_no_client_and_no_store_that_was_not_chosen() -> None:
    """`serve` is read and the server is put together without the libraries of the commands, the client or a driver.

    Each start would pay for them: rich with 60 ms, typer with 80, redis with 250, of a start of half a second.
    """
    program = "import sys, dedup_service.cli.serve; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()).isdisjoint(NOT_FOR_SERVING)

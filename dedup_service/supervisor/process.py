"""The supervisor process."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dedup_service import __version__
from dedup_service.config.errors import FatalError
from dedup_service.observability.banner import banner
from dedup_service.observability.logs import configure_logs, logger
from dedup_service.supervisor.messages import Refusal, SupervisorStart
from dedup_service.supervisor.ports import HeldPorts
from dedup_service.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from dedup_service.observability.metrics_endpoint import WorkerMetrics


def run_supervisor() -> None:
    """Supervise until the last worker has ended, and exit as a server alone would.

    The first line of standard input says how to start.
    """
    start = SupervisorStart.from_line(sys.stdin.buffer.readline())
    settings = json.loads(start.settings)
    configure_logs(settings["log_level"])
    try:
        with (
            contextlib.closing(HeldPorts(settings["listen"])) as ports,
            _metrics(settings["metrics_listen"]) as metrics,
        ):
            settings["listen"] = ports.addresses
            refusal = asyncio.run(_supervise(settings, metrics, show_banner=start.banner))
    except FatalError as error:
        refusal = Refusal(str(error), error.exit_code)
    if refusal is not None:
        sys.stderr.write(f"dedup-service: {refusal.sentence}\n")
        sys.exit(refusal.exit_code)


async def _supervise(settings: dict[str, Any], metrics: "WorkerMetrics | None", *, show_banner: bool) -> Refusal | None:
    log = logger()

    def announce(addresses: Sequence[str]) -> None:
        log.info("server_started", addresses=addresses, workers=settings["workers"], version=__version__)
        if show_banner:
            sys.stdout.write(banner(addresses))
            sys.stdout.flush()

    try:
        refusal = await Supervisor(settings, metrics, log).run(announce)
    except OSError as error:
        return Refusal(f"a worker cannot be started: {error}", 1)
    log.info("supervisor_stopped")
    return refusal


@contextlib.contextmanager
def _metrics(address: str | None) -> Iterator["WorkerMetrics | None"]:
    if address is None:
        yield None
        return
    from dedup_service.observability.metrics_endpoint import WorkerMetrics  # noqa: PLC0415 - optional

    with contextlib.closing(WorkerMetrics(address)) as metrics:
        logger().info("metrics_listener_started", address=metrics.address)
        yield metrics

"""The process of the supervisor; its orders are the one line of its standard input."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dedup_service import __version__
from dedup_service.observability.banner import banner
from dedup_service.observability.logs import configure_logs, logger
from dedup_service.supervisor.messages import Refusal, SupervisorOrders
from dedup_service.supervisor.ports import PortTaken, Reservation
from dedup_service.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from dedup_service.observability.worker_metrics import WorkerMetrics


def main() -> None:
    """Supervise, and exit as the service would: 0, or with the code and the one sentence of what went wrong."""
    orders = SupervisorOrders.from_line(sys.stdin.buffer.readline())
    settings = json.loads(orders.settings)
    configure_logs(settings["log_level"])
    with contextlib.ExitStack() as held:
        try:
            reservation = held.enter_context(contextlib.closing(Reservation(settings["listen"])))
            figures = held.enter_context(_figures(settings["metrics_listen"]))
        except PortTaken as taken:
            refusal: Refusal | None = Refusal(str(taken), 1)
        else:
            settings["listen"] = reservation.addresses
            refusal = asyncio.run(_supervise(settings, figures, show_banner=orders.banner))
    if refusal is not None:
        sys.stderr.write(f"dedup-service: {refusal.sentence}\n")
        sys.exit(refusal.exit_code)


async def _supervise(settings: dict[str, Any], figures: "WorkerMetrics | None", *, show_banner: bool) -> Refusal | None:
    log = logger()

    def announce(addresses: Sequence[str]) -> None:
        log.info("server_started", addresses=addresses, workers=settings["workers"], version=__version__)
        if show_banner:
            sys.stdout.write(banner(addresses))
            sys.stdout.flush()

    try:
        refusal = await Supervisor(settings, figures, log).run(announce)
    except OSError as error:
        return Refusal(f"a worker cannot be started: {error}", 1)
    log.info("supervisor_stopped")
    return refusal


@contextlib.contextmanager
def _figures(address: str | None) -> Iterator["WorkerMetrics | None"]:
    if address is None:
        yield None
        return
    # Who does not ask for metrics does not load their library.
    from dedup_service.observability.metrics_server import MetricsPortTaken  # noqa: PLC0415
    from dedup_service.observability.worker_metrics import WorkerMetrics  # noqa: PLC0415

    try:
        metrics = WorkerMetrics(address)
    except MetricsPortTaken as taken:
        raise PortTaken(str(taken)) from None
    with contextlib.closing(metrics):
        logger().info("metrics_listener_started", address=metrics.address)
        yield metrics


if __name__ == "__main__":
    main()

"""The supervisor process and its TCP ports."""

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dedup_service import __version__
from dedup_service.config.addresses import Address
from dedup_service.config.errors import FatalError
from dedup_service.observability.banner import banner
from dedup_service.observability.logs import configure_logs, logger
from dedup_service.supervisor.messages import Refusal, SupervisorStart
from dedup_service.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from dedup_service.observability.metrics_endpoint import WorkerMetrics


def run_supervisor() -> None:
    """Supervise until the last worker ends, and exit as a single server would.

    The first line of standard input is a SupervisorStart.
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


class HeldPorts:
    """Holds the workers' addresses, so that no other process gets them while a worker is away.

    `addresses` are bound: port 0 has become a free port. Raises AddressUnavailable.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self.addresses = [str(self._hold(Address.parse(address))) for address in addresses]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the ports."""
        for held in self._sockets:
            held.close()

    def _hold(self, address: Address) -> Address:
        # Without SO_REUSEPORT, which would share another service's port.
        address.probe()
        try:
            family, kind, protocol, where = address.resolve()
            held = socket.socket(family, kind, protocol)
            self._sockets.append(held)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # SO_REUSEADDR passes connections an earlier service left in TIME_WAIT. It is then unset: it would also let
            # another service's probe pass.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(where)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError as error:
            raise address.unavailable(error) from None
        return address.with_port(held.getsockname()[1])

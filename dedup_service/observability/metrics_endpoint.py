"""The HTTP endpoint Prometheus scrapes, for one process or the sum of several workers.

Imported lazily: metrics are optional.
"""

import shutil
import tempfile

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dedup_service.config.addresses import Address
from dedup_service.config.errors import AddressUnavailable


class MetricsEndpoint:
    """Serves a registry over HTTP, under any path, in its own thread. Raises AddressUnavailable.

    `address` is bound: port 0 has become a free port.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        wanted = Address.parse_tcp(address)
        try:
            self._server, self._thread = start_http_server(wanted.port, wanted.bare_host, registry)
        except OSError as error:
            raise AddressUnavailable(
                f"DEDUP_METRICS_LISTEN (--metrics-listen): cannot listen on {address}: {error.strerror}; "
                "choose an address of this host with a free port"
            ) from None
        self.address = str(wanted.with_port(self._server.server_port))

    def close(self) -> None:
        """Stop; takes at most half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class WorkerMetrics:
    """The supervisor's endpoint: adds up the workers' metric files at each scrape.

    A worker with the number of a dead one continues its files: counts never fall, and the number of files is bounded.
    Raises AddressUnavailable.
    """

    def __init__(self, address: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="dedup-metrics-")
        try:
            disable_created_metrics()  # type: ignore[no-untyped-call]
            registry = CollectorRegistry()
            MultiProcessCollector(registry, path=self.folder)  # type: ignore[no-untyped-call]
            self._workers = Gauge("dedup_workers", "Live worker processes.", registry=registry)
            self._restarts = Counter("dedup_worker_restarts", "Workers that replaced a dead one.", registry=registry)
            self._endpoint = MetricsEndpoint(address, registry)
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        self.address = self._endpoint.address

    def set_workers(self, count: int) -> None:
        """Set the number of live workers."""
        self._workers.set(count)

    def count_restart(self) -> None:
        """Count a worker that replaces a dead one."""
        self._restarts.inc()

    def drop_worker(self, number: int) -> None:
        """Remove values that ended with the worker."""
        mark_process_dead(number, self.folder)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stop, and remove the files."""
        self._endpoint.close()
        shutil.rmtree(self.folder)

"""The metrics of several workers at one endpoint: each keeps its figures in files, and every scrape adds them up."""

import shutil
import tempfile

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dedup_service.observability.metrics_server import MetricsServer


class WorkerMetrics:
    """The endpoint of the supervisor, and the private folder of the files. Raises MetricsPortTaken.

    A worker that takes the number of a dead one goes on in its files, so that counts never fall and files never grow
    in number.
    """

    def __init__(self, address: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="dedup-metrics-")
        try:
            disable_created_metrics()  # type: ignore[no-untyped-call]
            registry = CollectorRegistry()
            MultiProcessCollector(registry, path=self.folder)  # type: ignore[no-untyped-call]
            self._workers = Gauge("dedup_workers", "Worker processes that are alive.", registry=registry)
            self._restarts = Counter(
                "dedup_worker_restarts", "Workers that were started in the place of a dead one.", registry=registry
            )
            self._server = MetricsServer(address, registry)
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        self.address = self._server.address

    def serving(self, workers: int) -> None:
        """Tell how many workers live."""
        self._workers.set(workers)

    def restarted(self) -> None:
        """Tell that a worker died and is started again."""
        self._restarts.inc()

    def ended(self, number: int) -> None:
        """Forget what was true of a worker only while it lived."""
        mark_process_dead(number, self.folder)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Answer no more, and remove the files."""
        self._server.close()
        shutil.rmtree(self.folder)

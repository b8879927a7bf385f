"""The HTTP endpoint Prometheus scrapes, for one process or the sum of several workers.

Imported lazily: metrics are optional.
"""

import asyncio
import io
import shutil
import socket
import tempfile
import threading
from http.client import HTTPException, parse_headers

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dedup_service.config.addresses import Address
from dedup_service.config.errors import AddressUnavailable

# A scrape is one short request. Beyond this number the oldest connection is closed, so that peers which send nothing
# cannot keep a scrape out.
MAX_CONNECTIONS = 50
# For the request and the reply together.
_TIMEOUT_S = 10.0
_MAX_HEAD_BYTES = 16 * 1024


class MetricsEndpoint:
    """Serves a registry over HTTP, under any path, in its own thread. Raises AddressUnavailable.

    `address` is bound: port 0 has become a free port.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        wanted = Address.parse_tcp(address)
        self._registry = registry
        # The task of each connection, the oldest first.
        self._connections: dict[asyncio.Task[None], None] = {}
        try:
            family, kind, protocol, where = wanted.resolve()
            self._socket = socket.socket(family, kind, protocol)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._socket.bind(where)
                self._socket.listen(MAX_CONNECTIONS)
            except BaseException:
                self._socket.close()
                raise
        except OSError as error:
            raise AddressUnavailable(
                f"DEDUP_METRICS_LISTEN (--metrics-listen): cannot listen on {address}: {error.strerror}; "
                "choose an address of this host with a free port"
            ) from None
        self.address = str(wanted.with_port(self._socket.getsockname()[1]))
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and close every connection."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=_MAX_HEAD_BYTES)
        await self._stopped.wait()
        # The runner cancels the connections.
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._connections[task] = None
        if len(self._connections) > MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                writer.write(self._reply_to(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._connections.pop(task, None)
            writer.transport.abort()

    def _reply_to(self, request: bytes) -> bytes:
        line, _, rest = request.partition(b"\r\n")
        method, *others = line.split(b" ")
        if len(others) != 2:
            return _reply("400 Bad Request")
        if method not in {b"GET", b"HEAD"}:
            return _reply("405 Method Not Allowed")
        try:
            accepted = parse_headers(io.BytesIO(rest)).get("Accept", "")
        except HTTPException:
            return _reply("400 Bad Request")
        encode, content_type = choose_encoder(accepted)
        page = encode(self._registry)
        return _reply("200 OK", content_type, len(page)) + (b"" if method == b"HEAD" else page)


def _reply(status: str, content_type: str = "text/plain", length: int = 0) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


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

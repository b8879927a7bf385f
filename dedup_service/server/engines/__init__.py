"""The engines: HTTP/2 and gRPC on the wire. The services above are the same on each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc

from dedup_service.config.errors import FatalError
from dedup_service.config.settings import EngineName
from dedup_service.server.listeners import add_listener

# Above the limits of the rpcs, whose errors are clearer.
MAX_MESSAGE_BYTES = 2 * 1024 * 1024
# One limit for both of grpcio's, between which it would reject at random.
MAX_METADATA_BYTES = 8 * 1024
# Per address; the process raises its limit of open files to match. The engine native cannot count connections.
MAX_CONNECTIONS = 1_000
# Identity alone. Otherwise 0.4 MB of gzip becomes 400 MiB before the call is authenticated.
NO_COMPRESSION = ("grpc.compression_enabled_algorithms_bitset", 1)
# Load balancers that drop idle connections send pings. The server closes a connection that sends many more.
MIN_PING_INTERVAL_MS = 10_000
# The server closes a connection whose peer has not answered a ping for 80 seconds.
KEEPALIVE_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000

# Per-listener credentials factory; each remembers the certificate it last offered.
MakeCredentials = Callable[[], grpc.ServerCredentials]

# Adds every service to one server of the engine, which may have several.
Register = Callable[[grpc.aio.Server], None]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine.

    `max_streams` limits the calls of one connection. With `reuse_port`, several processes share one TCP port.
    `max_connections` is per address; None stands for MAX_CONNECTIONS. `credentials` enable TLS.
    """

    max_streams: int
    reuse_port: bool = False
    max_connections: int | None = None
    credentials: MakeCredentials | None = None

    def for_server(self) -> tuple[tuple[str, int], ...]:
        """Return the server options by the names of grpcio, which both engines read."""
        return (
            # grpcio shares a port between servers by default: a second one started by mistake would go unnoticed.
            ("grpc.so_reuseport", int(self.reuse_port)),
            # grpcio sets no limit by default: 100,000 calls that one peer opened and reset cost 800 MB.
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            NO_COMPRESSION,
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            # The one grpcio follows.
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        )


class Engine(Protocol):
    """Serves the registered services on every address it was given."""

    cancels_unseen_calls: bool
    """Whether `stop` answers calls that were received and not yet handed over with CANCELLED."""

    def listen(self, address: str) -> str:
        """Bind an address before `start`, and return the bound address. Raises AddressUnavailable."""

    async def start(self) -> None:
        """Accept calls. Raises FatalError."""

    async def stop(self, grace: float | None) -> None:
        """Accept no more calls, and cancel those in flight after `grace` seconds; None cancels them at once."""


class GrpcioEngine:
    """One server of grpcio for every address."""

    cancels_unseen_calls = True

    def __init__(self, register: Register, options: EngineOptions) -> None:
        self._options = options
        limit = options.max_connections or MAX_CONNECTIONS
        self._server = grpc.aio.server(
            options=(*options.for_server(), ("grpc.max_allowed_incoming_connections", limit))
        )
        register(self._server)

    def listen(self, address: str) -> str:
        """Bind an address."""
        return add_listener(self._add_port, address, reuse_port=self._options.reuse_port)

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def stop(self, grace: float | None) -> None:
        """Stop."""
        await self._server.stop(grace)

    def _add_port(self, target: str) -> int:
        if self._options.credentials is None:
            return self._server.add_insecure_port(target)
        return self._server.add_secure_port(target, self._options.credentials())


def make_engine(name: EngineName, register: Register, options: EngineOptions) -> Engine:
    """Return the engine of this name, with every service registered.

    Raises FatalError if the package of the engine is missing, and for an option the engine does not have.
    """
    if name == "grpcio":
        return GrpcioEngine(register, options)
    if options.credentials is not None:
        raise FatalError(
            "the engine 'native' does not support TLS: unset DEDUP_TLS_CERT if a proxy terminates TLS, or set "
            "DEDUP_ENGINE=grpcio"
        )
    if options.max_connections is not None:
        raise FatalError(
            "the engine 'native' cannot limit connections: unset DEDUP_MAX_CONNECTIONS, or set DEDUP_ENGINE=grpcio"
        )
    try:
        from dedup_service.server.engines.native import NativeEngine  # noqa: PLC0415 - optional
    except ImportError as error:
        raise FatalError(
            f"the engine 'native' cannot be loaded ({error}): install the extra `native`, or set DEDUP_ENGINE=grpcio"
        ) from None
    return NativeEngine(register, options)

"""The engines: what speaks HTTP/2 and gRPC on the wire. The services above them are the same, whichever serves."""

from collections.abc import Callable
from typing import Protocol

import grpc

from dedup_service.server.listeners import StartRefused, add_listener
from dedup_service.config.setting_types import EngineName

# What one connection may send and keep open, on whichever engine. The largest honest message is a batch of 1,000 claims
# with every field as long as it may be, or a result of 1 MiB.
MAX_MESSAGE_BYTES = 2 * 1024 * 1024
# One limit instead of grpcio's two, between which it refuses at random.
MAX_METADATA_BYTES = 8 * 1024
# Below the 1,024 files that a process may have open in most systems; the engine native cannot count.
MAX_CONNECTIONS = 1_000
# A caller may ask this often whether its connection lives, also when it is idle, as balancers that forget idle ones
# want it to; one that asks much more often is hung up on.
MIN_PING_INTERVAL_MS = 10_000
# A peer that has gone without a word is noticed after both of these.
KEEPALIVE_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000

# Makes the credentials of one address, each with a memory of its own of what it was last given.
MakeCredentials = Callable[[], grpc.ServerCredentials]

# Adds every service to one server of the engine, which may have several.
Register = Callable[[grpc.aio.Server], None]


class Engine(Protocol):
    """Serves what was registered with it, on every address that it was told."""

    def listen(self, address: str) -> str:
        """Bind one address and return it as it turned out; raise StartRefused. All before `start`."""
        ...

    async def start(self) -> None:
        """Accept calls from now on; raise StartRefused."""
        ...

    async def stop(self, grace: float | None) -> None:
        """Accept no more, give calls under way the grace in seconds, and cancel what is left."""
        ...


class GrpcioEngine:
    """The server of grpcio itself."""

    def __init__(
        self,
        register: Register,
        *,
        max_streams: int,
        reuse_port: bool,
        max_connections: int | None,
        credentials: MakeCredentials | None,
    ) -> None:
        self._reuse_port = reuse_port
        self._credentials = credentials
        options = (
            *server_options(max_streams=max_streams, reuse_port=reuse_port),
            ("grpc.max_allowed_incoming_connections", max_connections or MAX_CONNECTIONS),
        )
        self._server = grpc.aio.server(options=options)
        register(self._server)

    def listen(self, address: str) -> str:
        """Bind one address, as the protocol says."""
        return add_listener(self._add_port, address, reuse_port=self._reuse_port)

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def stop(self, grace: float | None) -> None:
        """Stop, as the protocol says."""
        await self._server.stop(grace)

    def _add_port(self, target: str) -> int:
        if self._credentials is None:
            return self._server.add_insecure_port(target)
        return self._server.add_secure_port(target, self._credentials())


def make_engine(
    name: EngineName,
    register: Register,
    *,
    max_streams: int,
    reuse_port: bool = False,
    max_connections: int | None = None,
    credentials: MakeCredentials | None = None,
) -> Engine:
    """Return the engine of this name, with every service registered.

    `max_streams` is how many calls one connection may have under way; a client keeps more to itself. `reuse_port` lets
    several processes listen on one TCP port, which then share its connections. `max_connections` is for each address,
    and `credentials` make TLS of all of them. Raises StartRefused when the package of the engine is not installed, and
    for what the engine cannot do.
    """
    if name == "grpcio":
        return GrpcioEngine(
            register,
            max_streams=max_streams,
            reuse_port=reuse_port,
            max_connections=max_connections,
            credentials=credentials,
        )
    if credentials is not None:
        raise StartRefused(
            "the engine 'native' speaks no TLS: unset DEDUP_TLS_CERT where something in front of it does, "
            "or set DEDUP_ENGINE=grpcio"
        )
    if max_connections is not None:
        raise StartRefused(
            "the engine 'native' cannot limit connections: unset DEDUP_MAX_CONNECTIONS, or set DEDUP_ENGINE=grpcio"
        )
    try:
        # Who does not ask for it needs it neither installed nor loaded.
        from dedup_service.server.engines.native import NativeEngine  # noqa: PLC0415
    except ImportError as error:
        raise StartRefused(
            f"the engine 'native' cannot be loaded ({error}): install dedup-service[native], or set DEDUP_ENGINE=grpcio"
        ) from None
    return NativeEngine(register, max_streams=max_streams, reuse_port=reuse_port)


def server_options(*, max_streams: int, reuse_port: bool) -> tuple[tuple[str, int], ...]:
    """Return the options of a server, in the names of grpcio, which both engines read."""
    return (
        # grpcio shares a port between servers by default, and a second one started by mistake would go unnoticed.
        ("grpc.so_reuseport", int(reuse_port)),
        # grpcio sets no limit by default: 100,000 calls that one peer made and reset cost it 800 MB.
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # The one that grpcio goes by.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    )

"""The engines: what speaks HTTP/2 and gRPC on the wire. The services above them are the same, whichever serves."""

from collections.abc import Callable
from typing import Protocol

import grpc

from dedup_service.server.listeners import StartRefused, add_listener
from dedup_service.settings import EngineName

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

    def __init__(self, register: Register, *, max_streams: int, reuse_port: bool) -> None:
        self._reuse_port = reuse_port
        self._server = grpc.aio.server(options=server_options(max_streams=max_streams, reuse_port=reuse_port))
        register(self._server)

    def listen(self, address: str) -> str:
        """Bind one address, as the protocol says."""
        return add_listener(self._server.add_insecure_port, address, reuse_port=self._reuse_port)

    async def start(self) -> None:
        """Accept calls."""
        await self._server.start()

    async def stop(self, grace: float | None) -> None:
        """Stop, as the protocol says."""
        await self._server.stop(grace)


def make_engine(name: EngineName, register: Register, *, max_streams: int, reuse_port: bool = False) -> Engine:
    """Return the engine of this name, with every service registered.

    `max_streams` is how many calls one connection may have under way; a client keeps more to itself. `reuse_port` lets
    several processes listen on one TCP port, which then share its connections. Raises StartRefused when the package of
    the engine is not installed.
    """
    if name == "grpcio":
        return GrpcioEngine(register, max_streams=max_streams, reuse_port=reuse_port)
    try:
        # Who does not ask for it needs it neither installed nor loaded.
        from dedup_service.server.native_engine import NativeEngine  # noqa: PLC0415
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
    )

"""The addresses of the health service alone, which probes reach where the listeners for claims are not for them."""

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from dedup_service.server.health_details import DetailedHealth
from dedup_service.server.listeners import add_listener

# Probes come one at a time; whoever reaches this door cannot cost much more.
_OPTIONS = (
    ("grpc.max_concurrent_streams", 100),
    ("grpc.max_allowed_incoming_connections", 100),
    ("grpc.max_receive_message_length", 4_096),
    ("grpc.keepalive_time_ms", 60_000),
)


class HealthListener:
    """Serves health in plaintext and to everybody, always by grpcio; nothing at all without an address."""

    def __init__(self, server: grpc.aio.Server | None) -> None:
        self._server = server

    async def stop(self) -> None:
        """Hang up."""
        if self._server is not None:
            await self._server.stop(None)


async def listen_for_probes(
    addresses: Sequence[str],
    servicer: DetailedHealth,
    log: Any,  # noqa: ANN401 - as logger()
    *,
    reuse_port: bool = False,
) -> HealthListener:
    """Serve on these addresses, and log them as they turned out; raise StartRefused."""
    if not addresses:
        return HealthListener(None)
    server = grpc.aio.server(options=(*_OPTIONS, ("grpc.so_reuseport", int(reuse_port))))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = [add_listener(server.add_insecure_port, address, reuse_port=reuse_port) for address in addresses]
    await server.start()
    log.info("health_listener_started", addresses=bound)
    return HealthListener(server)

"""The default engine: grpcio's asyncio server."""

import grpc

from dedup_service.server.engines import MAX_CONNECTIONS, EngineOptions, Register
from dedup_service.server.listeners import add_listener


class GrpcioEngine:
    """One server of grpcio for every address."""

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

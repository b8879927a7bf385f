"""The native engine: pygrpc-native, whose HTTP/2 and gRPC work runs in Rust outside the interpreter lock."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
import pygrpc_native.aio

from dedup_service.config.errors import FatalError
from dedup_service.server.engines import EngineOptions, Register
from dedup_service.server.listeners import add_listener

# The package closes connections before it has written the last answers: of 200 at a time, 18 % were lost. It cannot be
# asked whether they are written, so it gets this much time.
_WRITE_OUT_S = 0.25


class _Server(pygrpc_native.aio.Server):
    """Passes services with request streams, such as reflection, to grpcio by their generic handler alone.

    The package passes on the registered handler, which grpcio's asyncio server ignores: calls ended as UNIMPLEMENTED.
    """

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        if not any(handler.request_streaming for handler in method_handlers.values()):
            super().add_registered_method_handlers(service_name, dict(method_handlers))


class NativeEngine:
    """One server of pygrpc-native for each address, since such a server has one port.

    Reflection is a bidirectional stream: the package passes it to a server of grpcio on a Unix socket in a temporary
    folder. The package closes a connection whose caller cancels many calls before they are accepted; it has no option
    for that limit.
    """

    cancels_unseen_calls = False

    def __init__(self, register: Register, options: EngineOptions) -> None:
        self._register = register
        self._options = options
        self._servers: list[grpc.aio.Server] = []

    def listen(self, address: str) -> str:
        """Bind an address."""
        server = _Server(options=self._options.for_server())
        self._register(server)
        bound = add_listener(server.add_insecure_port, address, reuse_port=self._options.reuse_port)
        self._servers.append(server)
        return bound

    async def start(self) -> None:
        """Accept calls. Raises FatalError without a temporary folder."""
        for server in self._servers:
            try:
                await server.start()
            except (OSError, RuntimeError) as error:
                raise FatalError(
                    f"the engine 'native' needs a socket in a temporary folder ({error}): "
                    "set TMPDIR to a writable one with a short path, or set DEDUP_ENGINE=grpcio"
                ) from None

    async def stop(self, grace: float | None) -> None:
        """Stop."""
        await asyncio.sleep(_WRITE_OUT_S)
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

"""The native engine: pygrpc-native, whose HTTP/2 and gRPC work runs in Rust outside the interpreter lock."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
import pygrpc_native.aio

from dedup_service.server.engines import Register, server_options
from dedup_service.server.listeners import StartRefused, add_listener

# The package closes its connections without writing out the answers that it was given last: of 200 at a time, 18 % were
# lost. It cannot be asked whether they have gone, so they get the time.
_WRITE_OUT_S = 0.25


class _Server(pygrpc_native.aio.Server):
    """Hands a service that takes streams of requests, such as reflection, to grpcio by its generic handler alone.

    The package hands the registered one over, which grpcio's asyncio server ignores: calls ended as UNIMPLEMENTED.
    """

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
    ) -> None:
        if not any(handler.request_streaming for handler in method_handlers.values()):
            super().add_registered_method_handlers(service_name, dict(method_handlers))


class NativeEngine:
    """One server of pygrpc-native for each address, since such a server has one port.

    Reflection is a bidirectional stream, which it hands to a server of grpcio on a Unix socket in a temporary folder.
    """

    def __init__(self, register: Register, *, max_streams: int, reuse_port: bool) -> None:
        self._register = register
        self._options = server_options(max_streams=max_streams, reuse_port=reuse_port)
        self._reuse_port = reuse_port
        self._servers: list[grpc.aio.Server] = []

    def listen(self, address: str) -> str:
        """Bind one address, as the protocol says."""
        server = _Server(options=self._options)
        self._register(server)
        bound = add_listener(server.add_insecure_port, address, reuse_port=self._reuse_port)
        self._servers.append(server)
        return bound

    async def start(self) -> None:
        """Accept calls; raise StartRefused without a temporary folder."""
        for server in self._servers:
            try:
                await server.start()
            except (OSError, RuntimeError) as error:
                raise StartRefused(
                    f"the engine 'native' needs a socket in a temporary folder ({error}): "
                    "set TMPDIR to a writable one with a short path, or set DEDUP_ENGINE=grpcio"
                ) from None

    async def stop(self, grace: float | None) -> None:
        """Stop, as the protocol says."""
        await asyncio.sleep(_WRITE_OUT_S)
        await asyncio.gather(*(server.stop(grace) for server in self._servers))

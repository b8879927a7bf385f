"""Serves an empty rpc on an engine of the service: the lower bound for the cost of a claim.

It accepts a claim's bytes and answers an empty message, with the service's event loop and engine options, but without
decoding, checks, store, reply and log line.
"""

import argparse
import asyncio

import grpc
import uvloop

from dedup_service.server.engines import EngineOptions, make_engine

SERVICE = "dedup.benchmark.Noop"

# The service's default limit of concurrent calls per connection.
MAX_STREAMS = 2_100


async def noop(_: bytes, __: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    """Answer an empty message."""
    return b""


def register(server: grpc.aio.Server) -> None:
    """Register the rpc with generic and registered handlers."""
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Call": grpc.unary_unary_rpc_method_handler(noop)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_registered_method_handlers(SERVICE, methods)


async def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("grpcio", "native"), default="grpcio")
    parser.add_argument("--listen", required=True, help="host:port")
    parser.add_argument("--reuse-port", action="store_true", help="share the port with other processes")
    options = parser.parse_args()
    engine = make_engine(options.engine, register, EngineOptions(MAX_STREAMS, reuse_port=options.reuse_port))
    engine.listen(options.listen)
    await engine.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())

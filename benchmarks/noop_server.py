"""Serves an rpc that does nothing on one engine of the product: what a claim can cost at least.

It takes the bytes of a claim and answers an empty message, on the event loop and with the options of the service. What
it leaves out is the service: decoding, the checks, the store, the reply and the log line.
"""

import argparse
import asyncio

import grpc
import uvloop

from dedup_service.server.engines import EngineOptions, make_engine

SERVICE = "dedup.benchmark.Noop"

# What the service allows one connection by default.
MAX_STREAMS = 2_100


async def noop(_: bytes, __: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    """Answer an empty message."""
    return b""


def register(server: grpc.aio.Server) -> None:
    """Register the rpc in both ways, as the service does it."""
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Call": grpc.unary_unary_rpc_method_handler(noop)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_registered_method_handlers(SERVICE, methods)


async def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("grpcio", "native"), default="grpcio")
    parser.add_argument("--listen", required=True, help="host:port")
    parser.add_argument("--reuse-port", action="store_true", help="share the port with other processes")
    options = parser.parse_args()
    engine = make_engine(
        options.engine, register, EngineOptions(max_streams=MAX_STREAMS, reuse_port=options.reuse_port)
    )
    engine.listen(options.listen)
    await engine.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())

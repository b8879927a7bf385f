"""A server in the process of the test, over a store of the test's own."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import structlog

from dedup.v1 import dedup_pb2_grpc
from dedup_service.api.endpoint import Admission
from dedup_service.api.servicer import DedupServicer, add_to_server
from dedup_service.claims import ClaimService, ClaimStore, Policies, Policy
from dedup_service.config.settings import EngineName
from dedup_service.observability.calls import CallLog
from dedup_service.observability.logs import LoggedIds
from dedup_service.observability.observers import Observers
from dedup_service.server.engines import EngineOptions, make_engine


@asynccontextmanager
async def serving(
    store: ClaimStore, log: io.StringIO, engine: EngineName
) -> AsyncIterator["dedup_pb2_grpc.DedupServiceAsyncStub"]:
    """Yield a stub of an in-process server over a store, on an engine."""
    logger = structlog.wrap_logger(
        structlog.WriteLogger(log),
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.BoundLogger,
    )
    servicer = DedupServicer(ClaimService(store, Policies(Policy(60_000, 60_000, 60_000))))
    observers = Observers(CallLog(logger, LoggedIds(plain=False)))

    def register(server: grpc.aio.Server) -> None:
        add_to_server(server, servicer, lambda method: observers.calls(method, tuple), Admission(1_000))

    server = make_engine(engine, register, EngineOptions(max_streams=1_000))
    address = server.listen("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield dedup_pb2_grpc.DedupServiceStub(channel)
    await server.stop(None)

"""The server interceptors: a guarded gRPC server handles each idempotency key once."""

# gRPC's classes are generic only in their type stubs.
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from dedup import Client, aio
from dedup.grpc_guard import AsyncDedupInterceptor, DedupInterceptor
from dedup.testing import AsyncFakeClient, FakeClient, FakeService

Call = Callable[..., Any]


class Shop:
    """The application: it counts payments, or fails as the request says."""

    def __init__(self) -> None:
        self.payments: list[str] = []

    def pay(self, request: str, context: Any) -> str:
        """Handle one payment."""
        self.payments.append(request)
        if request == "raise":
            raise ZeroDivisionError
        if request == "code":
            context.set_code(grpc.StatusCode.NOT_FOUND)
        return "x" * 5_000 if request == "large" else f"paid {len(self.payments)}"


def write(text: str) -> bytes:
    """Serialize a message."""
    return StringValue(value=text).SerializeToString()


def read(data: bytes) -> str:
    """Parse a message."""
    return StringValue.FromString(data).value


def handlers(function: Any) -> grpc.GenericRpcHandler:
    """Return the handlers of a server whose messages are strings."""
    method = grpc.unary_unary_rpc_method_handler(function, read, write)
    stream = grpc.unary_stream_rpc_method_handler(lambda request, _: iter([request]), read, write)
    return grpc.method_handlers_generic_handler("shop.Shop", {"Pay": method, "List": stream})


class Guarded:
    """A guarded server, blocking or asynchronous, and a channel to it."""

    def __init__(self, kind: str, client: Any, shop: Shop) -> None:
        self._kind, self._client, self._shop = kind, client, shop

    async def __aenter__(self) -> Self:
        self._server: Any
        if self._kind == "sync":
            guard = DedupInterceptor(self._client, retention=60)
            self._server = grpc.server(ThreadPoolExecutor(8), interceptors=[guard])
            self._server.add_generic_rpc_handlers((handlers(self._shop.pay),))
        else:

            async def pay(request: str, context: Any) -> str:
                return self._shop.pay(request, context)

            waiting = AsyncDedupInterceptor(self._client, retention=60)
            self._server = grpc.aio.server(interceptors=[waiting])
            self._server.add_generic_rpc_handlers((handlers(pay),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        started = self._server.start()
        if started is not None:
            await started
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()
        stopped = self._server.stop(None)
        if asyncio.iscoroutine(stopped):
            await stopped
        else:
            await asyncio.to_thread(stopped.wait)

    async def pay(self, request: str, key: str | None = None) -> str:
        """Pay and return the reply, or the name of the status code."""
        call = self._channel.unary_unary("/shop.Shop/Pay", write, read)
        metadata = None if key is None else (("idempotency-key", key),)
        try:
            reply: str = await call(request, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name
        return reply

    async def stream(self, key: str) -> list[str]:
        """Call the streaming method."""
        call = self._channel.unary_stream("/shop.Shop/List", write, read)
        return [reply async for reply in call("a", metadata=(("idempotency-key", key),))]


@pytest.fixture
def shop() -> Shop:
    """A new shop for each test."""
    return Shop()


@pytest.fixture(params=["sync", "aio"])
async def guarded(request: pytest.FixtureRequest, target: str, shop: Shop) -> AsyncIterator[Guarded]:
    """Both servers, guarded by the live service."""
    async with aio.Client(target) as waiting:
        with Client(target) as blocking:
            client = blocking if request.param == "sync" else waiting
            async with Guarded(request.param, client, shop) as server:
                yield server


async def test_a_call_is_handled_once_and_its_reply_replayed(guarded: Guarded, shop: Shop, unique: str) -> None:
    """The same key gets the same reply. Calls without a key are not guarded."""
    assert [await guarded.pay("a", unique) for _ in range(2)] == ["paid 1"] * 2
    assert [await guarded.pay("a") for _ in range(2)] == ["paid 2", "paid 3"]
    assert await guarded.stream(unique) == ["a"]
    assert len(shop.payments) == 3


async def test_another_request_under_the_key_is_refused(guarded: Guarded, unique: str) -> None:
    """Requests are compared by their bytes."""
    await guarded.pay("a", unique)
    assert await guarded.pay("b", unique) == "FAILED_PRECONDITION"


@pytest.mark.parametrize(("request_text", "code"), [("raise", "UNKNOWN"), ("code", "NOT_FOUND")])
async def test_a_failed_call_may_be_repeated(
    guarded: Guarded, shop: Shop, unique: str, request_text: str, code: str
) -> None:
    """An exception or a status other than OK releases the claim."""
    assert [await guarded.pay(request_text, unique) for _ in range(2)] == [code] * 2
    assert len(shop.payments) == 2


async def test_a_large_reply_is_delivered_and_not_replayed(guarded: Guarded, shop: Shop, unique: str) -> None:
    """The work is done once."""
    assert len(await guarded.pay("large", unique)) == 5_000
    assert await guarded.pay("large", unique) == "ALREADY_EXISTS"
    assert len(shop.payments) == 1


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_each_unanswered_case_has_its_status(kind: str, shop: Shop) -> None:
    """Work in progress, an invalid key, and an unavailable service."""
    service = FakeService()
    FakeClient(service).claim("/shop.Shop/Pay:busy")
    client = FakeClient(service) if kind == "sync" else AsyncFakeClient(service)
    async with Guarded(kind, client, shop) as guarded:
        assert await guarded.pay("a", "busy") == "ABORTED"
        assert await guarded.pay("a", "") == "INVALID_ARGUMENT"
        assert await guarded.pay("a", "x" * 600) == "INVALID_ARGUMENT"
        service.unavailable = True
        assert await guarded.pay("a", "key") == "UNAVAILABLE"
    assert not shop.payments


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_a_reply_is_delivered_if_completing_fails(
    kind: str, shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """The work is done, and the claim expires."""
    service = FakeService()
    work = shop.pay

    def pay(request: str, context: Any) -> str:
        service.unavailable = True
        return work(request, context)

    shop.pay = pay  # type: ignore[method-assign]
    client = FakeClient(service) if kind == "sync" else AsyncFakeClient(service)
    async with Guarded(kind, client, shop) as guarded:
        assert await guarded.pay("a", "key") == "paid 1"
    assert "could not end the claim" in caplog.text

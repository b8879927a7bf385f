"""The server interceptors: a guarded gRPC server handles each idempotency key once."""

# gRPC's classes are generic only in their type stubs.
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo

from dedup import Client, aio
from dedup.grpc_guard import AsyncDedupInterceptor, DedupInterceptor
from dedup.grpc_profile import outcome_of
from dedup.idempotency import current_claim
from dedup.testing import AsyncFakeClient, FakeClient, FakeService

CODES = json.loads((Path(__file__).parents[2] / "golden" / "grpc.json").read_text())["codes"]


class Shop:
    """The application: it counts payments, or fails as the request says."""

    def __init__(self) -> None:
        self.payments: list[str] = []
        self.claims: list[Any] = []

    def pay(self, request: str, context: Any) -> str:
        """Handle one payment. "NAME" sets a status, "raise NAME" sets it and raises."""
        self.payments.append(request)
        self.claims.append(current_claim())
        raised, _, name = request.rpartition(" ")
        if name.isupper():
            context.set_code(grpc.StatusCode[name])
        if raised or request == "raise":
            raise ZeroDivisionError
        return "x" * 5_000 if request == "large" else f"paid {len(self.payments)}"


def write(text: str) -> bytes:
    """Serialize a message."""
    return StringValue(value=text).SerializeToString()


def read(data: bytes) -> str:
    """Parse a message."""
    return StringValue.FromString(data).value


def handlers(function: Any, abort: Any) -> grpc.GenericRpcHandler:
    """Return the handlers of a server: of strings, and of messages of protobuf."""
    method = grpc.unary_unary_rpc_method_handler(function, read, write)
    aborted = grpc.unary_unary_rpc_method_handler(abort, read, write)
    stream = grpc.unary_stream_rpc_method_handler(lambda request, _: iter([request]), read, write)
    return grpc.method_handlers_generic_handler("shop.Shop", {"Pay": method, "List": stream, "Abort": aborted})


def reason_of(error: Any) -> str:
    """Return the reason of the guard in the details of an error."""
    status, info = status_pb2.Status(), ErrorInfo()
    status.ParseFromString(dict(list(error.trailing_metadata())).get("grpc-status-details-bin", b""))
    return info.reason if status.details and status.details[0].Unpack(info) and info.domain == "dedup.guard" else ""


class Guarded:
    """A guarded server, blocking or asynchronous, and a channel to it."""

    def __init__(self, kind: str, client: Any, shop: Shop, **options: Any) -> None:
        self._kind, self._client, self._shop, self._options = kind, client, shop, options

    async def __aenter__(self) -> Self:
        self._server: Any
        if self._kind == "sync":
            guard = DedupInterceptor(self._client, retention=60, **self._options)
            self._server = grpc.server(ThreadPoolExecutor(8), interceptors=[guard])

            def abort(request: str, context: Any) -> str:
                self._shop.payments.append(request)
                context.abort(grpc.StatusCode[request], "because")
                raise AssertionError

            self._server.add_generic_rpc_handlers((handlers(self._shop.pay, abort),))
        else:

            async def pay(request: str, context: Any) -> str:
                return self._shop.pay(request, context)

            async def abort_async(request: str, context: Any) -> str:
                self._shop.payments.append(request)
                await context.abort(grpc.StatusCode[request], "because")
                raise AssertionError

            waiting = AsyncDedupInterceptor(self._client, retention=60, **self._options)
            self._server = grpc.aio.server(interceptors=[waiting])
            self._server.add_generic_rpc_handlers((handlers(pay, abort_async),))
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

    async def pay(self, request: str, *keys: str, method: str = "Pay", user: str = "") -> str:
        """Pay and return the reply, or the name of the status code."""
        call = self._channel.unary_unary(f"/shop.Shop/{method}", write, read)
        try:
            made = call(request, metadata=(*(("idempotency-key", key) for key in keys), ("user", user)))
            reply: str = await made
        except grpc.RpcError as error:
            self.reason = reason_of(error)
            self.details = error.details() or ""
            return error.code().name
        self.replayed = dict(list(await made.initial_metadata())).get("idempotency-replayed")
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
    assert (await guarded.pay("b", unique), guarded.reason) == ("FAILED_PRECONDITION", "PAYLOAD_MISMATCH")


async def test_a_replay_says_so(guarded: Guarded, shop: Shop, unique: str) -> None:
    """In the initial metadata. The handler sees its claim, and a replay has no handler."""
    marks = []
    for key in (unique, f'"{unique}"'):
        await guarded.pay("a", key)
        marks.append(guarded.replayed)
    assert marks == [None, "true"]
    assert [claim.transaction_id for claim in shop.claims] == [f"grpc::/shop.Shop/Pay:{unique}"]


@pytest.mark.parametrize("method", ["Pay", "Abort"])
async def test_each_status_does_what_the_contract_says(guarded: Guarded, shop: Shop, unique: str, method: str) -> None:
    """A released call runs again at once, a kept one is in progress. Set by the handler, or by an abort."""
    for name, does in CODES.items():
        if name == "OK":
            continue
        shop.payments.clear()
        codes = [await guarded.pay(name, f"{unique}{name}", method=method) for _ in range(2)]
        assert codes == ([name, name] if does == "release" else [name, "ABORTED"])
        assert len(shop.payments) == (2 if does == "release" else 1)
        assert guarded.reason == ("" if does == "release" else "DUPLICATE")


@pytest.mark.parametrize("request_text", ["raise", "raise NOT_FOUND"])
async def test_an_exception_keeps_the_claim(guarded: Guarded, shop: Shop, unique: str, request_text: str) -> None:
    """Its effect is unknown, whatever status the handler set before."""
    await guarded.pay(request_text, unique)
    assert (await guarded.pay(request_text, unique), guarded.reason) == ("ABORTED", "DUPLICATE")
    assert len(shop.payments) == 1


async def test_a_large_reply_is_delivered_and_not_replayed(guarded: Guarded, shop: Shop, unique: str) -> None:
    """The work is done once."""
    assert len(await guarded.pay("large", unique)) == 5_000
    assert (await guarded.pay("large", unique), guarded.reason) == ("ALREADY_EXISTS", "REPLY_NOT_KEPT")
    assert len(shop.payments) == 1


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_each_unanswered_case_has_its_status(kind: str, shop: Shop) -> None:
    """Work in progress, an invalid key, and an unavailable service. No refusal names the claimant."""
    service = FakeService()
    FakeClient(service, claimant="somebody").claim("grpc::/shop.Shop/Pay:busy")
    client = FakeClient(service) if kind == "sync" else AsyncFakeClient(service)
    async with Guarded(kind, client, shop) as guarded:
        assert (await guarded.pay("a", "busy"), guarded.reason) == ("ABORTED", "DUPLICATE")
        assert "somebody" not in guarded.details
        for keys in ([""], ["x" * 600], ["a", "b"], ["a,b"]):
            assert (await guarded.pay("a", *keys), guarded.reason) == ("INVALID_ARGUMENT", "KEY_INVALID")
        service.unavailable = True
        assert (await guarded.pay("a", "key"), guarded.reason) == ("UNAVAILABLE", "DEDUP_UNAVAILABLE")
    assert not shop.payments


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_options(kind: str, shop: Shop) -> None:
    """Callers have keys of their own, a predicate says what a status does, and replies have a limit."""
    service = FakeService()
    client = FakeClient(service) if kind == "sync" else AsyncFakeClient(service)
    options = {
        "caller": lambda context: dict(context.invocation_metadata())["user"],
        "outcome": lambda code: "complete" if code is grpc.StatusCode.NOT_FOUND else outcome_of(code),
        "max_stored_bytes": 25,
    }
    async with Guarded(kind, client, shop, **options) as guarded:
        assert [await guarded.pay("a", "k", user=user) for user in ("anna", "ben")] == ["paid 1", "paid 2"]
        assert (await guarded.pay("a", "k", user="anna"), guarded.reason) == ("ALREADY_EXISTS", "REPLY_NOT_KEPT")
        assert await guarded.pay("NOT_FOUND", "missing") == "NOT_FOUND"
        assert await guarded.pay("NOT_FOUND", "missing") == "ALREADY_EXISTS"
    assert len(shop.payments) == 3


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_work_longer_than_its_ttl_runs_once(kind: str, shop: Shop) -> None:
    """The guard keeps the claim alive while the call is handled."""
    service = FakeService()
    work = shop.pay

    def pay(request: str, context: Any) -> str:
        service.advance(150)
        return work(request, context)

    shop.pay = pay  # type: ignore[method-assign]
    client = FakeClient(service) if kind == "sync" else AsyncFakeClient(service)
    async with Guarded(kind, client, shop, ttl=60) as guarded:
        assert [await guarded.pay("a", "k") for _ in range(2)] == ["paid 1", "paid 1"]


@pytest.mark.parametrize("kind", ["sync", "aio"])
async def test_an_older_reply_is_replayed(kind: str, shop: Shop) -> None:
    """Other results are not."""
    service = FakeService()
    client = FakeClient(service) if kind == "sync" else AsyncFakeClient(service)
    others = {"other": b"paid 5", "failed": b"dedup-grpc/1 error\n"}
    for key, result in {"old": b"\x01" + write("of old"), **others}.items():
        with FakeClient(service).claim(f"grpc::/shop.Shop/Pay:{key}") as claim:
            claim.result = result
    async with Guarded(kind, client, shop) as guarded:
        assert await guarded.pay("a", "old") == "of old"
        for key in others:
            assert (await guarded.pay("a", key), guarded.reason) == ("ALREADY_EXISTS", "REPLY_NOT_KEPT")


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

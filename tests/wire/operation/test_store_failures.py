"""Every way in which Redis can fail to answer a claim, as the caller sees it over gRPC.

Protection in each case: the table of refusals in the store and the table of errors in the servicer. Whatever happens,
the answer is an error that says whether the claim was made: never CLAIMED, never DUPLICATE, and never a second SET.
"""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dedup.v1 import dedup_pb2
from dedup_service.config.settings import EngineName
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.registry import StoreConfig, make_store
from tests.support.in_process import serving
from tests.support.polling import eventually
from tests.support.scripted_redis import Behaviour, ScriptedRedis, says, says_and_hangs_up

UNAVAILABLE, FAILED_PRECONDITION = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION

REFUSALS: dict[bytes, tuple[grpc.StatusCode, str, str]] = {
    b"OOM command not allowed when used memory > 'maxmemory'.": (UNAVAILABLE, "STORE_OUT_OF_MEMORY", "no"),
    b"READONLY You can't write against a read only replica.": (UNAVAILABLE, "STORE_READ_ONLY", "no"),
    b"LOADING Redis is loading the dataset in memory": (UNAVAILABLE, "STORE_LOADING", "no"),
    b"MASTERDOWN Link with MASTER is down": (UNAVAILABLE, "STORE_MASTER_DOWN", "no"),
    b"CLUSTERDOWN Hash slot not served": (UNAVAILABLE, "STORE_CLUSTER_DOWN", "no"),
    b"NOAUTH Authentication required.": (UNAVAILABLE, "STORE_NOT_AUTHENTICATED", "no"),
    b"NOPERM User x has no permissions to run the 'set' command": (UNAVAILABLE, "STORE_NOT_PERMITTED", "no"),
    b"BUSY Redis is busy running a script.": (UNAVAILABLE, "STORE_BUSY", "no"),
    b"MISCONF Redis is configured to save RDB snapshots": (UNAVAILABLE, "STORE_MISCONFIGURED", "no"),
    b"NOREPLICAS Not enough good replicas to write.": (UNAVAILABLE, "STORE_TOO_FEW_REPLICAS", "no"),
    b"MOVED 3999 127.0.0.1:6381": (UNAVAILABLE, "STORE_MOVED", "no"),
    b"ASK 3999 127.0.0.1:6381": (UNAVAILABLE, "STORE_MOVED", "no"),
    b"TRYAGAIN Multiple keys request during rehashing of slot": (UNAVAILABLE, "STORE_TRY_AGAIN", "no"),
    b"WRONGTYPE Operation against a key holding the wrong kind of value": (
        *(FAILED_PRECONDITION, "KEY_OF_ANOTHER_TYPE", "no"),
    ),
    b"ERR syntax error": (UNAVAILABLE, "STORE_ERROR", "unknown"),
    b"UPSTREAM-FAILURE of some proxy": (UNAVAILABLE, "STORE_ERROR", "unknown"),
}

FAULTS: dict[str, tuple[Behaviour, str]] = {
    "nonsense": (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "STORE_PROTOCOL_ERROR"),
    "a number": (says(b":1\r\n"), "STORE_PROTOCOL_ERROR"),
    "an array": (says(b"*1\r\n$1\r\nx\r\n"), "STORE_PROTOCOL_ERROR"),
    "half a reply, then silence": (says(b"$10\r\nabc"), "STORE_TIMEOUT"),
    "half a reply, then the end": (says_and_hangs_up(b"$10\r\nabc"), "STORE_CONNECTION_LOST"),
    "silence": (says(b""), "STORE_TIMEOUT"),
    "the end": (says_and_hangs_up(b""), "STORE_CONNECTION_LOST"),
}


@asynccontextmanager
async def claiming(
    behaviour: Behaviour, engine: EngineName
) -> AsyncIterator[tuple[grpc.aio.AioRpcError, ScriptedRedis]]:
    """Claim through a service over a Redis of this behaviour, and yield the error with which that ended."""
    async with ScriptedRedis(behaviour) as server:
        store = make_store(StoreConfig(server.url, timeout_ms=300))
        await store.open()
        try:
            async with serving(store, io.StringIO(), engine) as stub:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id="x"))
                yield caught.value, server
        finally:
            await store.close()


def assert_told(error: grpc.aio.AioRpcError, code: grpc.StatusCode, reason: str, applied: str) -> None:
    """Fail unless the error says so, with advice to retry where that may help."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (error.code(), info.reason, info.metadata["applied"]) == (code, reason, applied)
    assert [detail.Unpack(retry) for detail in status.details[1:]] == ([True] if code is UNAVAILABLE else [])


def assert_told_any(error: grpc.aio.AioRpcError, reasons: set[str], applied: str) -> None:
    """Fail unless the error is UNAVAILABLE for one of these reasons and says this of the claim."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.reason in reasons
    assert_told(error, UNAVAILABLE, info.reason, applied)


@pytest.mark.parametrize("reply", REFUSALS, ids=lambda reply: reply.split()[0].decode())
async def test_every_error_reply_has_its_place(reply: bytes, engine: EngineName) -> None:
    """An error reply of Redis becomes its code, reason and applied; its text, which may quote a token, goes nowhere."""
    async with claiming(says(b"-%b\r\n" % reply), engine) as (error, server):
        assert_told(error, *REFUSALS[reply])
        assert reply.partition(b" ")[2].decode() not in repr(error)
        assert server.sets == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_every_fault_of_the_connection_is_doubt(fault: str, engine: EngineName) -> None:
    """Whatever comes instead of a reply, or nothing, is UNAVAILABLE and says that the claim may have been made."""
    behaviour, reason = FAULTS[fault]
    async with claiming(behaviour, engine) as (error, server):
        assert_told(error, UNAVAILABLE, reason, "unknown")
        assert server.sets == 1


@pytest.mark.parametrize("reply", [b"READONLY x", b"NOAUTH x", b"MASTERDOWN x"])
async def test_a_connection_to_the_wrong_server_is_replaced(reply: bytes, engine: EngineName) -> None:
    """After a refusal that shows another server behind the address, claims go over a new connection."""
    async with claiming(says(b"-%b\r\n" % reply), engine) as (_, server):

        async def connected_again() -> bool:
            return server.connections >= 2

        await eventually(connected_again, what="a new connection")


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_connection_that_ended_while_idle_claims_nothing(engine: EngineName, *, noticed: bool) -> None:
    """A claim right after its connection ended is not sent, or sent into a dead socket: no or unknown, never twice.

    Protection: what was written to a connection that ends is doubt, and is never written to the next one.
    """
    async with ScriptedRedis(says(b"$-1\r\n")) as server:
        store = make_store(StoreConfig(server.url, timeout_ms=5_000))
        assert isinstance(store, RedisStore)
        await store.open()
        [(_, link)] = store._nodes.places()
        channel = link.channel
        assert channel is not None
        if noticed:
            server.refuse_connections()
        else:
            # Until it reads again the service cannot see the end, however long the scheduler lets it wait.
            channel._transport.pause_reading()
        await server.hang_up()

        async def gone() -> bool:
            return link.channel is None

        async def written() -> bool:
            return channel.ended.done() or (bool(channel._unanswered) and not channel._unsent)

        async def connected_again() -> bool:
            return server.connections >= 2 and link.channel is not None

        request = dedup_pb2.ClaimTransactionRequest(transaction_id="x")
        async with serving(store, io.StringIO(), engine) as stub:
            if noticed:
                await eventually(gone, what="the end to be noticed")
            call = stub.ClaimTransaction(request)
            if not noticed:
                await eventually(written, what="the claim to be written")
                if not channel.ended.done():
                    channel._transport.resume_reading()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            if noticed:
                assert_told_any(caught.value, {"STORE_CONNECTION_LOST", "STORE_UNREACHABLE"}, "no")
            else:
                assert_told(caught.value, UNAVAILABLE, "STORE_CONNECTION_LOST", "unknown")
                await eventually(connected_again, what="a new connection")
            assert server.sets == 0
            if not noticed:
                assert (await stub.ClaimTransaction(request)).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
                assert server.sets == 1
        await store.close()

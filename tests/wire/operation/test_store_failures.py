"""Every way Redis can fail to answer a claim, as the caller sees it over gRPC.

Protections: the table of Redis errors in the store and the error table in the servicer. The caller always receives an
error that says whether the claim was made: never CLAIMED, never DUPLICATE, and never a second SET.
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
async def failed_claim(
    behaviour: Behaviour, engine: EngineName
) -> AsyncIterator[tuple[grpc.aio.AioRpcError, ScriptedRedis]]:
    """Claim through a service over a Redis with this behaviour, and yield the error and the Redis."""
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


def assert_error(error: grpc.aio.AioRpcError, code: grpc.StatusCode, reason: str, applied: str) -> None:
    """Assert code, reason and applied, and retry advice for UNAVAILABLE only."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (error.code(), info.reason, info.metadata["applied"]) == (code, reason, applied)
    assert [detail.Unpack(retry) for detail in status.details[1:]] == ([True] if code is UNAVAILABLE else [])


def assert_unavailable(error: grpc.aio.AioRpcError, reasons: set[str], applied: str) -> None:
    """Assert that the error is UNAVAILABLE with one of these reasons and this `applied`."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.reason in reasons
    assert_error(error, UNAVAILABLE, info.reason, applied)


@pytest.mark.parametrize("reply", REFUSALS, ids=lambda reply: reply.split()[0].decode())
async def test_redis_error_replies_map_to_the_error_table(reply: bytes, engine: EngineName) -> None:
    """A Redis error reply maps to its code, reason and applied; its text is not shown, as it may quote a token."""
    async with failed_claim(says(b"-%b\r\n" % reply), engine) as (error, server):
        assert_error(error, *REFUSALS[reply])
        assert reply.partition(b" ")[2].decode() not in repr(error)
        assert server.sets == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_connection_faults_leave_the_claim_unknown(fault: str, engine: EngineName) -> None:
    """A missing or invalid reply is UNAVAILABLE with `applied=unknown`."""
    behaviour, reason = FAULTS[fault]
    async with failed_claim(behaviour, engine) as (error, server):
        assert_error(error, UNAVAILABLE, reason, "unknown")
        assert server.sets == 1


@pytest.mark.parametrize("reply", [b"READONLY x", b"NOAUTH x", b"MASTERDOWN x"])
async def test_a_connection_to_the_wrong_server_is_replaced(reply: bytes, engine: EngineName) -> None:
    """After an error reply that suggests another server behind the address, the store reconnects."""
    async with failed_claim(says(b"-%b\r\n" % reply), engine) as (_, server):

        async def connected_again() -> bool:
            return server.connections >= 2

        await eventually(connected_again, what="a new connection")


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_claim_on_a_closed_connection_is_sent_at_most_once(engine: EngineName, *, noticed: bool) -> None:
    """After the connection closed, a claim is not sent (`no`) or is lost in the dead socket (`unknown`).

    Protection: a command written to a closed connection is never repeated on the next one.
    """
    async with ScriptedRedis(says(b"$-1\r\n")) as server:
        store = make_store(StoreConfig(server.url, timeout_ms=5_000))
        assert isinstance(store, RedisStore)
        await store.open()
        [(_, link)] = store._nodes.masters()
        channel = link.channel
        assert channel is not None
        if noticed:
            server.refuse_connections()
        else:
            # While reading is paused the service cannot notice the close, whatever the scheduler does.
            channel._transport.pause_reading()
        await server.hang_up()

        async def close_noticed() -> bool:
            return link.channel is None

        async def written() -> bool:
            return channel.ended.done() or (bool(channel._unanswered) and not channel._unsent)

        async def connected_again() -> bool:
            return server.connections >= 2 and link.channel is not None

        request = dedup_pb2.ClaimTransactionRequest(transaction_id="x")
        async with serving(store, io.StringIO(), engine) as stub:
            if noticed:
                await eventually(close_noticed, what="the close to be noticed")
            call = stub.ClaimTransaction(request)
            if not noticed:
                await eventually(written, what="the claim to be written")
                if not channel.ended.done():
                    channel._transport.resume_reading()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            if noticed:
                assert_unavailable(caught.value, {"STORE_CONNECTION_LOST", "STORE_UNREACHABLE"}, "no")
            else:
                assert_error(caught.value, UNAVAILABLE, "STORE_CONNECTION_LOST", "unknown")
                await eventually(connected_again, what="a new connection")
            assert server.sets == 0
            if not noticed:
                assert (await stub.ClaimTransaction(request)).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
                assert server.sets == 1
        await store.close()

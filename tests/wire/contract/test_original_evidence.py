"""The original project's four scenarios over real gRPC on both stores, and the bug that it fixed.

The original's transaction ids look like `lucky_box:{device}:{unit}:{event}:{date}`.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import redis.asyncio

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import eventually
from tests.support.processes import RedisProcess, ServiceProcess

CLAIMED, DUPLICATE = dedup_pb2.CLAIM_OUTCOME_CLAIMED, dedup_pb2.CLAIM_OUTCOME_DUPLICATE


async def claim_together(target: str, transaction_id: str, callers: int, ttl_ms: int = 60_000) -> Counter[int]:
    """Claim one id `callers` times at once and count the outcomes."""
    request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id)
    request.ttl.FromMilliseconds(ttl_ms)
    # Separate channels, as separate instances of a caller have.
    channels = [grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(10)]
    try:
        stubs = [dedup_pb2_grpc.DedupServiceStub(channel) for channel in channels]
        await asyncio.gather(*map(connect, stubs))
        replies = await asyncio.gather(*(stubs[i % 10].ClaimTransaction(request) for i in range(callers)))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))
    return Counter(reply.outcome for reply in replies)


async def connect(stub: "dedup_pb2_grpc.DedupServiceAsyncStub") -> None:
    """Return when the channel of a stub is connected."""
    # A watch of its state, as in channel_ready(), can outlive the channel and then hold up the end of grpc.aio.
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id="unclaimed"), wait_for_ready=True)


@pytest.mark.parametrize("callers", [10, 100])
async def test_exactly_one_concurrent_caller_wins(service: ServiceProcess, unique: str, callers: int) -> None:
    """Of 10 (100) concurrent claims of one id, 1 receives CLAIMED and 9 (99) receive DUPLICATE."""
    outcomes = await claim_together(service.target, f"lucky_box:{unique}:405:daily:2025-11-28", callers)
    assert outcomes == {CLAIMED: 1, DUPLICATE: callers - 1}


async def test_an_id_can_be_claimed_again_after_its_expiry(service: ServiceProcess, unique: str) -> None:
    """An id can be claimed again once its claim has expired, and not before."""
    transaction_id = f"lucky_box:{unique}:405:daily:2025-11-28"
    request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id)
    request.ttl.FromMilliseconds(400)
    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        begun = time.time()
        first = await stub.ClaimTransaction(request)
        assert first.outcome == CLAIMED

        async def wins() -> bool:
            return bool((await stub.ClaimTransaction(request)).outcome == CLAIMED)

        await eventually(wins, what="the expiry")
        # The stores count in whole milliseconds.
        assert time.time() - begun > 0.4 - 0.002


async def test_different_ids_are_independent(service: ServiceProcess, unique: str) -> None:
    """Claims of different ids never conflict."""
    ids = [f"lucky_box:{unique}:{unit}:daily:2025-11-28" for unit in range(50)]
    outcomes = await asyncio.gather(*(claim_together(service.target, transaction_id, 1) for transaction_id in ids))
    assert outcomes == [{CLAIMED: 1}] * len(ids)


CheckThenSet = Callable[[str], Awaitable[bool]]


@asynccontextmanager
async def legacy_service(check_then_set: CheckThenSet) -> AsyncIterator[str]:
    """Yield the target of a gRPC server with the check-then-set guard from before the fix."""

    async def claim(request: dedup_pb2.ClaimTransactionRequest, _: object) -> dedup_pb2.ClaimTransactionResponse:
        won = await check_then_set(request.transaction_id)
        return dedup_pb2.ClaimTransactionResponse(outcome=CLAIMED if won else DUPLICATE)

    handler = grpc.unary_unary_rpc_method_handler(
        claim,
        dedup_pb2.ClaimTransactionRequest.FromString,
        dedup_pb2.ClaimTransactionResponse.SerializeToString,
    )
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("dedup.v1.DedupService", {"ClaimTransaction": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def assert_several_win(check_then_set: CheckThenSet, unique: str) -> None:
    """Assert that in one of 50 rounds the old guard lets several of 100 concurrent callers win."""
    async with legacy_service(check_then_set) as target:
        for round_number in range(50):
            outcomes = await claim_together(target, f"lucky_box:{unique}:{round_number}:daily:2025-11-28", 100)
            if outcomes[CLAIMED] > 1:
                return
    raise AssertionError("the old guard's race did not occur")


async def test_the_old_guard_on_redis_lets_several_win(redis_server: RedisProcess, unique: str) -> None:
    """GET then SET lets several callers win under the load of the scenarios above."""
    async with redis.asyncio.Redis(port=redis_server.port) as client:

        async def check_then_set(transaction_id: str) -> bool:
            if await client.get(transaction_id):
                return False
            await client.set(transaction_id, b"\xc3", ex=60)
            return True

        await assert_several_win(check_then_set, unique)


async def test_the_old_guard_on_sqlite_lets_several_win(tmp_path: Path, unique: str) -> None:
    """SELECT then INSERT has the same race."""
    path = tmp_path / "legacy.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE flags (id TEXT PRIMARY KEY)")
    database.close()

    def step(statement: str, transaction_id: str) -> list[tuple[str]]:
        connection = sqlite3.connect(path, timeout=30)
        try:
            with connection:
                return connection.execute(statement, (transaction_id,)).fetchall()
        finally:
            connection.close()

    async def check_then_set(transaction_id: str) -> bool:
        if await asyncio.to_thread(step, "SELECT id FROM flags WHERE id = ?", transaction_id):
            return False
        await asyncio.to_thread(step, "INSERT OR REPLACE INTO flags VALUES (?)", transaction_id)
        return True

    await assert_several_win(check_then_set, unique)

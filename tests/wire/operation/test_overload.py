"""In-flight limit, large batches, deadlines and cancelled calls: errors arrive in time, each caller gets its reply."""

import asyncio
import io
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api import endpoint
from dedup_service.config.settings import EngineName
from dedup_service.stores.registry import StoreConfig, make_store
from tests.support.fault_proxy import FaultProxy
from tests.support.in_process import serving
from tests.support.polling import eventually
from tests.support.processes import RedisProcess, ServiceProcess

pytestmark = pytest.mark.every_engine

StartService = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest


def error_fields(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, str]:
    """Return code, reason and applied; the last two are empty if gRPC itself made the error."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details[0].Unpack(info):
        return error.code(), "", ""
    return error.code(), info.reason, info.metadata["applied"]


async def test_the_in_flight_limit_rejects_claims_but_not_health_checks(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """A call over the limit is rejected with `applied=no`; health still answers, and the in-flight calls succeed.

    Protection: the server's own limit on the claim rpcs. gRPC's limit would also count health checks.
    """
    async with FaultProxy(redis_server.port) as proxy:
        arguments = ("--store-url", proxy.url, "--store-timeout", "20s", "--max-in-flight", "5")
        service = await asyncio.to_thread(start_service, *arguments)
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            proxy.hold_replies.clear()
            calls = [stub.ClaimTransaction(Claim(transaction_id=f"{unique}-{number}")) for number in range(6)]

            async def one_is_refused() -> bool:
                return any(call.done() for call in calls)

            await eventually(one_is_refused, what="the rejected call")
            refused = next(call for call in calls if call.done())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert error_fields(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", "no")
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            proxy.hold_replies.set()
            replies = await asyncio.gather(*(call for call in calls if call is not refused))
            assert {reply.outcome for reply in replies} == {dedup_pb2.CLAIM_OUTCOME_CLAIMED}


async def test_a_call_with_too_little_time_left_is_not_sent(
    redis_server: RedisProcess, unique: str, engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose deadline leaves no time to reply is rejected, and nothing reaches Redis.

    Protection: the margin reserved for the reply.
    """
    monkeypatch.setattr(endpoint, "ANSWER_MARGIN_S", 100)
    async with FaultProxy(redis_server.port) as proxy:
        store = make_store(StoreConfig(proxy.url, timeout_ms=5_000))
        await store.open()
        async with serving(store, io.StringIO(), engine) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ClaimTransaction(Claim(transaction_id=unique), timeout=50)
            assert error_fields(caught.value) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_NEAR", "no")
        await store.close()
        assert b"\r\nSET\r\n" not in proxy.sent_upstream


async def test_a_slow_store_is_reported_before_the_deadline(
    redis_server: RedisProcess, unique: str, engine: EngineName
) -> None:
    """Over a slow Redis every call ends by its deadline, and calls with enough time receive reason and applied.

    Protection: the server waits for the store until the caller's deadline minus the margin.
    """
    async with FaultProxy(redis_server.port) as proxy:
        store = make_store(StoreConfig(proxy.url, timeout_ms=20_000))
        await store.open()
        async with serving(store, io.StringIO(), engine) as stub:
            proxy.hold_replies.clear()
            deadlines_s = [0.001 * 1.5**step for step in range(17)]
            calls = [
                stub.ClaimTransaction(Claim(transaction_id=f"{unique}-{step}"), timeout=deadline_s)
                for step, deadline_s in enumerate(deadlines_s)
            ]
            results = await asyncio.gather(*calls, return_exceptions=True)
            errors = [error_fields(error) for error in results if isinstance(error, grpc.aio.AioRpcError)]
            assert len(errors) == len(results)
            assert {code for code, _, _ in errors} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            assert {error[1:] for error in errors} <= {
                *(("", ""), ("DEADLINE_TOO_NEAR", "no"), ("DEADLINE_PASSED", "unknown")),
            }
            claim, look = Claim(transaction_id=unique), dedup_pb2.GetTransactionRequest(transaction_id=unique)
            assert await first_with_reason(lambda: stub.ClaimTransaction(claim, timeout=0.7)) == (
                "DEADLINE_PASSED",
                "unknown",
            )
            assert await first_with_reason(lambda: stub.GetTransaction(look, timeout=0.5)) == ("DEADLINE_PASSED", "no")
            proxy.hold_replies.set()
            reply = await stub.ClaimTransaction(Claim(transaction_id=f"{unique}-after"), timeout=20)
            assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        await store.close()
        assert proxy.connections == 1


async def first_with_reason(call: Callable[[], Awaitable[object]]) -> tuple[str, str]:
    """Repeat a failing call until its error has a reason; return reason and applied.

    On a loaded machine the caller's own deadline can pass before the server's error arrives.
    """
    for _ in range(50):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        if (found := error_fields(caught.value)[1:]) != ("", ""):
            return found
    raise AssertionError("every call ended by its own deadline")


Batch = dedup_pb2.BatchClaimTransactionsRequest


def a_batch(name: str, size: int = 1_000) -> dedup_pb2.BatchClaimTransactionsRequest:
    """Return a batch of fresh ids."""
    return Batch(requests=[Claim(transaction_id=f"{name}-{number}") for number in range(size)])


def entry_ends(reply: dedup_pb2.BatchClaimTransactionsResponse) -> Counter[tuple[str, str]]:
    """Count the entries of a reply by outcome, or by reason and applied."""
    ends: Counter[tuple[str, str]] = Counter()
    for entry in reply.entries:
        if entry.HasField("error"):
            info = error_details_pb2.ErrorInfo()
            assert entry.error.details[0].Unpack(info)
            ends[info.reason, info.metadata["applied"]] += 1
        else:
            ends[dedup_pb2.ClaimOutcome.Name(entry.response.outcome), ""] += 1
    return ends


async def test_thirty_large_batches_at_once_are_all_claimed(
    start_service: StartService, start_redis: Callable[..., RedisProcess], unique: str
) -> None:
    """Of 30 batches of 1,000 claims every claim is CLAIMED, also single ones beside them, and health is SERVING.

    Protection: batches wait for the store in slices, where their claims filled its queue and were refused.
    """
    redis = await asyncio.to_thread(start_redis)
    service = await asyncio.to_thread(start_service, "--store-url", redis.url, "--store-timeout", "20s")
    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)

        async def caller(number: int) -> Counter[tuple[str, str]]:
            return entry_ends(await stub.BatchClaimTransactions(a_batch(f"{unique}-{number}")))

        batches = asyncio.gather(*(caller(number) for number in range(30)))
        health, singles = health_pb2_grpc.HealthStub(channel), 0
        while not batches.done():
            singles += 1
            single = await stub.ClaimTransaction(Claim(transaction_id=f"{unique}-single-{singles}"))
            assert single.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
            check = await health.Check(health_pb2.HealthCheckRequest())
            assert check.status == health_pb2.HealthCheckResponse.SERVING
        assert sum(await batches, Counter[tuple[str, str]]()) == {("CLAIM_OUTCOME_CLAIMED", ""): 30_000}
        assert singles > 1
    assert service.events("store_became_unavailable") == []


async def test_large_batches_over_a_frozen_redis_are_refused(
    start_service: StartService, start_redis: Callable[..., RedisProcess], unique: str
) -> None:
    """Of 30,000 claims over a suspended Redis only the first slices are unknown, and the memory stays bounded.

    Protection: a slice that waits for Redis holds back the others, and its timeout ends it.
    """
    redis = await asyncio.to_thread(start_redis)
    service = await asyncio.to_thread(start_service, "--store-url", redis.url)
    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        before = memory_kib(service.pid) if sys.platform == "linux" else 0
        redis.pause()
        batches = [stub.BatchClaimTransactions(a_batch(f"{unique}-{number}")) for number in range(30)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ClaimTransaction(Claim(transaction_id=unique))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        ends = sum([entry_ends(await batch) for batch in batches], Counter[tuple[str, str]]())
        unknown = sum(count for (_, applied), count in ends.items() if applied == "unknown")
        refused = sum(count for (_, applied), count in ends.items() if applied == "no")
        assert unknown + refused == 30_000
        assert unknown <= 1_000
        if sys.platform == "linux":
            assert memory_kib(service.pid) - before < 120_000
        redis.resume()

        async def claimed_again() -> bool:
            ends = entry_ends(await stub.BatchClaimTransactions(a_batch(unique, 10)))
            return ends == {("CLAIM_OUTCOME_CLAIMED", ""): 10}

        await eventually(claimed_again, what="a batch after the pause")


async def test_a_batch_that_waits_too_long_is_refused_before_its_deadline(
    redis_server: RedisProcess, unique: str, engine: EngineName
) -> None:
    """Behind a full batch over a slow Redis, a batch ends shortly before its deadline: certainly not applied.

    Protection: a batch waits for the store until its caller's deadline minus the time for its answers.
    """
    async with FaultProxy(redis_server.port) as proxy:
        store = make_store(StoreConfig(proxy.url, timeout_ms=60_000))
        await store.open()
        async with serving(store, io.StringIO(), engine) as stub:
            proxy.hold_replies.clear()
            first = stub.BatchClaimTransactions(a_batch(unique))

            async def sent() -> bool:
                return proxy.sent_upstream.count(b"\r\nSET\r\n") == 1_000

            await eventually(sent, what="the first batch")
            late = await stub.BatchClaimTransactions(a_batch(f"{unique}-late", 10), timeout=4)
            assert entry_ends(late) == {("STORE_QUEUE_FULL", "no"): 10}
            proxy.hold_replies.set()
            assert entry_ends(await first) == {("CLAIM_OUTCOME_CLAIMED", ""): 1_000}
        await store.close()


def memory_kib(pid: int) -> int:
    """Return the resident memory of a process, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.parametrize("calls", [4_000, pytest.param(20_000, marks=pytest.mark.nightly)])
async def test_thousands_of_random_cancels(
    start_service: StartService, redis_server: RedisProcess, unique: str, engine: EngineName, calls: int
) -> None:
    """A random half of many calls under load is cancelled; every reply carries its caller's token.

    Protection: the store reads the replies of cancelled calls in order, over one Redis connection, and the service's
    memory stays flat. The native engine may close the caller's connection (docs/engines.md): its calls then end as
    UNAVAILABLE, and none receives a wrong reply.
    """
    async with FaultProxy(redis_server.port) as proxy:
        service = await asyncio.to_thread(start_service, "--store-url", proxy.url, "--store-timeout", "20s")
        # The start-up checks used a connection of their own.
        connections = proxy.connections
        chance = random.Random(20251128)
        ends: Counter[str] = Counter()
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)

            async def call(number: int) -> None:
                token = f"token-{unique[:16]}-{number:06}"
                request = Claim(transaction_id=f"{unique}-{number}", claim_token=token, claimant=f"caller {number}")
                claim = stub.ClaimTransaction(request)
                if chance.random() < 0.5:
                    await asyncio.sleep(chance.uniform(0, 0.02))
                    claim.cancel()
                try:
                    reply = await claim
                except asyncio.CancelledError:
                    ends["cancelled"] += 1
                    return
                except grpc.aio.AioRpcError as error:
                    ends[f"{engine}: {error.code().name}"] += 1
                    return
                ends["answered"] += 1
                assert (reply.outcome, reply.claim_token, reply.transaction.claimant) == (
                    *(dedup_pb2.CLAIM_OUTCOME_CLAIMED, token, f"caller {number}"),
                )

            async def caller(first: int, last: int) -> None:
                for number in range(first, last):
                    await call(number)

            memory: list[int] = []
            for half in range(2):
                begins = range(half * calls // 2, (half + 1) * calls // 2, calls // 200)
                await asyncio.gather(*(caller(begin, begin + calls // 200) for begin in begins))
                if sys.platform == "linux":
                    memory.append(memory_kib(service.pid))
        assert set(ends) <= {"cancelled", "answered", "native: UNAVAILABLE"}, ends
        assert ends["cancelled"] > calls / 10
        assert ends["answered"] > calls / 10
        assert proxy.connections == connections
        if memory:
            # Half of what calls that leak 4 KiB each would add in the second half.
            assert memory[1] - memory[0] < calls, memory

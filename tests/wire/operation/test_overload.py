"""Deadlines, too many calls, and callers that go away: doubt is told in time, and nobody hears another's answer."""

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


def told(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, str]:
    """Return code, reason and applied; the latter two are empty where gRPC itself made the error."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status is None or not status.details[0].Unpack(info):
        return error.code(), "", ""
    return error.code(), info.reason, info.metadata["applied"]


async def test_too_many_calls_are_refused_and_health_is_not(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """Beyond the limit a call is refused as certainly not applied; health still answers, and the others get theirs.

    Protection: the server's own limit on the claim rpcs, instead of gRPC's, which counts health checks too.
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

            await eventually(one_is_refused, what="the refusal")
            refused = next(call for call in calls if call.done())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert told(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", "no")
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            proxy.hold_replies.set()
            replies = await asyncio.gather(*(call for call in calls if call is not refused))
            assert {reply.outcome for reply in replies} == {dedup_pb2.CLAIM_OUTCOME_CLAIMED}


async def test_a_deadline_too_near_is_refused_unsent(
    redis_server: RedisProcess, unique: str, engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that leaves no time for an answer is not begun: nothing reaches Redis.

    Protection: the margin that is kept for the way back.
    """
    monkeypatch.setattr(endpoint, "ANSWER_MARGIN_S", 100)
    async with FaultProxy(redis_server.port) as proxy:
        store = make_store(StoreConfig(proxy.url, timeout_ms=5_000))
        await store.open()
        async with serving(store, io.StringIO(), engine) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ClaimTransaction(Claim(transaction_id=unique), timeout=50)
            assert told(caught.value) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_NEAR", "no")
        await store.close()
        assert b"\r\nSET\r\n" not in proxy.sent_upstream


async def test_a_store_that_is_late_is_doubt_before_the_deadline(
    redis_server: RedisProcess, unique: str, engine: EngineName
) -> None:
    """Over a slow Redis calls of every deadline end by it; those with time left are told what is known.

    Protection: the store is waited for no longer than the caller does, less the margin.
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
            errors = [told(error) for error in results if isinstance(error, grpc.aio.AioRpcError)]
            assert len(errors) == len(results)
            assert {code for code, _, _ in errors} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            assert {error[1:] for error in errors} <= {
                *(("", ""), ("DEADLINE_TOO_NEAR", "no"), ("DEADLINE_PASSED", "unknown")),
            }
            claim, look = Claim(transaction_id=unique), dedup_pb2.GetTransactionRequest(transaction_id=unique)
            assert await first_told(lambda: stub.ClaimTransaction(claim, timeout=0.7)) == ("DEADLINE_PASSED", "unknown")
            assert await first_told(lambda: stub.GetTransaction(look, timeout=0.5)) == ("DEADLINE_PASSED", "no")
            proxy.hold_replies.set()
            reply = await stub.ClaimTransaction(Claim(transaction_id=f"{unique}-after"), timeout=20)
            assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        await store.close()
        assert proxy.connections == 1


async def first_told(call: Callable[[], Awaitable[object]]) -> tuple[str, str]:
    """Return reason and applied of the first failed call that has them.

    On a busy machine the caller's own deadline can pass before the reply arrives; then it calls again.
    """
    for _ in range(50):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call()
        if (found := told(caught.value)[1:]) != ("", ""):
            return found
    raise AssertionError("every call was ended by its own deadline")


def memory_kib(pid: int) -> int:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


async def test_ten_thousand_random_cancels(
    start_service: StartService, redis_server: RedisProcess, unique: str, engine: EngineName
) -> None:
    """Of 10,000 calls under load a random part is cancelled: every answer carries its own token.

    Protection: replies to cancelled callers are read in their turn, over one Redis connection, and the memory of the
    service stays flat. The engine native may close the caller's connection meanwhile (docs/engines.md): its calls then
    end as UNAVAILABLE, and none receives a wrong answer.
    """
    async with FaultProxy(redis_server.port) as proxy:
        service = await asyncio.to_thread(start_service, "--store-url", proxy.url, "--store-timeout", "20s")
        # The checks of the start had one of their own.
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
                begin = half * 5_000
                await asyncio.gather(*(caller(begin + step * 50, begin + step * 50 + 50) for step in range(100)))
                if sys.platform == "linux":
                    memory.append(memory_kib(service.pid))
        assert set(ends) <= {"cancelled", "answered", "native: UNAVAILABLE"}, ends
        assert ends["cancelled"] > 1_000
        assert ends["answered"] > 1_000
        assert proxy.connections == connections
        if memory:
            # The second half may not cost what the first one did: 5,000 leaked calls of 4 KiB would be 20 MiB.
            assert memory[1] - memory[0] < 10_000, memory

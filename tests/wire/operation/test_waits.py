"""Waiting claims have a limit of their own, and never lock out the holder they wait for."""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.errors import refused
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess
from tests.support.scrapes import Scrape

pytestmark = pytest.mark.every_engine

StartService = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest
TOKEN = "token-of-sixteen"
ENOUGH_S = 60


def waiting_claim(transaction_id: str) -> Claim:
    """Return a claim that waits for longer than any test."""
    request = Claim(transaction_id=transaction_id)
    request.wait.FromSeconds(200)
    return request


def until_waiting(service: ServiceProcess, count: int) -> None:
    """Return when this many claims wait, by the metrics of the service."""
    wait_until(lambda: Scrape(service).total("dedup_calls_waiting") == count, ENOUGH_S, f"{count} waits")


def test_waiters_leave_room_for_claims_and_for_their_holder(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """With every wait taken, a claim and the holder's extension and completion succeed, on the same connection.

    Protections: waits do not count as calls in flight, and a connection has streams for both limits together. More
    waits are refused with their own reason.
    """
    at_once, waits = 40, 160
    arguments = ("--max-in-flight", str(at_once), "--max-waits", str(waits), "--metrics-listen", "127.0.0.1:0")
    service = start_service("--store-url", redis_server.url, *arguments)
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        stub.ClaimTransaction(Claim(transaction_id=unique, claim_token=TOKEN), timeout=ENOUGH_S)
        waiters = []
        for count in range(at_once, waits + 1, at_once):
            waiters += [stub.ClaimTransaction.future(waiting_claim(unique)) for _ in range(at_once)]
            until_waiting(service, count)
        assert Scrape(service).total("dedup_calls_in_flight") == 0

        excess = refused(lambda: stub.ClaimTransaction(waiting_claim(unique), timeout=ENOUGH_S))
        assert (excess.code, excess.reason, excess.applied, excess.retry_after_ms) == (
            *(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WAITS", "no", 200),
        )
        assert excess.message.startswith("160 claims are waiting: ")

        other = stub.ClaimTransaction(waiting_claim(f"{unique}-other"), timeout=ENOUGH_S)
        assert other.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        extension = dedup_pb2.ExtendTransactionRequest(transaction_id=unique, claim_token=TOKEN)
        extended = stub.ExtendTransaction(extension, timeout=ENOUGH_S)
        assert extended.outcome == dedup_pb2.EXTEND_OUTCOME_EXTENDED
        completion = dedup_pb2.CompleteTransactionRequest(transaction_id=unique, claim_token=TOKEN, result=b"paid")
        completed = stub.CompleteTransaction(completion, timeout=ENOUGH_S)
        assert completed.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
        answers = [waiter.result(ENOUGH_S) for waiter in waiters]
        assert {(answer.outcome, answer.transaction.result) for answer in answers} == {
            (dedup_pb2.CLAIM_OUTCOME_DUPLICATE, b"paid")
        }
        until_waiting(service, 0)


async def test_claims_in_flight_leave_room_for_holders(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """While claims fill their limit, holders' calls are admitted, up to a limit of their own.

    Protections: complete, release and extend are counted apart from claims, and are counted.
    """
    async with FaultProxy(redis_server.port) as proxy:
        arguments = ("--store-url", proxy.url, "--store-timeout", "50s", "--max-in-flight", "2")
        service = await asyncio.to_thread(start_service, *arguments)
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            for name in ("-completed", "-released"):
                await stub.ClaimTransaction(Claim(transaction_id=unique + name, claim_token=TOKEN))
            proxy.hold_replies.clear()
            claims = [stub.ClaimTransaction(Claim(transaction_id=f"{unique}-{number}")) for number in range(2)]
            await sent(proxy, 0, f"{unique}-0", f"{unique}-1")
            look = dedup_pb2.GetTransactionRequest(transaction_id=unique)
            assert await reason_of(stub.ClaimTransaction(Claim(transaction_id=unique))) == "TOO_MANY_CALLS"
            assert await reason_of(stub.GetTransaction(look)) == "TOO_MANY_CALLS"

            before = len(proxy.sent_upstream)
            completion = dedup_pb2.CompleteTransactionRequest(transaction_id=f"{unique}-completed", claim_token=TOKEN)
            release = dedup_pb2.ReleaseTransactionRequest(transaction_id=f"{unique}-released", claim_token=TOKEN)
            completing, releasing = stub.CompleteTransaction(completion), stub.ReleaseTransaction(release)
            await sent(proxy, before, f"{unique}-completed", f"{unique}-released")
            assert await reason_of(stub.ReleaseTransaction(release)) == "TOO_MANY_CALLS"

            proxy.hold_replies.set()
            assert (await completing).outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
            assert (await releasing).outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED
            assert {(await claim).outcome for claim in claims} == {dedup_pb2.CLAIM_OUTCOME_CLAIMED}


async def test_a_shutdown_short_of_cpu_time_cancels_no_wait(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """At SIGTERM with a fifth of a CPU, each of 1,000 waits ends as OK or UNAVAILABLE, also those nobody has seen yet.

    Protection: an engine that would cancel calls is not stopped when the drain was late; connections end instead.
    """
    service = await asyncio.to_thread(start_service, "--store-url", redis_server.url)
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(service.target, options=options) for _ in range(20)]
    stubs = [dedup_pb2_grpc.DedupServiceStub(channel) for channel in channels]
    with a_fifth_of_a_cpu(service):
        await stubs[0].ClaimTransaction(Claim(transaction_id=unique), wait_for_ready=True)
        waits = [asyncio.create_task(code_of(stubs[number % 20], unique)) for number in range(1_000)]
        # Answered after some of them have begun to wait.
        await stubs[1].GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique))
        service.signal(signal.SIGTERM)
        codes = set(await asyncio.gather(*waits))
    await asyncio.gather(*(channel.close() for channel in channels))
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert await asyncio.to_thread(service.wait) == 0


@contextmanager
def a_fifth_of_a_cpu(service: ServiceProcess) -> Iterator[None]:
    """Suspend a service for four fifths of the time."""
    done = threading.Event()

    def alternate() -> None:
        while not done.wait(0.005):
            service.signal(signal.SIGSTOP)
            done.wait(0.02)
            service.signal(signal.SIGCONT)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


async def code_of(stub: "dedup_pb2_grpc.DedupServiceAsyncStub", transaction_id: str) -> grpc.StatusCode:
    """Claim with a wait, and return the status code."""
    call = stub.ClaimTransaction(waiting_claim(transaction_id))
    return await call.code()


async def sent(proxy: FaultProxy, position: int, *transaction_ids: str) -> None:
    """Return when commands with these ids were sent to Redis after a position in its input."""

    async def were_sent() -> bool:
        return all(name.encode() in proxy.sent_upstream[position:] for name in transaction_ids)

    await eventually(were_sent, ENOUGH_S, "the commands")


async def reason_of(call: Awaitable[object]) -> str:
    """Return the reason of a call that is refused while others are held."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, ENOUGH_S)
    status, info = rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return str(info.reason)

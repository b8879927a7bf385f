"""Coalesced claims share calls, but each keeps its own token, error and timeout."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import pytest

from dedup import CallFailed, Client, ClientClosed, DuplicateTransaction, InvalidRequest, Unavailable, aio
from dedup.batches import MAX_BATCH, answers_of
from dedup.coalescing import AsyncCoalescer, Crowd
from dedup.v1 import dedup_pb2


class Batches:
    """Counts the batches of a client and passes them on."""

    def __init__(self, stub: Any) -> None:
        self.sizes: list[int] = []
        self._call = stub.BatchClaimTransactions
        self.BatchClaimTransactions = self
        self.future = self._future

    def __call__(self, request: Any, timeout: float) -> Any:
        self.sizes.append(len(request.requests))
        return self._call(request, timeout=timeout)

    def _future(self, request: Any, timeout: float) -> Any:
        self.sizes.append(len(request.requests))
        return self._call.future(request, timeout=timeout)


async def watch(client: aio.Client) -> Batches:
    """Return the counter of a client's batches."""
    await client.get("nothing")
    transport: Any = client._transport
    batches = Batches(transport._stub)
    transport._coalescer._stub = batches
    return batches


async def test_concurrent_claims_share_calls_and_nothing_else(target: str, unique: str) -> None:
    """Each has its own answer: claimed, duplicate, or invalid."""
    async with aio.Client(target, coalesce=True, coalesce_delay=0.05, timeout=20) as client:
        batches = await watch(client)

        async def claim(number: int) -> object:
            try:
                ttl = -1.0 if number % 10 == 9 else None
                return (await client.claim(f"{unique}-{number // 2}", ttl=ttl)).claim_token
            except (DuplicateTransaction, InvalidRequest) as error:
                return type(error)

        answers = await asyncio.gather(*map(claim, range(100)))
        assert batches.sizes == [100]
    assert answers.count(InvalidRequest) == 10
    assert answers.count(DuplicateTransaction) == 40
    tokens = [answer for answer in answers if isinstance(answer, str)]
    assert len(set(tokens)) == len(tokens) == 50


async def test_no_batch_is_larger_than_the_service_takes(target: str, unique: str) -> None:
    """A full batch leaves at once."""
    async with aio.Client(target, coalesce=True, coalesce_delay=0.2, timeout=20, attempt_timeout=20) as client:
        batches = await watch(client)
        await asyncio.gather(*[client.claim(f"{unique}-{number}")._claiming for number in range(2_100)])
        assert batches.sizes == [1_000, 1_000, 100]


def test_threads_share_calls(target: str, unique: str) -> None:
    """The blocking client coalesces too. Of 100 threads one claims and 99 are duplicates."""
    with Client(target, coalesce=True, coalesce_delay=0.1, timeout=20) as client, ThreadPoolExecutor(100) as pool:
        transport: Any = client._transport
        batches = transport._coalescer._stub = Batches(transport._stub)
        together = threading.Barrier(100)

        def claim(_: int) -> bool:
            together.wait()
            try:
                client.claim(unique)
            except DuplicateTransaction:
                return False
            return True

        assert sum(pool.map(claim, range(100))) == 1
        assert sum(batches.sizes) == 100
        assert len(batches.sizes) < 20


def test_an_interrupted_thread_does_not_strand_the_others(target: str, unique: str) -> None:
    """Its batch still leaves, and the next claim starts another."""
    with Client(target, coalesce=True, timeout=20) as client:
        transport: Any = client._transport
        coalescer = transport._coalescer
        gather = coalescer._changed.wait_for

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        coalescer._changed.wait_for = interrupted
        with pytest.raises(KeyboardInterrupt):
            client.claim(unique)
        coalescer._changed.wait_for = gather
        client.claim(f"{unique}-2")
        assert not coalescer._waiting


def test_a_batch_leaves_when_the_answered_callers_are_back() -> None:
    """It does not leave earlier, or while another batch is in flight. A full batch always leaves."""
    crowd = Crowd()
    assert not crowd.is_gathered(MAX_BATCH - 1)
    crowd.left(3)
    assert not crowd.is_gathered(4)
    assert crowd.is_gathered(MAX_BATCH)
    crowd.answered(3, waiting=1)
    assert [crowd.is_gathered(waiting) for waiting in (3, 4)] == [False, True]


async def test_claims_do_not_wait_for_absent_callers(target: str, unique: str) -> None:
    """Two claims that were answered together leave together again at once, regardless of the delay."""
    async with aio.Client(target, coalesce=True, coalesce_delay=0.05, timeout=20) as client:
        batches = await watch(client)
        for number in range(3):
            await asyncio.gather(*(client.claim(f"{unique}-{number}-{caller}")._claiming for caller in "ab"))
            transport: Any = client._transport
            transport._coalescer._delay_s = 3600
        assert batches.sizes == [2, 2, 2]


def test_threads_do_not_wait_for_absent_callers(target: str, unique: str) -> None:
    """The same for the blocking client."""
    with Client(target, coalesce=True, timeout=20) as client:
        client.claim(unique)
        transport: Any = client._transport
        transport._coalescer._delay_s = 3600
        client.claim(f"{unique}-2")


async def test_a_closed_client_fails_at_once() -> None:
    """It does not wait for the end of the budget."""
    blocking = Client("127.0.0.1:1", coalesce=True, timeout=60, attempt_timeout=60)
    blocking.close()
    with pytest.raises(ClientClosed):
        blocking.claim("x")
    waiting = aio.Client("127.0.0.1:1", coalesce=True, timeout=60, attempt_timeout=60)
    with pytest.raises(Unavailable):
        await waiting.claim("x", timeout=0.1)
    transport: Any = waiting._transport
    await transport.close()
    with pytest.raises(ClientClosed):
        await waiting.claim("x")


async def test_a_claim_that_waits_travels_alone(target: str, unique: str) -> None:
    """It would delay the others, and the service rejects it in a batch."""
    async with aio.Client(target, coalesce=True) as client:
        batches = await watch(client)
        first = await client.claim(unique)
        waiting = asyncio.ensure_future(client.claim(unique, wait=20)._claiming)
        await first.release()
        assert not (await waiting).replayed
        assert batches.sizes == [1]


async def test_a_failed_batch_fails_each_claim_separately() -> None:
    """Every caller gets its own exception and makes its own number of attempts."""
    async with aio.Client("127.0.0.1:1", coalesce=True, timeout=0.3) as client:
        errors = await asyncio.gather(
            client.claim("a")._claiming, client.claim("b", timeout=0.01)._claiming, return_exceptions=True
        )
    assert [type(error) for error in errors] == [Unavailable] * 2
    assert errors[0] is not errors[1]


async def test_a_short_budget_does_not_wait_for_its_batch() -> None:
    """It times out alone, in doubt, and the others continue. A cancelled caller is not answered."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    class Slow:
        def BatchClaimTransactions(self, request: Any, timeout: float) -> Any:  # noqa: N802 - The name of the rpc.
            assert (len(request.requests), timeout) == (3, 20)
            return answer

    coalescer = AsyncCoalescer(Slow(), 0.0)  # type: ignore[arg-type]
    requests = [dedup_pb2.ClaimTransactionRequest(transaction_id=name) for name in "abc"]
    patient = asyncio.ensure_future(coalescer.claim(requests[0], 20))
    gone = asyncio.ensure_future(coalescer.claim(requests[1], 20))
    with pytest.raises(Unavailable) as caught:
        await coalescer.claim(requests[2], 0.05)
    assert (caught.value.code, caught.value.applied) == (grpc.StatusCode.DEADLINE_EXCEEDED, "unknown")
    gone.cancel()
    reply = dedup_pb2.ClaimTransactionResponse(outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED)
    entries = [dedup_pb2.BatchClaimEntry(response=reply)] * 3
    answer.set_result(dedup_pb2.BatchClaimTransactionsResponse(entries=entries))
    assert await patient == reply


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_answers_that_cannot_be_matched_fail_every_claim(entries: int) -> None:
    """A reply of another length or with an empty entry is never a claim."""
    reply = dedup_pb2.BatchClaimTransactionsResponse(entries=[dedup_pb2.BatchClaimEntry()] * entries)
    assert all(isinstance(answer, CallFailed) for answer in answers_of(reply, 2))
    assert isinstance(
        answers_of(dedup_pb2.BatchClaimTransactionsResponse(entries=reply.entries), entries or 1)[0], CallFailed
    )

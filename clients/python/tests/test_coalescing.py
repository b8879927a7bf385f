"""Coalesced claims share calls, but each keeps its own token, deadline and error."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from redis.crc import key_slot

from dedup import CallFailed, Client, ClientClosed, DuplicateTransaction, InvalidRequest, Unavailable, aio
from dedup.batches import answers_of
from dedup.channels import call_metadata
from dedup.coalescing import _Again, _matched
from dedup.gathering import CROWD, GatheredCall
from dedup.v1 import dedup_pb2
from tests.support.cluster import ClusterDeployment
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually
from tests.support.processes import ServiceProcess

# A batch may take a quarter of the attempt timeout.
PATIENT = {"timeout": 120, "attempt_timeout": 60}


class Stub:
    """Counts the claims of a client by the way they travel, passes them on, and can fail batches."""

    def __init__(self, stub: Any, *, blocking: bool) -> None:
        self.alone: list[str] = []
        self.batches: list[list[str]] = []
        self.timeouts: list[float] = []
        self.tokens: dict[str, list[str]] = {}
        self.failure: grpc.StatusCode | None = None
        self._stub = stub
        self._blocking = blocking
        self.BatchClaimTransactions: Any = _Future(self._batch) if blocking else self._batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stub, name)

    def ClaimTransaction(self, request: Any, **options: Any) -> Any:  # noqa: N802 - The name of the rpc.
        self.alone.append(request.transaction_id)
        self._note(request)
        return self._stub.ClaimTransaction(request, **options)

    def _batch(self, request: Any, timeout: float) -> Any:
        self.batches.append([one.transaction_id for one in request.requests])
        self.timeouts.append(timeout)
        for one in request.requests:
            self._note(one)
        if self.failure is not None:
            return _Failed(grpc.aio.AioRpcError(self.failure, grpc.aio.Metadata(), grpc.aio.Metadata(), "scripted"))
        call = self._stub.BatchClaimTransactions
        return call.future(request, timeout=timeout) if self._blocking else call(request, timeout=timeout)

    def _note(self, request: Any) -> None:
        self.tokens.setdefault(request.transaction_id, []).append(request.claim_token)


class _Future:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.future = call


class _Failed:
    """A call that has failed: to be awaited, or with a callback."""

    def __init__(self, failure: Exception) -> None:
        self._failure = failure

    def __await__(self) -> Iterator[None]:
        yield from ()
        raise self._failure

    def result(self) -> None:
        raise self._failure

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        callback(self)


class Clients:
    """A client of one kind, with the interface of the asynchronous one, and its stub."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._pool = ThreadPoolExecutor(100)
        self._open: list[Any] = []

    async def client(self, target: str, **options: Any) -> Any:
        """Return a connected client."""
        client: Any = (aio.Client if self.kind == "aio" else Client)(target, **({"coalesce": True} | PATIENT | options))
        self._open.append(client)
        if self.kind == "aio":
            client._transport._open()
        return client

    def watch(self, client: Any) -> Stub:
        """Return the counter of a client's calls."""
        transport = client._transport
        stub = transport._stub = Stub(transport._stub, blocking=self.kind == "sync")
        transport._coalescer._stub = stub
        return stub

    def claim(self, client: Any, *arguments: Any, **options: Any) -> "asyncio.Future[Any]":
        """Start a claim."""
        if self.kind == "aio":
            return asyncio.ensure_future(
                cast("Coroutine[Any, Any, Any]", client.claim(*arguments, **options)._claiming)
            )
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, lambda: client.claim(*arguments, **options))

    def crowd(self, client: Any) -> tuple[Callable[[], None], Callable[[], int]]:
        """Hold claims back, however long, until the first function is called. The second returns how many wait."""
        coalescer = client._transport._coalescer
        gathering = coalescer._gathering
        coalescer._delay_s = 3_600
        gathering._in_flight += CROWD
        call: GatheredCall[Any] = GatheredCall([None] * CROWD, gathering._round, -1)
        return lambda: coalescer._end(call), lambda: len(gathering.waiting)

    async def together(self, client: Any, *ids: str) -> list[Any]:
        """Claim all ids in one batch, and return the claims and errors."""
        return await asyncio.gather(*await self.started(client, *ids), return_exceptions=True)

    async def started(self, client: Any, *ids: str) -> "list[asyncio.Future[Any]]":
        """Start the claims of all ids in one batch."""
        leave, waiting = self.crowd(client)
        claims = [self.claim(client, name) for name in ids]
        await waits(waiting, len(ids))
        leave()
        return claims

    async def close(self) -> None:
        """Close the clients."""
        for client in self._open:
            closed = client.close()
            if closed is not None:
                await closed
        self._pool.shutdown()


async def waits(waiting: Callable[[], int], expected: int) -> None:
    """Wait until as many claims wait."""

    async def all_wait() -> bool:
        return waiting() == expected

    await eventually(all_wait)


@pytest.fixture(params=["aio", "sync"])
async def clients(request: pytest.FixtureRequest) -> Any:
    """Clients of each kind."""
    clients = Clients(request.param)
    yield clients
    await clients.close()


async def test_claims_that_find_a_crowd_share_a_call_and_nothing_else(
    clients: Clients, target: str, unique: str
) -> None:
    """Each has its own token and answer: claimed, duplicate, or invalid."""
    client = await clients.client(target)
    stub = clients.watch(client)
    await clients.claim(client, unique)
    *claims, duplicate, invalid = await clients.together(client, "a" + unique, "b" + unique, unique, "")
    assert len({claim.claim_token for claim in claims}) == 2
    assert isinstance(duplicate, DuplicateTransaction)
    assert isinstance(invalid, InvalidRequest)
    assert stub.alone == [unique]
    assert sorted(stub.batches[0]) == sorted(["a" + unique, "b" + unique, unique, ""])
    assert stub.timeouts == [15]
    for claim in claims:
        done = claim.complete() if clients.kind == "aio" else asyncio.to_thread(claim.complete)
        assert (await done).completed


async def test_one_of_many_callers_gets_the_claim(clients: Clients, target: str, unique: str) -> None:
    """Of 64 concurrent callers of one id, 63 are duplicates. Callers of their own ids are granted them."""
    client = await clients.client(target)
    answers = await asyncio.gather(*(clients.claim(client, unique) for _ in range(64)), return_exceptions=True)
    assert sum(isinstance(answer, DuplicateTransaction) for answer in answers) == 63
    await asyncio.gather(*(clients.claim(client, f"{unique}-{number}") for number in range(64)))


async def test_claims_that_cannot_share_travel_alone(clients: Clients, target: str, unique: str) -> None:
    """They wait, have metadata or a near deadline, are traced or too large. Unsampled traces do not matter."""
    client = await clients.client(target)
    stub = clients.watch(client)
    leave, waiting = clients.crowd(client)
    await clients.claim(client, unique + "a", wait=0.001)
    await clients.claim(client, unique + "b", timeout=14)
    with pytest.raises(InvalidRequest):
        await clients.claim(client, "x" * 2_000)

    def inside(block: Any, name: str) -> Any:
        async def call() -> object:
            with block:
                return await client.claim(name)

        def call_blocking() -> object:
            with block:
                return client.claim(name)

        return call() if clients.kind == "aio" else asyncio.to_thread(call_blocking)

    await inside(call_metadata(("x-correlation-id", "click-4711")), unique + "c")
    await inside(TracerProvider().get_tracer("test").start_as_current_span("caller"), unique + "d")
    assert len(stub.alone) == 5
    unsampled = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test").start_as_current_span("caller")
    last = asyncio.ensure_future(inside(unsampled, unique + "e"))
    await waits(waiting, 1)
    leave()
    await last


async def test_coalescing_can_be_switched_off(clients: Clients, target: str) -> None:
    """A client then has no coalescer."""
    assert (await clients.client(target, coalesce=False))._transport._coalescer is None


async def test_only_the_asynchronous_client_coalesces_by_default(target: str) -> None:
    """Threads that wait for each other are not always faster."""
    async with aio.Client(target) as waiting:
        await waiting.get("nothing")
        assert cast("Any", waiting._transport)._coalescer is not None
    with Client(target) as blocking:
        assert cast("Any", blocking._transport)._coalescer is None


@pytest.fixture
async def proxy(target: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the service."""
    async with FaultProxy(int(target.rpartition(":")[2])) as proxy:
        yield proxy


async def test_the_lost_reply_of_a_batch_is_retried_claim_by_claim(
    clients: Clients, target: str, proxy: FaultProxy, unique: str
) -> None:
    """Every claim of the batch is made. Each retry has its token, receives CLAIMED as a replay, and travels alone."""
    client = await clients.client(proxy.url.removeprefix("redis://").removesuffix("/0"))
    stub = clients.watch(client)
    async with aio.Client(target) as direct:
        await direct.claim(unique)
        await clients.claim(client, unique + "-connect")
        proxy.hold_replies.clear()
        ids = [f"{unique}-{number}" for number in range(3)]
        claims = await clients.started(client, *ids, unique)
        for name in ids:
            await eventually(lambda name=name: direct.get(name))  # type: ignore[misc]
        # A gathered retry would wait.
        leave, _ = clients.crowd(client)
        proxy.drop_connections()
        proxy.hold_replies.set()
        answers: list[Any] = await asyncio.gather(*claims, return_exceptions=True)
        *granted, duplicate = answers
        assert [claim.replayed for claim in granted] == [True] * 3
        assert isinstance(duplicate, DuplicateTransaction)
        for name in ids:
            with pytest.raises(DuplicateTransaction):
                await direct.claim(name)
    leave()
    assert len(stub.batches) == 1
    assert all(len(set(tokens)) == 1 for tokens in stub.tokens.values())


async def test_one_slow_entry_does_not_hold_the_others(clients: Clients, tmp_path: Path, unique: str) -> None:
    """One node of a cluster stalls. Claims on the others are answered, also those in a batch with one of its ids."""
    cluster = ClusterDeployment(tmp_path / "nodes", "--cluster-require-full-coverage", "no", replicas=False)
    (tmp_path / "nodes").mkdir()
    service = None
    try:
        cluster.start()
        service = ServiceProcess("--store-url", cluster.url, "--store-timeout", "60s").start()
        stalled = cluster.masters[0]

        def is_there(name: str) -> bool:
            return key_slot(f"dedup:default:{name}".encode()) < 16_384 // 3

        names = [f"{unique}-{number}" for number in range(100)]
        slow, good = next(filter(is_there, names)), next(name for name in names if not is_there(name))
        client = await clients.client(service.target, timeout=120, attempt_timeout=8)
        stub = clients.watch(client)
        await clients.claim(client, good + "-connect")
        stalled.pause()
        slow_claim, good_claim = await clients.started(client, slow, good)
        await good_claim
        assert not slow_claim.done()
        assert len(stub.batches) == 1
        # Nor does it hold later claims.
        later = next(name for name in names if not is_there(name) and name != good)
        await clients.claim(client, later)
        assert len(stub.batches) == 1
        stalled.resume()
        await slow_claim
    finally:
        if service is not None:
            service.kill()
        cluster.stop()


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "INTERNAL"])
async def test_a_refused_batch_is_sent_claim_by_claim(clients: Clients, target: str, unique: str, code: str) -> None:
    """Its claims are answered in the same attempt. Claims travel alone for a while."""
    client = await clients.client(target)
    stub = clients.watch(client)
    stub.failure = grpc.StatusCode[code]
    await asyncio.gather(*await clients.started(client, unique + "a", unique + "b"))
    clients.crowd(client)
    await clients.claim(client, unique + "c")
    assert sorted(stub.alone) == [unique + "a", unique + "b", unique + "c"]
    assert len(stub.batches) == 1


async def test_a_batch_without_connection_is_retried(clients: Clients, target: str, unique: str) -> None:
    """It is not sent claim by claim at once, and later claims share calls again."""
    client = await clients.client(target)
    stub = clients.watch(client)
    stub.failure = grpc.StatusCode.UNAVAILABLE
    await asyncio.gather(*await clients.started(client, unique + "a", unique + "b"))
    stub.failure = None
    await asyncio.gather(*await clients.started(client, unique + "c", unique + "d"))
    assert (len(stub.alone), len(stub.batches)) == (2, 2)


async def test_doubt_about_a_batch_stays(clients: Clients, target: str) -> None:
    """The batch may have made the claim that is refused later."""
    client = await clients.client(target)
    clients.watch(client).failure = grpc.StatusCode.INTERNAL
    for failure in await clients.together(client, "", ""):
        assert isinstance(failure, InvalidRequest)
        assert failure.applied == "unknown"


async def test_failures_are_not_shared(clients: Clients) -> None:
    """Every caller gets its own exception."""
    client = await clients.client("127.0.0.1:1", timeout=0.5, attempt_timeout=0.4)
    first, second = await clients.together(client, "a", "b")
    assert isinstance(first, Unavailable)
    assert isinstance(second, Unavailable)
    assert first is not second


async def test_closing_ends_the_claims_of_a_batch(
    clients: Clients, target: str, proxy: FaultProxy, unique: str
) -> None:
    """They fail as ClientClosed, in doubt, and are not retried."""
    client = await clients.client(proxy.url.removeprefix("redis://").removesuffix("/0"))
    stub = clients.watch(client)
    await clients.claim(client, unique)
    proxy.hold_replies.clear()
    claims = await clients.started(client, unique + "a", unique + "b")
    async with aio.Client(target) as direct:
        await eventually(lambda: direct.get(unique + "a"))
        closed = client._transport.close()
        if closed is not None:
            await closed
        failures = await asyncio.gather(*claims, return_exceptions=True)
        assert [type(failure) for failure in failures] == [ClientClosed] * 2
        assert len(stub.batches) == 1
        proxy.hold_replies.set()


async def test_a_closed_client_fails_at_once(clients: Clients) -> None:
    """It does not wait for the end of the budget."""
    client = await clients.client("127.0.0.1:1")
    closed = client.close()
    if closed is not None:
        await closed
    with pytest.raises(ClientClosed):
        await clients.claim(client, "x")


@pytest.fixture
async def waiting(target: str) -> Any:
    """An asynchronous client."""
    async with aio.Client(target, timeout=120, attempt_timeout=60) as client:
        client._transport._open()  # type: ignore[attr-defined]
        yield client


async def test_a_cancelled_claim_does_not_cancel_the_others_of_its_batch(
    waiting: Any, proxy: FaultProxy, unique: str
) -> None:
    """It is released. The others are answered."""
    clients = Clients("aio")
    client = await clients.client(proxy.url.removeprefix("redis://").removesuffix("/0"))
    stays, leaves = unique + "-stays", unique + "-leaves"
    await clients.claim(client, unique)
    proxy.hold_replies.clear()
    staying, leaving = await clients.started(client, stays, leaves)
    await eventually(lambda: waiting.get(leaves))
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    proxy.hold_replies.set()
    assert (await staying).transaction_id == stays

    async def free() -> bool:
        return await waiting.get(leaves) is None

    await eventually(free)
    await clients.close()


async def test_a_batch_is_cancelled_once_all_its_claims_are(waiting: Any, proxy: FaultProxy, unique: str) -> None:
    """The service need not answer it any more."""
    clients = Clients("aio")
    client = await clients.client(proxy.url.removeprefix("redis://").removesuffix("/0"))
    await clients.claim(client, unique)
    proxy.hold_replies.clear()
    claims = await clients.started(client, unique + "a", unique + "b")
    tasks = set(client._transport._coalescer._tasks)
    await eventually(lambda: waiting.get(unique + "a"))
    for claim in claims:
        claim.cancel()
    await asyncio.wait(claims)
    await asyncio.wait(tasks)
    assert [task.cancelled() for task in tasks] == [True]
    proxy.hold_replies.set()
    await clients.close()


async def test_a_claim_cancelled_before_its_batch_is_not_sent(waiting: Any, unique: str) -> None:
    """The others leave without it."""
    clients = Clients("aio")
    stub = clients.watch(waiting)
    leave, count = clients.crowd(waiting)
    names = [unique + name for name in "abc"]
    claims = [clients.claim(waiting, name) for name in names]
    await waits(count, 3)
    claims[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await claims[0]
    leave()
    await asyncio.gather(*claims[1:])
    assert stub.batches == [names[1:]]
    assert not stub.alone
    assert not waiting._background


async def test_callers_answered_together_leave_together_again(waiting: Any, unique: str) -> None:
    """Claims of one turn of the event loop do not wait for each other's calls."""
    clients = Clients("aio")
    stub = clients.watch(waiting)
    await clients.together(waiting, *(f"{unique}-{number}" for number in range(20)))
    await asyncio.gather(*(clients.claim(waiting, f"{unique}-again-{number}") for number in range(20)))
    assert [len(batch) for batch in stub.batches] == [20, 20]


async def test_no_batch_is_larger_than_the_limit(waiting: Any, unique: str) -> None:
    """A full batch leaves at once, also while others are in flight."""
    clients = Clients("aio")
    stub = clients.watch(waiting)
    leave, count = clients.crowd(waiting)
    claims = [clients.claim(waiting, f"{unique}-{number}") for number in range(250)]
    await waits(count, 50)
    leave()
    await asyncio.gather(*claims)
    assert [len(batch) for batch in stub.batches] == [100, 100, 50]


def test_an_interrupted_thread_does_not_strand_the_others(target: str, unique: str) -> None:
    """The claims that waited with it leave."""
    with Client(target, timeout=120, attempt_timeout=60, coalesce=True) as client, ThreadPoolExecutor(1) as pool:
        coalescer: Any = cast("Any", client._transport)._coalescer
        clients = Clients("sync")
        _, waiting = clients.crowd(client)
        others: list[Any] = []

        def interrupted(_entry: Any, *, leads: bool) -> None:
            assert leads
            del coalescer._answer
            others.append(pool.submit(client.claim, unique + "-other"))
            asyncio.run(waits(waiting, 2))
            raise KeyboardInterrupt

        coalescer._answer = interrupted
        with pytest.raises(KeyboardInterrupt):
            client.claim(unique)
        assert others[0].result().transaction_id == unique + "-other"


def test_claims_whose_answers_cannot_be_matched_are_sent_alone() -> None:
    """The service may have made them."""
    reply = dedup_pb2.BatchClaimTransactionsResponse(entries=[dedup_pb2.BatchClaimEntry()])
    answers = _matched(reply, 2)
    assert [isinstance(answer, _Again) and answer.failure.applied for answer in answers] == ["unknown"] * 2


@pytest.mark.parametrize("entries", [0, 1, 3])
def test_answers_that_cannot_be_matched_fail_every_claim(entries: int) -> None:
    """A reply of another length or with an empty entry is never a claim."""
    reply = dedup_pb2.BatchClaimTransactionsResponse(entries=[dedup_pb2.BatchClaimEntry()] * entries)
    assert all(isinstance(answer, CallFailed) for answer in answers_of(reply, 2))
    assert isinstance(
        answers_of(dedup_pb2.BatchClaimTransactionsResponse(entries=reply.entries), entries or 1)[0], CallFailed
    )

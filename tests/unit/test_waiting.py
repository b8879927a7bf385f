"""Waiting duplicates: what wakes them, and that one bounded poller serves them all."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextvars import ContextVar

import pytest

from dedup_service.claims import (
    Applied,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    Expiry,
    FieldViolation,
    HolderRequest,
    InvalidRequest,
    Policies,
    Policy,
    Reason,
    RequestedExpiry,
    StoreRefused,
    StoreUnavailable,
    TooManyWaits,
    Transaction,
    TransactionState,
    system_clock_ms,
    waiting,
)
from dedup_service.claims.waiting import Waiters
from tests.support.dict_store import DictStore
from tests.support.polling import eventually

TOKEN = "a-token-of-twenty-21"
LONG_S = 30.0


class CountingStore(DictStore):
    """Counts the reads of each transaction id, and notes how many run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.context_values: set[str] = set()

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Count, and read."""
        self.reads[transaction_id] += 1
        self.context_values.add(CALL.get())
        return await super().get(namespace, transaction_id)


CALL = ContextVar("CALL", default="none")


@pytest.fixture(autouse=True)
def _polls_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_S", 0.001)


@pytest.fixture
def store() -> CountingStore:
    """The store of the waiters."""
    return CountingStore()


@pytest.fixture
async def waiters(store: CountingStore) -> AsyncIterator[Waiters]:
    """Waiters that are closed at the end."""
    waiters = Waiters(store, limit=100)
    yield waiters
    await waiters.close()


def hold(store: DictStore, name: str = "x", state: TransactionState = TransactionState.IN_PROGRESS) -> None:
    """Store a transaction."""
    store.held["default", name] = Transaction("default", name, TOKEN, "me", 1, 2, state)


def wait(waiters: Waiters, name: str = "x", timeout_s: float = LONG_S) -> asyncio.Task[None]:
    """Start to wait for a transaction."""
    return asyncio.create_task(waiters.wait("default", name, timeout_s))


async def until_read(store: CountingStore, name: str = "x", times: int = 2) -> None:
    """Return when a transaction has been read this often."""
    until = store.reads[name] + times

    async def read() -> bool:
        return store.reads[name] >= until

    await eventually(read, LONG_S, "a poll")


async def finished(*tasks: asyncio.Task[None]) -> None:
    """Await the tasks, far sooner than their timeout."""
    async with asyncio.timeout(LONG_S / 3):
        await asyncio.gather(*tasks)


async def test_wake_ends_every_wait_for_that_transaction_alone(
    monkeypatch: pytest.MonkeyPatch, store: CountingStore, waiters: Waiters
) -> None:
    """A change by this process wakes all its waiters at once, without a poll."""
    monkeypatch.setattr(waiting, "POLL_S", LONG_S)
    first, second, other = wait(waiters), wait(waiters), wait(waiters, "other")
    await asyncio.sleep(0)
    waiters.wake("default", "x")
    waiters.wake("default", "x")
    await finished(first, second)
    assert not other.done()
    assert not store.reads
    await waiters.close()
    await other


@pytest.mark.parametrize("state", [None, TransactionState.COMPLETED])
async def test_the_poller_finds_the_changes_of_other_processes(
    store: CountingStore, waiters: Waiters, state: TransactionState | None
) -> None:
    """A waiter sleeps while the work is in progress, and wakes when it is completed or gone."""
    hold(store)
    task = wait(waiters)
    await until_read(store)
    assert not task.done()
    if state is None:
        store.held.clear()
    else:
        hold(store, state=state)
    await finished(task)


async def test_a_wait_ends_after_its_timeout(store: CountingStore, waiters: Waiters) -> None:
    """A waiter returns after its timeout although the work is still in progress."""
    hold(store)
    begun = time.monotonic()
    await waiters.wait("default", "x", 0.05)
    assert 0.04 <= time.monotonic() - begun < LONG_S / 3


async def test_close_wakes_everybody_and_nobody_waits_again(store: CountingStore, waiters: Waiters) -> None:
    """The shutdown ends all waits at once, and later ones do not begin."""
    hold(store)
    tasks = [wait(waiters), wait(waiters, "other")]
    await asyncio.sleep(0)
    await waiters.close()
    await finished(*tasks)
    assert waiters.closed
    await finished(wait(waiters))


async def test_the_poller_ends_with_the_last_waiter_and_starts_again(store: CountingStore, waiters: Waiters) -> None:
    """Without waiters nothing is read, and a later waiter is served as the first was."""
    for _ in range(2):
        hold(store)
        task = wait(waiters)
        await until_read(store)
        store.held.clear()
        await finished(task)
        await asyncio.sleep(0.01)
        reads = store.reads.total()
        await asyncio.sleep(0.01)
        assert store.reads.total() == reads
        assert waiters._poller is None


async def test_a_cancelled_wait_leaves_nothing_behind(store: CountingStore, waiters: Waiters) -> None:
    """A caller that goes away is no longer polled for, and others who wait for the transaction still are."""
    hold(store)
    leaving, staying = wait(waiters), wait(waiters)
    await until_read(store)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    store.held.clear()
    await finished(staying)
    assert not waiters._waiters


async def test_every_transaction_gets_its_turn_beyond_the_limit_of_one_poll(
    monkeypatch: pytest.MonkeyPatch, store: CountingStore, waiters: Waiters
) -> None:
    """One poll reads at most POLL_AT_MOST transactions, and the next one continues with the others.

    Protection: a polled transaction goes to the end of the queue.
    """
    monkeypatch.setattr(waiting, "POLL_AT_MOST", 2)
    monkeypatch.setattr(waiting, "POLL_S", LONG_S)
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        hold(store, name)
    tasks = [wait(waiters, name) for name in names]
    await asyncio.sleep(0)
    seen: list[list[str]] = []
    for _ in range(3):
        store.reads.clear()
        await waiters._poll_once()
        seen.append(sorted(store.reads))
    assert seen == [["a", "b"], ["c", "d"], ["a", "e"]]
    await waiters.close()
    await finished(*tasks)


@pytest.mark.parametrize(
    "failure", [StoreUnavailable(Reason.STORE_UNREACHABLE, "down", Applied.NO), StoreRefused("no such master")]
)
async def test_nobody_wakes_while_the_store_is_unavailable(
    store: CountingStore, waiters: Waiters, failure: Exception
) -> None:
    """An outage is no news about the work; when the store is back, the poller finds what happened."""
    hold(store)
    task = wait(waiters)
    store.failure = failure
    await until_read(store, times=5)
    assert not task.done()
    store.failure = None
    store.held.clear()
    await finished(task)


async def test_a_bug_of_the_store_wakes_the_waiter(store: CountingStore, waiters: Waiters) -> None:
    """An unexpected exception of `get` ends that wait, whose next claim reports it, and the poller goes on.

    Protection: `_may_have_ended` catches every exception.
    """
    hold(store)
    hold(store, "other")
    other = wait(waiters, "other")
    store.failure = ZeroDivisionError("a bug")
    await finished(wait(waiters))
    await finished(other)
    store.failure = None
    task = wait(waiters)
    await until_read(store)
    store.held.clear()
    await finished(task)


async def test_the_poller_does_not_inherit_the_context_of_a_caller(store: CountingStore, waiters: Waiters) -> None:
    """Spans of reads for everybody must not appear below the span of the call that waited first.

    Protection: the poller starts in an empty context.
    """
    hold(store)
    token = CALL.set("the first caller")
    task = wait(waiters)
    await until_read(store)
    CALL.reset(token)
    store.held.clear()
    await finished(task)
    assert store.context_values == {"none"}


async def test_a_waiting_claim_is_answered_when_the_work_ends(
    monkeypatch: pytest.MonkeyPatch, store: CountingStore
) -> None:
    """A waiting duplicate receives the result of a completion, and CLAIMED after a release, without a poll.

    Protection: `complete` and `release` wake the waiters.
    """
    monkeypatch.setattr(waiting, "POLL_S", LONG_S)
    claims = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)))

    async def somebody_waits() -> bool:
        return bool(claims._waiters._waiters)

    for end, outcome, result in (
        (claims.complete, ClaimOutcome.DUPLICATE, b"paid"),
        (claims.release, ClaimOutcome.CLAIMED, b""),
    ):
        store.held.clear()
        await claims.claim(ClaimRequest("x", claim_token=TOKEN))
        waiter = asyncio.create_task(claims.claim(ClaimRequest("x", wait_ms=30_000)))
        await eventually(somebody_waits)
        await end(HolderRequest("x", claim_token=TOKEN, result=result))
        async with asyncio.timeout(LONG_S / 3):
            answer = await waiter
        assert (answer.outcome, answer.transaction.result) == (outcome, result)
    await claims.close()


async def test_a_claim_after_a_wait_counts_its_time_anew(store: CountingStore) -> None:
    """A claim that waited has the lease of the moment it was taken, not of its arrival."""
    now_ms = 1_000_000
    claims = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)), clock_ms=lambda: now_ms)
    await claims.claim(ClaimRequest("x", claim_token=TOKEN))
    waiter = asyncio.create_task(claims.claim(ClaimRequest("x", wait_ms=30_000)))
    await until_read(store)
    now_ms += 5_000
    await claims.release(HolderRequest("x", claim_token=TOKEN))
    answer = await waiter
    assert (answer.transaction.claim_time_ms, answer.transaction.expire_time_ms) == (now_ms, now_ms + 60_000)
    assert store.expiries[-1] == Expiry(now_ms + 60_000, 60_000)
    await claims.close()


async def test_closing_answers_a_waiting_claim(store: CountingStore) -> None:
    """At the shutdown a waiting duplicate is answered with the state of the work."""
    claims = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)))
    await claims.claim(ClaimRequest("x", claim_token=TOKEN))
    waiter = asyncio.create_task(claims.claim(ClaimRequest("x", wait_ms=30_000)))
    await until_read(store)
    await claims.close()
    async with asyncio.timeout(LONG_S / 3):
        answer = await waiter
    assert (answer.outcome, answer.transaction.state) == (ClaimOutcome.DUPLICATE, TransactionState.IN_PROGRESS)


async def test_waits_beyond_the_limit_are_refused(store: CountingStore) -> None:
    """A claim that would wait is refused beyond the limit; one that need not wait is answered, and places are reused.

    Protection: `admitted` counts from the first wait to the answer.
    """
    claims = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)), max_waits=1)
    await claims.claim(ClaimRequest("x", claim_token=TOKEN))
    for _ in range(2):
        waiter = asyncio.create_task(claims.claim(ClaimRequest("x", wait_ms=30_000)))
        await until_read(store)
        assert claims.waiting == 1
        with pytest.raises(TooManyWaits, match="1 claims are waiting"):
            await claims.claim(ClaimRequest("x", wait_ms=30_000))
        assert (await claims.claim(ClaimRequest("x"))).outcome is ClaimOutcome.DUPLICATE
        store.held.pop(("default", "y"), None)
        assert (await claims.claim(ClaimRequest("y", wait_ms=30_000))).outcome is ClaimOutcome.CLAIMED
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert claims.waiting == 0
    await claims.close()


@pytest.mark.parametrize("held", [True, False])
async def test_an_expire_time_that_passed_by_the_clock_of_the_store(store: CountingStore, held: bool) -> None:  # noqa: FBT001
    """If the store refuses the claim at the end of a wait, a holder makes it a duplicate; without one it is refused.

    Protection: a claim refused after a wait is followed by a look-up.
    """
    claims = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)))
    await claims.claim(ClaimRequest("x", claim_token=TOKEN))
    at_time = RequestedExpiry(time_ms=system_clock_ms() + 50_000)
    waiter = asyncio.create_task(claims.claim(ClaimRequest("x", expiry=at_time, wait_ms=30_000)))
    await until_read(store)
    store.faults["x"] = InvalidRequest(FieldViolation("expire_time", "is in the past by the clock of the store"))
    if held:
        await claims.close()
        assert (await waiter).outcome is ClaimOutcome.DUPLICATE
    else:
        await claims.release(HolderRequest("x", claim_token=TOKEN))
        with pytest.raises(InvalidRequest, match="passed while the claim waited"):
            await waiter
        await claims.close()


async def test_a_wait_over_the_dict_store_ends_at_the_expire_time(store: CountingStore) -> None:
    """As in the contract suite of the stores."""
    claims = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)))
    await claims.claim(ClaimRequest("x", claim_token=TOKEN))
    at_time = RequestedExpiry(time_ms=system_clock_ms() + 100)
    async with asyncio.timeout(LONG_S):
        answer = await claims.claim(ClaimRequest("x", expiry=at_time, wait_ms=200_000))
    assert answer.outcome is ClaimOutcome.DUPLICATE
    await claims.close()

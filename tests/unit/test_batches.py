"""Batches in flight: slices in turns, a bound on what runs and waits, refusals near the deadline, and cancellation."""

import asyncio
from collections.abc import Sequence

import pytest

from dedup_service.claims import Applied, ClaimAnswer, ClaimRequest, ClaimService, Policies, Policy, StoreUnavailable
from dedup_service.claims import batches as batches_module
from dedup_service.claims.batches import SLICE, SLICES_AT_A_TIME, Batches
from tests.support.dict_store import DictStore
from tests.support.polling import eventually

Item = tuple[str, int]

LARGE = 2 * SLICE * SLICES_AT_A_TIME


def batch(name: str, size: int) -> list[Item]:
    """Return the items of a batch."""
    return [(name, number) for number in range(size)]


class Work:
    """Notes the slices that begin, and ends each one when the test says so."""

    def __init__(self) -> None:
        self.begun: list[Item] = []
        self.running = 0
        self._gate = asyncio.Semaphore(0)

    async def __call__(self, items: Sequence[Item]) -> list[Item]:
        """Return the items once this slice may end."""
        self.begun.append(items[0])
        self.running += 1
        try:
            await self._gate.acquire()
        finally:
            self.running -= 1
        return list(items)

    def end(self, slices: int) -> None:
        """Let this many slices end."""
        for _ in range(slices):
            self._gate.release()

    async def have_begun(self, slices: int) -> None:
        """Return when this many slices in all have begun, and no other begins."""

        async def reached() -> bool:
            return len(self.begun) >= slices

        await eventually(reached, what=f"{slices} slices")
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(self.begun) == slices


@pytest.fixture
def work() -> Work:
    """The work on slices."""
    return Work()


@pytest.mark.parametrize("size", [0, 1, SLICE, SLICE + 1, LARGE - 1])
async def test_every_item_has_its_answer_in_order(work: Work, size: int) -> None:
    """The answers are those of the items, in order, whatever the size of the batch."""
    work.end(LARGE)
    assert await Batches().carry_out(batch("a", size), work) == batch("a", size)


async def test_slices_are_bounded_and_take_turns(work: Work) -> None:
    """A few slices run at a time, and a batch behind a large one begins before the large one ends.

    Protection: the semaphore around slices, which batches ask for one at a time.
    """
    batches = Batches()
    large = asyncio.create_task(batches.carry_out(batch("large", LARGE), work))
    await work.have_begun(SLICES_AT_A_TIME)
    small = asyncio.create_task(batches.carry_out(batch("small", SLICE), work))
    await asyncio.sleep(0)
    work.end(2)
    await work.have_begun(SLICES_AT_A_TIME + 2)
    assert work.begun[-2:] == [("large", SLICES_AT_A_TIME * SLICE), ("small", 0)]
    assert work.running == SLICES_AT_A_TIME
    work.end(LARGE)
    assert (await large, await small) == (batch("large", LARGE), batch("small", SLICE))


async def test_slices_that_cannot_begin_in_time_are_refused(work: Work) -> None:
    """At the end of its wait a batch refuses what has not begun, certainly not applied, and keeps its other answers.

    Protection: the timeout around the wait for slices.
    """
    batches = Batches()
    size = SLICE * SLICES_AT_A_TIME + SLICE // 2
    hurried = asyncio.create_task(batches.carry_out(batch("a", size), work, wait_s=0.01))
    await work.have_begun(SLICES_AT_A_TIME)
    # Timers fire in order, however late.
    await asyncio.sleep(0.02)
    work.end(LARGE)
    answers = await hurried
    assert answers[: SLICE * SLICES_AT_A_TIME] == batch("a", SLICE * SLICES_AT_A_TIME)
    refused = answers[SLICE * SLICES_AT_A_TIME :]
    assert len(refused) == SLICE // 2
    for error in refused:
        assert isinstance(error, StoreUnavailable)
        assert (error.reason, error.applied) == ("STORE_QUEUE_FULL", Applied.NO)
    assert await batches.carry_out(batch("b", 1), work) == batch("b", 1)


async def test_a_batch_beyond_the_limit_of_waiting_items_is_refused(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is refused at once, certainly not applied, while too many items wait; there is room again afterwards.

    Protection: the limit of waiting items, which bounds the memory.
    """
    monkeypatch.setattr(batches_module, "MAX_WAITING", LARGE)
    batches = Batches()
    waiting = asyncio.create_task(batches.carry_out(batch("a", LARGE), work))
    await work.have_begun(SLICES_AT_A_TIME)
    with pytest.raises(StoreUnavailable) as caught:
        await batches.carry_out(batch("b", 1), work)
    assert (caught.value.reason, caught.value.applied) == ("STORE_QUEUE_FULL", Applied.NO)
    work.end(2 * LARGE)
    await waiting
    assert await batches.carry_out(batch("b", LARGE), work) == batch("b", LARGE)


async def test_a_cancelled_batch_begins_nothing_more(work: Work) -> None:
    """A cancelled batch ends its running slices, never begins the others, and leaves the way free for other batches.

    Protection: the slices belong to the call that waits for them.
    """
    batches = Batches()
    cancelled = asyncio.create_task(batches.carry_out(batch("a", LARGE), work))
    await work.have_begun(SLICES_AT_A_TIME)
    behind = asyncio.create_task(batches.carry_out(batch("b", LARGE), work))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    assert cancelled.cancelled()
    work.end(2 * LARGE)
    assert await behind == batch("b", LARGE)
    assert len(work.begun) == SLICES_AT_A_TIME + LARGE // SLICE


async def test_a_batch_keeps_the_policies_it_began_with() -> None:
    """A reload while a batch waits changes none of its claims."""
    strict, lenient = (Policies(Policy(60_000, 60_000, 60_000, shadow=shadow)) for shadow in (False, True))
    store = DictStore()
    service = ClaimService(store, strict)
    size = SLICE * (SLICES_AT_A_TIME + 1)
    requests = [ClaimRequest(str(number)) for number in range(size)]
    assert len(await service.claim_all(requests)) == size
    reached = asyncio.Event()
    proceed = asyncio.Event()

    async def stall() -> None:
        reached.set()
        await proceed.wait()

    store.before_answer = stall
    again = asyncio.create_task(service.claim_all(requests))
    await reached.wait()
    service.policies = lenient
    proceed.set()
    answers = await again
    assert not any(isinstance(answer, Exception) or answer.shadow_duplicate for answer in answers)
    assert isinstance(answers[0], ClaimAnswer)

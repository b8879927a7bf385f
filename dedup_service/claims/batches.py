"""Carries out batches in slices, a few at a time, so that no call waits behind thousands of claims."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from dedup_service.claims.errors import Applied, Reason, StoreUnavailable

SLICE = 100

# Together 1,000 claims: enough to keep a distant store busy, too few to delay a single claim.
SLICES_AT_A_TIME = 10

# A waiting claim takes about 1 KiB.
MAX_WAITING = 50_000

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")


class Batches:
    """The batches in flight. They take turns: each waits for one slice at a time, in the order of arrival."""

    def __init__(self) -> None:
        self._slices = asyncio.Semaphore(SLICES_AT_A_TIME)
        self._waiting = 0

    async def carry_out(
        self,
        items: Sequence[ItemT],
        work: Callable[[Sequence[ItemT]], Coroutine[Any, Any, list[AnswerT]]],
        wait_s: float | None = None,
    ) -> list[AnswerT | StoreUnavailable]:
        """Run `work` on each slice of the items and return their answers, in order.

        Items whose slice has not begun after `wait_s` seconds are refused with STORE_QUEUE_FULL. Raises that error if
        too many items already wait. `work` must not raise.
        """
        if self._waiting + len(items) > MAX_WAITING:
            raise _refused(f"{self._waiting} claims of batches already wait for the store")
        slices: list[asyncio.Task[list[AnswerT]]] = []
        refused: list[StoreUnavailable] = []
        async with asyncio.TaskGroup() as group:
            self._waiting += len(items)
            try:
                async with asyncio.timeout(wait_s):
                    for start in range(0, len(items), SLICE):
                        await self._slices.acquire()
                        task = group.create_task(work(items[start : start + SLICE]))
                        task.add_done_callback(lambda _: self._slices.release())
                        slices.append(task)
            except TimeoutError:
                refusal = _refused("the batch waited behind other batches until its deadline was near")
                refused = [refusal] * (len(items) - len(slices) * SLICE)
            finally:
                self._waiting -= len(items)
        return [*(answer for task in slices for answer in task.result()), *refused]


def _refused(message: str) -> StoreUnavailable:
    return StoreUnavailable(
        Reason.STORE_QUEUE_FULL, f"{message}: send fewer batches at a time, or add instances", Applied.NO
    )

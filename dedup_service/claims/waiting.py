"""Wakes waiting duplicates. One bounded poller per process serves every waiter."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context
from itertools import islice

from dedup_service.claims.errors import StoreRefused, StoreUnavailable, TooManyWaits
from dedup_service.claims.store import ClaimStore
from dedup_service.claims.transaction import TransactionState

POLL_S = 0.1
POLL_AT_MOST = 500

Identity = tuple[str, str]


class Waiters:
    """Calls that wait until the work on a transaction may have ended, at most `limit` at a time.

    Changes made by this process wake them at once; other processes and expiry within about POLL_S. While the store is
    unavailable nobody is woken.
    """

    def __init__(self, store: ClaimStore, limit: int) -> None:
        self._store = store
        self._limit = limit
        self.count = 0
        """Calls inside `admitted`."""
        self._waiters: defaultdict[Identity, set[asyncio.Future[None]]] = defaultdict(set)
        self._poller: asyncio.Task[None] | None = None
        self.closed = False
        """Whether waiting has ended for good."""

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a call among the waits, from its first one until it is answered. Raises TooManyWaits."""
        if self.count >= self._limit:
            raise TooManyWaits(f"{self._limit} claims are waiting: claim without wait, or try again later")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    async def wait(self, namespace: str, transaction_id: str, timeout_s: float) -> None:
        """Return when the work may have ended, after `timeout_s` at the latest, and at once after `close`."""
        if self.closed:
            return
        identity = (namespace, transaction_id)
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[identity].add(woken)
        if self._poller is None:
            # It serves every waiter, so it must not inherit the context of the first one.
            self._poller = asyncio.create_task(self._poll(), context=Context())
        try:
            await asyncio.wait((woken,), timeout=timeout_s)
        finally:
            waiters = self._waiters[identity]
            waiters.discard(woken)
            if not waiters:
                del self._waiters[identity]

    def wake(self, namespace: str, transaction_id: str) -> None:
        """Wake every waiter of a transaction."""
        for woken in self._waiters.get((namespace, transaction_id), ()):
            if not woken.done():
                woken.set_result(None)

    async def close(self) -> None:
        """Wake everybody, and let nobody wait any more."""
        self.closed = True
        for identity in list(self._waiters):
            self.wake(*identity)
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    async def _poll(self) -> None:
        try:
            while self._waiters:
                await asyncio.sleep(POLL_S)
                await self._poll_once()
        finally:
            self._poller = None

    async def _poll_once(self) -> None:
        asked = list(islice(self._waiters, POLL_AT_MOST))
        ends = await asyncio.gather(*(self._may_have_ended(*identity) for identity in asked))
        for identity, ended in zip(asked, ends, strict=True):
            if ended:
                self.wake(*identity)
            elif identity in self._waiters:
                # To the end of the queue, so that every transaction gets its turn.
                self._waiters[identity] = self._waiters.pop(identity)

    async def _may_have_ended(self, namespace: str, transaction_id: str) -> bool:
        try:
            holder = await self._store.get(namespace, transaction_id)
        except (StoreUnavailable, StoreRefused):
            # A store that refuses to work may do so for a moment only, such as while no Sentinel knows the master.
            return False
        except Exception:  # noqa: BLE001 - the waiter's own next claim reports the fault, whatever it is
            return True
        return holder is None or holder.state is TransactionState.COMPLETED

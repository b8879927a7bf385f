"""Where duplicates wait for the end of somebody's work: one bounded poller a process, however many wait."""

import asyncio
from collections import defaultdict
from contextvars import Context
from itertools import islice

from dedup_service.claims.errors import StoreUnavailable, UnreadableValue
from dedup_service.claims.store import ClaimStore
from dedup_service.claims.transaction import TransactionState

# How often the store is asked, and for how many transactions at a time.
POLL_S = 0.1
POLL_AT_MOST = 500

Identity = tuple[str, str]


class WaitingRoom:
    """Tells those who wait for a transaction when its work may have ended.

    What this process ends itself is told at once, everything else (other processes, expiry) within about POLL_S. While
    the store is away nobody is told anything.
    """

    def __init__(self, store: ClaimStore) -> None:
        self._store = store
        self._waiters: defaultdict[Identity, set[asyncio.Future[None]]] = defaultdict(set)
        self._poller: asyncio.Task[None] | None = None
        self.closed = False
        """Whether nobody may wait any more."""

    async def ended(self, namespace: str, transaction_id: str, timeout_s: float) -> None:
        """Return when the work may have ended, at the latest after `timeout_s`, and at once when the room is closed."""
        if self.closed:
            return
        identity = (namespace, transaction_id)
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[identity].add(told)
        if self._poller is None:
            # It serves all who wait, and is no part of the call that came first.
            self._poller = asyncio.create_task(self._poll(), context=Context())
        try:
            await asyncio.wait((told,), timeout=timeout_s)
        finally:
            waiters = self._waiters[identity]
            waiters.discard(told)
            if not waiters:
                del self._waiters[identity]

    def tell(self, namespace: str, transaction_id: str) -> None:
        """Wake whoever waits for this transaction."""
        for told in self._waiters.get((namespace, transaction_id), ()):
            if not told.done():
                told.set_result(None)

    async def close(self) -> None:
        """Wake everybody, and let nobody wait any more."""
        self.closed = True
        for identity in list(self._waiters):
            self.tell(*identity)
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    async def _poll(self) -> None:
        try:
            while self._waiters:
                await asyncio.sleep(POLL_S)
                await self._ask_once()
        finally:
            # Also after a fault of ours: the next one who waits starts it anew.
            self._poller = None

    async def _ask_once(self) -> None:
        asked = list(islice(self._waiters, POLL_AT_MOST))
        ends = await asyncio.gather(*(self._may_have_ended(*identity) for identity in asked))
        for identity, ended in zip(asked, ends, strict=True):
            if ended:
                self.tell(*identity)
            elif identity in self._waiters:
                # To the end of the line, so that every transaction has its turn.
                self._waiters[identity] = self._waiters.pop(identity)

    async def _may_have_ended(self, namespace: str, transaction_id: str) -> bool:
        try:
            holder = await self._store.get(namespace, transaction_id)
        except StoreUnavailable:
            return False
        except UnreadableValue:
            # The waiter's own next claim says what is wrong with it.
            return True
        return holder is None or holder.state is TransactionState.COMPLETED

"""The thread between the event loop and a blocking file: it groups whatever is ready into one transaction.

It knows nothing of SQL: the file it drives is handed to it.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dedup_service.claims import Applied, Reason, StoreUnavailable

Answer = bytes | Exception | None

# Bounds how long one transaction keeps the lock from other processes; larger ones are hardly faster.
MAX_BATCH = 256

# How often a lock held by another process is tried again. SQLite's own waiting sleeps up to 100 ms at a time.
_LOCK_POLL_S = 0.001


# What becomes of a key: None leaves it as it is, otherwise its new value and expiry, or that it is forgotten.
Row = tuple[bytes, int]
FORGET: Row = (b"", 0)

# Given the live value of a key and the present in Unix milliseconds: the answer, and what becomes of the key. It runs
# in the thread, and may raise what its own caller should be told.
Step = Callable[[bytes | None, int], tuple[bytes | None, Row | None]]


@dataclass(slots=True, eq=False)
class Operation:
    """One call on its way through the thread: a step on a key, or a check of the file where there is no key.

    `may_change` says whether the step may write, `changed` whether it did.
    """

    future: asyncio.Future[Answer]
    since: float
    key: bytes | None = None
    step: Step | None = None
    may_change: bool = False
    changed: bool = False
    answer: Answer = None


class BatchFile(Protocol):
    """What the thread drives. Only the thread calls it."""

    def begin(self) -> bool:
        """Take the write lock, connecting first where needed, and return False when another process holds it.

        Raises StoreUnavailable (nothing was applied) and StoreRefused.
        """

    def carry_out(self, operations: Sequence[Operation]) -> None:
        """Carry out `operations`, commit, and set the answer of each; it never raises."""

    def upkeep(self) -> bool:
        """Take one short step of what has to be done outside any batch, and return whether to take another at once.

        Called while nobody waits, and never raises.
        """

    def checkpoint(self) -> None:
        """Do what cannot be put off until nobody waits; called after each batch, and never raises."""

    def close(self) -> None:
        """Give the file back; it never raises."""


class BatchThread:
    """Hands operations to a thread in groups, and their answers back in one callback a group.

    Belongs to the event loop that made it. Every operation is answered within about `timeout_s` seconds, whatever the
    file does: one that still waits then is withdrawn and never carried out, one under way has an unknown end.
    """

    def __init__(self, file: BatchFile, subject: str, timeout_s: float, queue_limit: int, idle_s: float) -> None:
        self._file = file
        self._subject = subject
        self._timeout_s = timeout_s
        self._queue_limit = queue_limit
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        # Guards the four below. An operation is in the queue or among the taken, never in both: that is what makes
        # "withdrawn" certain.
        self._changed = threading.Condition(threading.Lock())
        self._queue: list[Operation] = []
        self._taken: list[Operation] = []
        self._locked_out = False
        self._closing = False
        # A daemon, so that a disk that never answers cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="dedup-sqlite", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def submit(
        self, key: bytes | None = None, step: Step | None = None, *, may_change: bool = False
    ) -> bytes | None:
        """Return the answer to one operation.

        Raises whatever the file answered, and StoreUnavailable when the queue is full, at the time-out and when closed.
        """
        loop = self._loop
        operation = Operation(loop.create_future(), loop.time(), key, step, may_change)
        with self._changed:
            if self._closing:
                raise StoreUnavailable(Reason.STORE_CLOSED, f"{self._subject} is closed", Applied.NO)
            if len(self._queue) >= self._queue_limit:
                raise StoreUnavailable(
                    Reason.STORE_QUEUE_FULL,
                    f"{self._queue_limit} calls already wait for {self._subject}: it is slower than its callers",
                    Applied.NO,
                )
            self._queue.append(operation)
            self._changed.notify()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._watch)
        answer = await operation.future
        if isinstance(answer, Exception):
            # A group that fails shares one exception: without the tracebacks of its other callers.
            raise answer.with_traceback(None)
        return answer

    async def close(self) -> None:
        """End the thread once all that was queued is answered, or given up at the time-out; may be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.wait({self._ended}, timeout=self._timeout_s)
        with self._changed:
            waiting, self._queue = self._queue, []
            taken = list(self._taken)
        self._give_up(waiting, taken, Reason.STORE_CLOSED, f"{self._subject} is closed")
        if self._timer is not None:
            self._timer.cancel()

    def _run(self) -> None:
        """Serve until closed; runs in the thread."""
        idle_s = self._idle_s
        try:
            while True:
                with self._changed:
                    if not self._queue and not self._closing:
                        self._changed.wait(idle_s)
                    idle = not self._queue
                    if (idle and self._closing) or self._loop.is_closed():
                        return
                if idle:
                    # At once again while there is more: a burst is gone soon after it expires.
                    idle_s = 0 if self._file.upkeep() else self._idle_s
                else:
                    self._serve()
                    self._file.checkpoint()
        except RuntimeError:
            # The loop was closed before the store: nobody is left to answer.
            if not self._loop.is_closed():
                raise
        finally:
            self._file.close()
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._end)

    def _serve(self) -> None:
        try:
            locked_out = not self._file.begin()
        except Exception as error:  # noqa: BLE001 - whatever it is, every caller hears of it and the thread goes on.
            with self._changed:
                failed, self._queue = self._queue, []
            for one in failed:
                one.answer = error
            self._loop.call_soon_threadsafe(_deliver, failed)
            return
        with self._changed:
            self._locked_out = locked_out
            if not locked_out:
                # Taken only now that the lock is held: whoever came while it was awaited is in this batch, and
                # whoever waited for it in vain could be withdrawn. A caller that has gone needs no claim.
                self._taken = [one for one in self._queue[:MAX_BATCH] if not one.future.done()]
                del self._queue[:MAX_BATCH]
        if locked_out:
            time.sleep(_LOCK_POLL_S)
            return
        self._file.carry_out(self._taken)
        with self._changed:
            answered, self._taken = self._taken, []
        self._loop.call_soon_threadsafe(_deliver, answered)

    def _watch(self) -> None:
        """Answer the operations that have waited too long, and come back for the oldest that has not."""
        self._timer = None
        # A millisecond of grace, since the loop's clock and timers are no finer.
        late = self._loop.time() - self._timeout_s + 0.001
        with self._changed:
            count = sum(one.since <= late for one in self._queue)
            withdrawn = self._queue[:count]
            del self._queue[:count]
            stuck = [one for one in self._taken if one.since <= late]
            oldest = next((one.since for one in (*self._taken, *self._queue[:1]) if one.since > late), None)
            locked_out = self._locked_out
        if oldest is not None:
            self._timer = self._loop.call_at(oldest + self._timeout_s, self._watch)
        patience = f"for {self._timeout_s * 1000:.0f} ms"
        if locked_out:
            self._give_up(
                withdrawn, stuck, Reason.STORE_BUSY, f"another process holds the lock of {self._subject} {patience}"
            )
        else:
            self._give_up(withdrawn, stuck, Reason.STORE_STALLED, f"{self._subject} has not answered {patience}")

    def _give_up(self, waiting: list[Operation], taken: list[Operation], reason: Reason, message: str) -> None:
        for one in waiting:
            _answer(one, StoreUnavailable(reason, message, Applied.NO))
        for one in taken:
            applied = Applied.UNKNOWN if one.may_change else Applied.NO
            _answer(one, StoreUnavailable(reason, message, applied))

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def _deliver(operations: list[Operation]) -> None:
    for one in operations:
        _answer(one, one.answer)


def _answer(operation: Operation, answer: Answer) -> None:
    # A caller that was cancelled, or was answered by the watchdog, is not there to hear it.
    if not operation.future.done():
        operation.future.set_result(answer)

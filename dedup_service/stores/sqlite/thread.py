"""Thread between the event loop and a blocking file. It groups ready operations into one transaction.

Knows no SQL.
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

# Bounds the lock time of a transaction; larger ones are hardly faster.
MAX_BATCH = 256

# Retry interval for a lock held by another process; SQLite's own waits up to 100 ms.
_LOCK_POLL_S = 0.001

# A key's new value and expiry, or FORGET to delete it.
Row = tuple[bytes, int]
FORGET: Row = (b"", 0)

# Maps a key's live value and the Unix milliseconds to the answer and the new row, None to keep the old one. Runs in the
# thread. InvalidRequest and UnreadableValue reach the caller.
Step = Callable[[bytes | None, int], tuple[bytes | None, Row | None]]


@dataclass(slots=True, eq=False)
class Operation:
    """One call: a step on a key, or without a key a check of the file.

    `may_change`: the step may write. `changed`: it did.
    """

    future: asyncio.Future[Answer]
    since: float
    key: bytes | None = None
    step: Step | None = None
    may_change: bool = False
    changed: bool = False
    answer: Answer = None


class BatchFile(Protocol):
    """The file driven by the thread; only the thread calls it."""

    def begin(self) -> bool:
        """Take the write lock, connecting if needed; return False if another process holds it.

        Raises StoreUnavailable (nothing was applied) and StoreRefused.
        """

    def carry_out(self, operations: Sequence[Operation]) -> None:
        """Carry out `operations` under the lock, commit, and set their answers. Raises nothing."""

    def upkeep(self) -> bool:
        """Do a short step of idle maintenance; return whether to do another at once."""

    def checkpoint(self) -> None:
        """Do maintenance that cannot wait for idle time, after each batch."""

    def close(self) -> None:
        """Disconnect. Raises nothing."""


class BatchThread:
    """Passes groups of operations to a thread, and their answers back in one callback per group.

    Belongs to the event loop that made it. Every operation is answered within about `timeout_s` seconds: at the timeout
    a waiting one is withdrawn and never carried out, one in progress is unknown.
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
        # Guards the four below. An operation is either queued or taken, which makes a withdrawal certain.
        self._changed = threading.Condition(threading.Lock())
        self._queue: list[Operation] = []
        self._taken: list[Operation] = []
        self._locked_out = False
        self._closing = False
        # A daemon, so that a hanging disk cannot keep the process alive.
        self._thread = threading.Thread(target=self._run, name="dedup-sqlite", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def submit(
        self, key: bytes | None = None, step: Step | None = None, *, may_change: bool = False
    ) -> bytes | None:
        """Return the answer to one operation.

        Raises the file's exception, and StoreUnavailable when the queue is full, at the timeout and when closed.
        """
        loop = self._loop
        operation = Operation(loop.create_future(), loop.time(), key, step, may_change)
        with self._changed:
            if self._closing:
                raise self._closed_failure()
            # A check must reach the file also when the queue is full.
            if len(self._queue) >= self._queue_limit and key is not None:
                raise StoreUnavailable(
                    Reason.STORE_QUEUE_FULL,
                    f"{self._queue_limit} calls already wait for {self._subject}: send fewer, or use a faster disk",
                    Applied.NO,
                )
            self._queue.append(operation)
            self._changed.notify()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._watch)
        answer = await operation.future
        if isinstance(answer, Exception):
            # Callers of a failed group share one exception: drop the others' tracebacks.
            raise answer.with_traceback(None)
        return answer

    async def close(self) -> None:
        """End the thread once all queued operations are answered, within the timeout; may be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.wait({self._ended}, timeout=self._timeout_s)
        with self._changed:
            waiting, self._queue = self._queue, []
            taken = list(self._taken)
        closed = self._closed_failure()
        self._give_up(waiting, taken, closed.reason, str(closed))
        if self._timer is not None:
            self._timer.cancel()

    def _run(self) -> None:
        idle_s = self._idle_s
        try:
            while True:
                with self._changed:
                    if not self._queue and not self._closing:
                        self._changed.wait(idle_s)
                    idle = not self._queue
                    if (idle and self._closing) or self._loop.is_closed():
                        return
                try:
                    if idle:
                        # Without a pause while there is more, to delete a burst soon after it expires.
                        idle_s = 0 if self._file.upkeep() else self._idle_s
                    else:
                        self._serve()
                        self._file.checkpoint()
                except Exception as error:  # noqa: BLE001 - without its thread the store would never answer again
                    idle_s = self._idle_s
                    self._fail_taken(error)
        except RuntimeError:
            # A closed loop has no callers left.
            if not self._loop.is_closed():
                raise
        finally:
            self._file.close()
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._end)

    def _serve(self) -> None:
        try:
            locked_out = not self._file.begin()
        except Exception as error:  # noqa: BLE001 - every caller receives it, and the thread continues
            with self._changed:
                failed, self._queue = self._queue, []
            for one in failed:
                one.answer = error
            self._loop.call_soon_threadsafe(_deliver, failed)
            return
        with self._changed:
            self._locked_out = locked_out
            if not locked_out:
                # Taken under the lock: includes operations that arrived during the wait for it, which could be
                # withdrawn until now. Skip callers that left.
                self._taken = [one for one in self._queue[:MAX_BATCH] if not one.future.done()]
                del self._queue[:MAX_BATCH]
        if locked_out:
            time.sleep(_LOCK_POLL_S)
            return
        self._file.carry_out(self._taken)
        with self._changed:
            answered, self._taken = self._taken, []
        self._loop.call_soon_threadsafe(_deliver, answered)

    def _fail_taken(self, error: Exception) -> None:
        """Answer the batch after an unexpected exception; the next batch reconnects."""
        with contextlib.suppress(Exception):
            self._file.close()
        with self._changed:
            failed, self._taken = self._taken, []
        for one in failed:
            one.answer = StoreUnavailable(
                Reason.STORE_ERROR,
                f"{self._subject} failed unexpectedly ({type(error).__name__}): this is a bug, please report it",
                Applied.UNKNOWN if one.may_change else Applied.NO,
            )
        self._loop.call_soon_threadsafe(_deliver, failed)

    def _watch(self) -> None:
        """Answer overdue operations, and schedule the next look."""
        self._timer = None
        # A millisecond of grace: the loop's clock and timers are no finer.
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
        timeout = f"for {self._timeout_s * 1000:.0f} ms"
        if locked_out:
            message = f"another process holds the lock of {self._subject} {timeout}: end that process, or wait"
            self._give_up(withdrawn, stuck, Reason.STORE_BUSY, message)
        else:
            message = f"{self._subject} has not answered {timeout}: check the disk, or raise DEDUP_STORE_TIMEOUT"
            self._give_up(withdrawn, stuck, Reason.STORE_STALLED, message)

    def _give_up(self, waiting: list[Operation], taken: list[Operation], reason: Reason, message: str) -> None:
        for one in waiting:
            _answer(one, StoreUnavailable(reason, message, Applied.NO))
        for one in taken:
            applied = Applied.UNKNOWN if one.may_change else Applied.NO
            _answer(one, StoreUnavailable(reason, message, applied))

    def _closed_failure(self) -> StoreUnavailable:
        return StoreUnavailable(Reason.STORE_CLOSED, f"{self._subject} is closed: the service is stopping", Applied.NO)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def _deliver(operations: list[Operation]) -> None:
    for one in operations:
        _answer(one, one.answer)


def _answer(operation: Operation, answer: Answer) -> None:
    # The caller may be cancelled, or answered by the watchdog.
    if not operation.future.done():
        operation.future.set_result(answer)

"""One Redis connection shared by every call: commands leave in one write a loop turn, replies come back in order.

It knows nothing of claims. A channel is used once: when its connection is lost, or a reply is overdue, every unanswered
command fails and the channel is done. Nothing is ever sent twice.
"""

import asyncio
from collections import deque
from typing import Any

import hiredis

from dedup_service.claims import Applied, Reason, StoreUnavailable

# Beyond this many unanswered commands Redis is not keeping up, and waiting longer would help nobody.
MAX_UNANSWERED = 10_000

# After a stall of this process the timer may run before the replies that already lie in the socket are read.
_GRACE_S = 0.05

_NO_REPLY_YET = object()


class RedisChannel(asyncio.Protocol):
    """Multiplexes commands over one connected transport.

    Cancelling a caller leaves the channel in order: its reply is read and thrown away in its turn.
    """

    def __init__(self, transport: asyncio.Transport, timeout_ms: int, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._timeout_s = timeout_ms / 1000
        self._loop = loop
        self._replies = hiredis.Reader(notEnoughData=_NO_REPLY_YET)
        self._unsent: list[bytes] = []
        # The futures of all commands not yet answered, oldest first, with the loop time at which each was handed over.
        self._unanswered: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._watchdog: asyncio.TimerHandle | None = None
        self._overdue: asyncio.Future[Any] | None = None
        self._failure: StoreUnavailable | None = None
        self.lost: asyncio.Future[StoreUnavailable] = loop.create_future()
        """Resolved once, with the reason, when the channel takes no more commands."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Resolved once, when the last command was answered or failed and the connection is closed."""

    def send(self, *command: bytes | str | float) -> asyncio.Future[Any]:
        """Queue one command for this turn's write and return a future of its reply.

        The reply is bytes, int, list, None or a `hiredis.ReplyError` (returned, not raised). The future raises
        StoreUnavailable when the channel ends first: `applied` is NO for a command that was never written.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._failure is not None:
            future.set_exception(_copy(self._failure))
            return future
        if len(self._unanswered) >= MAX_UNANSWERED:
            future.set_exception(
                StoreUnavailable(
                    Reason.STORE_QUEUE_FULL, f"{MAX_UNANSWERED} commands already wait for a reply of Redis", Applied.NO
                )
            )
            return future
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(hiredis.pack_command(command))  # type: ignore[arg-type]
        now = self._loop.time()
        self._unanswered.append((future, now))
        if self._watchdog is None:
            self._watchdog = self._loop.call_at(now + self._timeout_s, self._watch)
        return future

    def retire(self, reason: StoreUnavailable) -> None:
        """Take no more commands, and close once those under way are answered."""
        if self._failure is None:
            self._fail(reason)
            self._end_if_drained()

    def data_received(self, data: bytes) -> None:
        """Hand the replies in `data` to the commands that they answer, in order."""
        self._replies.feed(data)
        try:
            while (reply := self._replies.gets()) is not _NO_REPLY_YET:
                if not self._unanswered or len(self._unanswered) == len(self._unsent):
                    # Bytes that nobody asked for would answer the next command in its place.
                    self._end(_unavailable(Reason.STORE_PROTOCOL_ERROR, "Redis sent a reply that no command asked for"))
                    return
                future, _ = self._unanswered.popleft()
                if not future.done():
                    future.set_result(reply)
        except hiredis.ProtocolError:
            self._end(_unavailable(Reason.STORE_PROTOCOL_ERROR, "what Redis sent is not its protocol"))
            return
        self._end_if_drained()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the channel, since the connection is gone."""
        detail = f": {exc}" if exc else ""
        self._end(_unavailable(Reason.STORE_CONNECTION_LOST, f"the connection to Redis was lost{detail}"))

    def _flush(self) -> None:
        if not self.ended.done() and self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def _watch(self) -> None:
        self._watchdog = None
        if not self._unanswered:
            return
        oldest, since = self._unanswered[0]
        due = since + self._timeout_s
        if self._loop.time() < due:
            self._overdue = None
            self._watchdog = self._loop.call_at(due, self._watch)
        elif self._overdue is not oldest:
            self._overdue = oldest
            self._watchdog = self._loop.call_later(_GRACE_S, self._watch)
        else:
            self._end(_unavailable(Reason.STORE_TIMEOUT, f"Redis did not answer within {self._timeout_s:g} s"))

    def _fail(self, failure: StoreUnavailable) -> None:
        if self._failure is None:
            self._failure = failure
            # Its keeper may have been cancelled while it waited here.
            if not self.lost.done():
                self.lost.set_result(failure)

    def _end_if_drained(self) -> None:
        if self._failure is not None and not self._unanswered:
            self._end(self._failure)

    def _end(self, failure: StoreUnavailable) -> None:
        if self.ended.done():
            return
        self._fail(failure)
        self.ended.set_result(None)
        if self._watchdog is not None:
            self._watchdog.cancel()
        written = len(self._unanswered) - len(self._unsent)
        for position, (future, _) in enumerate(self._unanswered):
            if not future.done():
                future.set_exception(_copy(failure, Applied.UNKNOWN if position < written else Applied.NO))
        self._unanswered.clear()
        self._unsent.clear()
        self._transport.abort()


def _unavailable(reason: Reason, message: str) -> StoreUnavailable:
    return StoreUnavailable(reason, message, Applied.UNKNOWN)


def _copy(failure: StoreUnavailable, applied: Applied = Applied.NO) -> StoreUnavailable:
    # One exception object raised in many tasks would collect all their tracebacks.
    return StoreUnavailable(failure.reason, str(failure), applied)

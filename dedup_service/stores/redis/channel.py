"""One Redis connection shared by all calls: commands leave in one write per loop turn, replies arrive in order.

Knows nothing of claims. When the connection is lost or a reply is overdue, every unanswered command fails and the
channel is finished. No command is ever sent twice.
"""

import asyncio
from collections import deque
from typing import Any, NamedTuple

import hiredis

from dedup_service.claims import Applied, Reason, StoreUnavailable

# With more unanswered commands than this Redis is not keeping up, and a longer queue would not help.
MAX_UNANSWERED = 10_000

# After a stall of this process the timer may run before replies already in the socket are read.
_GRACE_S = 0.05

# A long reply is not overdue while this much of it arrives within each timeout.
_PROGRESS_BYTES = 1024 * 1024

_NO_REPLY_YET = object()

Command = tuple[bytes | str | int, ...]


class RedisChannel(asyncio.Protocol):
    """Multiplexes commands over one connected transport.

    Cancelling a caller is safe: the channel reads and discards the reply in its turn.
    """

    def __init__(self, transport: asyncio.Transport, timeout_ms: int, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._timeout_s = timeout_ms / 1000
        self._loop = loop
        self._replies = hiredis.Reader(notEnoughData=_NO_REPLY_YET)
        # The bytes of the unfinished reply since its last progress, and the loop time of that.
        self._arrived = 0
        self._progressed_at = 0.0
        self._unsent: list[bytes] = []
        # The futures of all unanswered commands, oldest first, with the loop time at which each was queued.
        self._unanswered: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._watchdog: asyncio.TimerHandle | None = None
        self._overdue: asyncio.Future[Any] | None = None
        self._failure: StoreUnavailable | None = None
        self.lost: asyncio.Future[StoreUnavailable] = loop.create_future()
        """Resolved once, with the reason, when the channel accepts no more commands."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Resolved once, when every command was answered or failed and the connection is closed."""

    def send(self, *command: bytes | str | float, past_limit: bool = False) -> asyncio.Future[Any]:
        """Queue one command for this turn's write and return a future of its reply.

        `past_limit`: also when the queue is full, for health checks and for the WAIT after a write.

        The reply is bytes, int, list, None or a `hiredis.ReplyError` (returned, not raised). The future raises
        StoreUnavailable when the channel ends first: `applied` is NO for a command that was never written.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._failure is not None:
            future.set_exception(self._failure.with_applied(Applied.NO))
            return future
        if len(self._unanswered) >= MAX_UNANSWERED and not past_limit:
            future.set_exception(
                StoreUnavailable(
                    Reason.STORE_QUEUE_FULL,
                    f"{MAX_UNANSWERED} commands already wait for a reply from Redis: send fewer calls, or find out why "
                    "Redis is slow",
                    Applied.NO,
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
        """Accept no more commands, and close once those in flight are answered."""
        if self._failure is None:
            self._fail(reason)
            self._end_if_drained()

    def data_received(self, data: bytes) -> None:
        """Hand replies to their commands, in order."""
        self._replies.feed(data)
        self._arrived += len(data)
        try:
            while (reply := self._replies.gets()) is not _NO_REPLY_YET:
                self._arrived = 0
                if not self._unanswered or len(self._unanswered) == len(self._unsent):
                    # An unsolicited reply would answer the next command.
                    self._end(_protocol_error("Redis sent a reply to no command"))
                    return
                future, _ = self._unanswered.popleft()
                if not future.done():
                    future.set_result(reply)
        except hiredis.ProtocolError:
            self._end(_protocol_error("Redis sent bytes outside its protocol"))
            return
        if self._arrived >= _PROGRESS_BYTES:
            self._arrived = 0
            self._progressed_at = self._loop.time()
        self._end_if_drained()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the channel."""
        detail = f": {exc}" if exc else ""
        self._end(
            StoreUnavailable(
                Reason.STORE_CONNECTION_LOST,
                f"the connection to Redis was lost{detail}; the service reconnects by itself",
                Applied.UNKNOWN,
            )
        )

    def _flush(self) -> None:
        if not self.ended.done() and self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def _watch(self) -> None:
        self._watchdog = None
        if not self._unanswered:
            return
        oldest, since = self._unanswered[0]
        due = max(since, self._progressed_at) + self._timeout_s
        if self._loop.time() < due:
            self._overdue = None
            self._watchdog = self._loop.call_at(due, self._watch)
        elif self._overdue is not oldest:
            self._overdue = oldest
            self._watchdog = self._loop.call_later(_GRACE_S, self._watch)
        else:
            self._end(
                StoreUnavailable(
                    Reason.STORE_TIMEOUT,
                    f"Redis did not answer within {self._timeout_s:g} s: check its load and the network, or raise "
                    "DEDUP_STORE_TIMEOUT",
                    Applied.UNKNOWN,
                )
            )

    def _fail(self, failure: StoreUnavailable) -> None:
        if self._failure is None:
            self._failure = failure
            # The keeper that awaits `lost` may have been cancelled.
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
                future.set_exception(failure.with_applied(Applied.UNKNOWN if position < written else Applied.NO))
        self._unanswered.clear()
        self._unsent.clear()
        self._transport.abort()


def _protocol_error(fault: str) -> StoreUnavailable:
    return StoreUnavailable(
        Reason.STORE_PROTOCOL_ERROR, f"{fault}: check for a proxy between this service and Redis", Applied.UNKNOWN
    )


class ReplicaQuorum:
    """Sends writes over a channel and counts the replicas that acknowledge them, for `wait_ms` at most.

    A WAIT follows the writes on the same connection. Redis serves nothing else on a connection that waits, so writes
    go in rounds: while one round waits, the next gathers, and one WAIT answers for all writes of its round.
    """

    def __init__(self, channel: RedisChannel, replicas: int, wait_ms: int) -> None:
        self._channel = channel
        self._replicas = replicas
        self._wait_ms = wait_ms
        self._gathered: list[_Write] = []
        self._rounds: asyncio.Task[None] | None = None

    async def send(self, *command: bytes | str | int, past_limit: bool = False) -> tuple[Any, Any]:
        """Return the reply to the command, and the reply to the WAIT after it: the number of replicas that have it.

        Raises StoreUnavailable as `RedisChannel.send` does; `applied` is UNKNOWN if only the WAIT stayed unanswered.
        """
        answer: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()
        self._gathered.append(_Write(command, past_limit, answer))
        if self._rounds is None:
            self._rounds = asyncio.get_running_loop().create_task(self._send_rounds())
        return await answer

    async def _send_rounds(self) -> None:
        try:
            while self._gathered:
                # A cancelled caller cannot know the outcome, so its command need not be sent.
                together = [write for write in self._gathered if not write.answer.done()]
                self._gathered = []
                if together:
                    await self._send_round(together)
        finally:
            self._rounds = None

    async def _send_round(self, together: "list[_Write]") -> None:
        try:
            # Without an await between them they leave in one write, in this order.
            replies = [self._channel.send(*write.command, past_limit=write.past_limit) for write in together]
            waited = self._channel.send("WAIT", self._replicas, self._wait_ms, past_limit=True)
            acknowledged, *results = await asyncio.gather(waited, *replies, return_exceptions=True)
        except Exception as error:  # noqa: BLE001 - callers of a round that failed would wait for ever
            acknowledged, results = None, [_unexpected(error)] * len(together)
        for write, result in zip(together, results, strict=True):
            answer = write.answer
            if answer.done():
                continue
            if isinstance(result, StoreUnavailable):
                answer.set_exception(result)
            elif type(result) is hiredis.ReplyError:
                answer.set_result((result, 0))
            elif isinstance(acknowledged, StoreUnavailable):
                # The write was answered, so whatever happened to the WAIT, the write may have been kept.
                answer.set_exception(acknowledged.with_applied(Applied.UNKNOWN))
            else:
                answer.set_result((result, acknowledged))


class _Write(NamedTuple):
    command: Command
    past_limit: bool
    answer: asyncio.Future[tuple[Any, Any]]


def _unexpected(error: Exception) -> StoreUnavailable:
    return StoreUnavailable(
        Reason.STORE_ERROR, f"sending to Redis failed unexpectedly ({type(error).__name__})", Applied.UNKNOWN
    )

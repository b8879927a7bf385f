"""Keeps one channel to a Redis server open, and chooses the link for a key.

A link reconnects with growing, jittered pauses. While Redis is away callers fail at once instead of queueing, and the
first attempt that succeeds serves them again. The server to connect to is located anew for each attempt, so that a
failover needs no help.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, cast

from redis.asyncio.connection import AbstractConnection

from dedup_service.claims import Applied, ConnectionObserver, Reason, StoreRefused, StoreUnavailable
from dedup_service.stores.redis.channel import RedisChannel, ReplicaQuorum
from dedup_service.stores.redis.connection import new_connection, shake_hands
from dedup_service.stores.redis.url import RedisTarget

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
# A connection that dies younger than this counts as a failed attempt, to prevent a hot loop.
_SETTLED_S = 1.0

_CANCEL_AGAIN_S = 0.05


class RedisNodes(Protocol):
    """The servers that take claims now, each with a link that is kept open."""

    async def open(self) -> None:
        """Start keeping links. Returns after the first attempt, successful or not; raises StoreRefused."""

    async def close(self) -> None:
        """Stop keeping links; in-flight commands fail. May be called twice."""

    def link_of(self, key: bytes) -> "RedisLink":
        """Return the link of the server that takes this key; raise StoreUnavailable (never applied) without one."""

    def masters(self) -> Sequence[tuple[bytes, "RedisLink"]]:
        """Return each link that takes claims, with a hash tag: keys that contain it belong to that server.

        Raises StoreUnavailable (never applied) or StoreRefused when no server is known.
        """

    def redirected(self, key: bytes, link: "RedisLink", reply: str) -> "RedisLink | None":
        """Return the link to which a MOVED or ASK reply of `link` points, or None to treat the reply as an error."""


class OneServer:
    """The nodes of a deployment in which one server at a time takes all claims."""

    def __init__(self, link: "RedisLink") -> None:
        self._link = link

    async def open(self) -> None:
        """Implement RedisNodes."""
        await self._link.open()

    async def close(self) -> None:
        """Implement RedisNodes."""
        await self._link.close()

    def link_of(self, _key: bytes) -> "RedisLink":
        """Implement RedisNodes."""
        return self._link

    def masters(self) -> Sequence[tuple[bytes, "RedisLink"]]:
        """Implement RedisNodes."""
        return ((b"", self._link),)

    def redirected(self, _key: bytes, _link: "RedisLink", _reply: str) -> "RedisLink | None":
        """Follow no redirection: a cluster behind the URL of a single server is a mistake that must show."""
        return None


class RedisLocator(Protocol):
    """Locates the server that takes claims now."""

    async def locate(self) -> RedisTarget:
        """Return the server. Raises StoreUnavailable (never applied) when it is unknown, and StoreRefused."""

    @property
    def recheck_s(self) -> float | None:
        """Interval for locating again while connected, in seconds; None where the answer never changes."""


class FixedServer:
    """The locator of a server that the URL itself names."""

    recheck_s = None

    def __init__(self, target: RedisTarget) -> None:
        self._target = target

    async def locate(self) -> RedisTarget:
        """Implement RedisLocator."""
        return self._target


class RedisLink:
    """The way to one Redis server over any number of connections, one at a time."""

    def __init__(
        self, locator: RedisLocator, timeout_ms: int, min_replicas: int = 0, observer: ConnectionObserver | None = None
    ) -> None:
        self._locator = locator
        self._timeout_ms = timeout_ms
        self._min_replicas = min_replicas
        self._observer = observer
        self._keeper: asyncio.Task[None] | None = None
        self._disposals: set[asyncio.Task[None]] = set()
        self._failure: StoreUnavailable | StoreRefused | None = None
        self._attempted = asyncio.Event()
        self._jitter = random.Random()  # noqa: S311 - spreads reconnects, protects nothing
        self.channel: RedisChannel | None = None
        """The channel to send on. If None, await `connected`."""
        self.quorum: ReplicaQuorum | None = None
        """Sends writes that replicas have to acknowledge; None unless the settings ask for replicas."""
        self.server: RedisTarget | None = None
        """The server of the last connection."""
        self.run_id: str | None = None
        """The run id of that server, which a restart changes; None where the server does not tell it."""

    async def open(self) -> None:
        """Start to keep a channel. Returns after the first attempt, successful or not.

        Raises StoreRefused when Redis answered and can never serve claims.
        """
        self.start()
        await self._attempted.wait()
        refusal = self._failure
        if isinstance(refusal, StoreRefused):
            await self.close()
            raise refusal

    def start(self) -> None:
        """Start to keep a channel without waiting; `connected` waits, and raises as `open` does."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        """Stop keeping a channel; in-flight commands fail."""
        keeper, self._keeper = self._keeper, None
        await cancelled(keeper)
        await asyncio.gather(*self._disposals, return_exceptions=True)
        self._failure = shutting_down()
        self._attempted.set()

    async def connected(self) -> RedisChannel:
        """Return the channel, waiting only while the first attempt since the loss is in progress.

        Raises StoreUnavailable (never applied) when that attempt failed, and StoreRefused.
        """
        if self.channel is None:
            await self._attempted.wait()
        if self.channel is None:
            failure = self._failure
            if isinstance(failure, StoreRefused):
                raise StoreRefused(str(failure))
            if failure is None:
                failure = StoreUnavailable(
                    Reason.STORE_CONNECTION_LOST,
                    "the connection to Redis was lost; the service reconnects by itself",
                    Applied.NO,
                )
            raise failure.with_applied(Applied.NO)
        return self.channel

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                try:
                    target = await self._locator.locate()
                    self.channel = await self._connect_unless_moved(target)
                except (StoreUnavailable, StoreRefused) as failure:
                    self._failure = failure
                except Exception as error:  # noqa: BLE001 - without its keeper the link would never connect again
                    self._failure = unexpected_failure("connecting to Redis", error)
                else:
                    self._failure = None
                self._attempted.set()
                if self.channel is not None:
                    since = loop.time()
                    failure_of_channel = await self._until_lost(self.channel, target)
                    self.channel = self.quorum = None
                    if loop.time() - since >= _SETTLED_S:
                        pause_s = _FIRST_PAUSE_S
                        self._attempted.clear()
                        continue
                    self._failure = failure_of_channel
                await asyncio.sleep(pause_s * self._jitter.uniform(0.5, 1))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            if self.channel is not None:
                self.channel.connection_lost(None)
                self.channel = self.quorum = None

    async def _until_lost(self, channel: RedisChannel, target: RedisTarget) -> StoreUnavailable:
        # Not drained first: replies of a deposed server are doubt, since what it stores is lost.
        deposed = ConnectionError(f"{target} is not the master any more")
        async with self._noticing_moves(target, lambda: channel.connection_lost(deposed)):
            return await channel.lost

    async def _connect_unless_moved(self, target: RedisTarget) -> RedisChannel:
        """Connect, and give up a server that hangs as soon as another one is the master."""
        try:
            async with asyncio.timeout(None) as attempt, self._noticing_moves(target, lambda: attempt.reschedule(0)):
                return await self._connect(target)
        except TimeoutError as error:
            raise StoreUnavailable(
                Reason.STORE_UNREACHABLE, f"Redis at {target} did not answer and is not the master any more", Applied.NO
            ) from error

    @asynccontextmanager
    async def _noticing_moves(self, target: RedisTarget, leave: Callable[[], None]) -> AsyncIterator[None]:
        watch = asyncio.get_running_loop().create_task(self._leave_when_moved(target, leave))
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.wait({watch})

    async def _leave_when_moved(self, target: RedisTarget, leave: Callable[[], None]) -> None:
        while self._locator.recheck_s is not None:
            await asyncio.sleep(self._locator.recheck_s)
            try:
                moved = await self._locator.locate() != target
            except Exception:  # noqa: BLE001, S112 - the server may still answer
                continue
            if moved:
                leave()
                return

    async def _connect(self, target: RedisTarget) -> RedisChannel:
        connection = new_connection(target, self._timeout_ms / 1000)
        try:
            self.run_id = await shake_hands(connection, target)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # The only private name of redis-py in use: its writer's transport, which the channel takes over.
        transport: asyncio.Transport = cast("Any", connection)._writer.transport  # noqa: SLF001
        channel = RedisChannel(transport, self._timeout_ms, asyncio.get_running_loop())
        transport.set_protocol(channel)
        if self._observer is not None:
            self._observer.connected(again=self.server is not None)
        self.server = target
        if self._min_replicas:
            # Half of the timeout, since a write may have to wait for one round before its own.
            self.quorum = ReplicaQuorum(channel, self._min_replicas, max(1, self._timeout_ms // 2))
        channel.ended.add_done_callback(lambda _: self._dispose(connection))
        return channel

    def _dispose(self, connection: AbstractConnection) -> None:
        disposal = asyncio.get_running_loop().create_task(connection.disconnect(nowait=True))
        self._disposals.add(disposal)
        disposal.add_done_callback(self._disposals.discard)
        if self._observer is not None:
            self._observer.disconnected()


async def cancelled(keeper: "asyncio.Task[None] | None") -> None:
    """Cancel a task until it has ended.

    Once is not enough: before Python 3.12 `wait_for`, with which redis-py connects, swallows a cancellation that
    coincides with the end of the awaited future.
    """
    while keeper is not None and not keeper.done():
        keeper.cancel()
        await asyncio.wait({keeper}, timeout=_CANCEL_AGAIN_S)


def shutting_down() -> StoreUnavailable:
    """Return the failure of every call after `close`."""
    return StoreUnavailable(
        Reason.STORE_CLOSED, "the service is shutting down: try again at another instance", Applied.NO
    )


def unexpected_failure(doing: str, error: BaseException) -> StoreUnavailable:
    """Return the failure for an unexpected exception, without its text, which may contain a secret."""
    return StoreUnavailable(
        Reason.STORE_UNREACHABLE,
        f"{doing} failed unexpectedly ({type(error).__name__}): this is a bug, please report it; it is tried again",
        Applied.NO,
    )

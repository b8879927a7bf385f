"""Keeps one channel to Redis open: connects, and connects again with growing, jittered pauses.

While Redis is away callers fail at once instead of queueing up, and the first attempt that succeeds serves them again.
Which server to connect to is asked anew each time, so that a failover needs nobody's help.
"""

import asyncio
import contextlib
import random
from typing import Any, Protocol, cast

from redis.asyncio.connection import AbstractConnection

from dedup_service.claims import Applied, ConnectionObserver, Reason, StoreRefused, StoreUnavailable
from dedup_service.stores.redis.channel import RedisChannel
from dedup_service.stores.redis.connection import new_connection, shake_hands
from dedup_service.stores.redis.quorum import ReplicaQuorum
from dedup_service.stores.redis.url import RedisTarget

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
# A connection that dies younger than this counts as a failed attempt, so that it cannot make a hot loop.
_SETTLED_S = 1.0


_CANCEL_AGAIN_S = 0.05


class RedisLocator(Protocol):
    """Knows which server takes the claims now."""

    async def locate(self) -> RedisTarget:
        """Return the server; raise StoreUnavailable (never applied) when nobody knows it, and StoreRefused."""

    @property
    def recheck_s(self) -> float | None:
        """How often to ask again while connected, in seconds; None where the answer never changes."""


class FixedServer:
    """The locator of a server that the URL itself names."""

    recheck_s = None

    def __init__(self, target: RedisTarget) -> None:
        self._target = target

    async def locate(self) -> RedisTarget:
        """Return that server."""
        return self._target


class RedisLink:
    """The way to the Redis server that takes the claims, across any number of connections, one at a time."""

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
        self._jitter = random.Random()  # noqa: S311 - spreads reconnects, guards nothing
        self.channel: RedisChannel | None = None
        """The channel to send on, or None: then `connected` says what to do."""
        self.quorum: ReplicaQuorum | None = None
        """Sends writes over the channel that replicas have to acknowledge; None unless any are asked for."""
        self.server: RedisTarget | None = None
        """The server that was connected to last."""
        self.run_id: str | None = None
        """What that server called its process, which a restart changes; None where it does not say."""

    async def open(self) -> None:
        """Start to keep a channel, and return after the first attempt, whether it succeeded or Redis is away.

        Raises StoreRefused when Redis answered that it can never serve claims.
        """
        self.start()
        await self._attempted.wait()
        refusal = self._failure
        if isinstance(refusal, StoreRefused):
            await self.close()
            raise refusal

    def start(self) -> None:
        """Start to keep a channel, and wait for nothing: `connected` does, and raises what `open` would."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        """Stop keeping a channel; commands under way fail."""
        keeper, self._keeper = self._keeper, None
        while keeper is not None and not keeper.done():
            # Once is not enough: before Python 3.12 wait_for, which redis-py connects with, swallows a cancellation
            # that meets the end of what it waits for.
            keeper.cancel()
            await asyncio.wait({keeper}, timeout=_CANCEL_AGAIN_S)
        await asyncio.gather(*self._disposals)
        self._failure = StoreUnavailable(Reason.STORE_CLOSED, "the service is shutting down", Applied.NO)
        self._attempted.set()

    async def connected(self) -> RedisChannel:
        """Return the channel; wait for one only while the first attempt since it was lost is under way.

        Raises StoreUnavailable (never applied) when that attempt failed, and StoreRefused.
        """
        if self.channel is None:
            await self._attempted.wait()
        if self.channel is None:
            failure = self._failure
            if isinstance(failure, StoreRefused):
                raise StoreRefused(str(failure))
            if failure is None:
                failure = StoreUnavailable(Reason.STORE_CONNECTION_LOST, "the connection to Redis was lost", Applied.NO)
            raise StoreUnavailable(failure.reason, str(failure), Applied.NO)
        return self.channel

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                try:
                    target = await self._locator.locate()
                    self.channel = await self._connect(target)
                except (StoreUnavailable, StoreRefused) as failure:
                    self._failure = failure
                except Exception as error:  # noqa: BLE001 - a keeper that died would leave every caller waiting
                    sentence = f"connecting to Redis failed in an unexpected way: {type(error).__name__}"
                    self._failure = StoreUnavailable(Reason.STORE_UNREACHABLE, sentence, Applied.NO)
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
        watch = asyncio.get_running_loop().create_task(self._leave_when_moved(channel, target))
        try:
            return await channel.lost
        finally:
            watch.cancel()
            await asyncio.wait({watch})

    async def _leave_when_moved(self, channel: RedisChannel, target: RedisTarget) -> None:
        while self._locator.recheck_s is not None:
            await asyncio.sleep(self._locator.recheck_s)
            # A server that still answers is not left because nobody can say where it is.
            with contextlib.suppress(StoreUnavailable, StoreRefused):
                if await self._locator.locate() != target:
                    # Not drained first: what a deposed server still says is doubt, since nobody keeps what it stores.
                    channel.connection_lost(ConnectionError(f"{target} is not the master any more"))
                    return

    async def _connect(self, target: RedisTarget) -> RedisChannel:
        connection = new_connection(target, self._timeout_ms / 1000)
        try:
            self.run_id = await shake_hands(connection, target)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # The one private name of redis-py that we rely on: its writer's transport, which the channel takes over.
        transport: asyncio.Transport = cast("Any", connection)._writer.transport  # noqa: SLF001
        channel = RedisChannel(transport, self._timeout_ms, asyncio.get_running_loop())
        transport.set_protocol(channel)
        if self._observer is not None:
            self._observer.connected(again=self.server is not None)
        self.server = target
        if self._min_replicas:
            # Half of the time, since a write may have to let one round go before its own.
            self.quorum = ReplicaQuorum(channel, self._min_replicas, max(1, self._timeout_ms // 2))
        channel.ended.add_done_callback(lambda _: self._dispose(connection))
        return channel

    def _dispose(self, connection: AbstractConnection) -> None:
        disposal = asyncio.get_running_loop().create_task(connection.disconnect(nowait=True))
        self._disposals.add(disposal)
        disposal.add_done_callback(self._disposals.discard)
        if self._observer is not None:
            self._observer.disconnected()

"""Keeps one channel to Redis open: connects, checks the server, and connects again with growing, jittered pauses.

While Redis is away callers fail at once instead of queueing up, and the first attempt that succeeds serves them again.
redis-py makes the connection (TLS, AUTH, database); its retries, notifications and client announcements are off.
"""

import asyncio
import contextlib
import random
import re
from collections.abc import Callable
from typing import Any, cast

from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection

from dedup_service.claims import Applied, StoreRefused, StoreUnavailable
from dedup_service.stores.redis_channel import RedisChannel
from dedup_service.stores.redis_url import RedisTarget

MINIMUM_REDIS = (7, 0)

_VERSION = re.compile(r"(\d+)\.(\d+)[.\d]*")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
# A connection that dies younger than this counts as a failed attempt, so that it cannot make a hot loop.
_SETTLED_S = 1.0


class RedisLink:
    """The way to one Redis server, across any number of connections, one at a time."""

    def __init__(self, target: RedisTarget, timeout_ms: int) -> None:
        self._target = target
        self._timeout_ms = timeout_ms
        self._keeper: asyncio.Task[None] | None = None
        self._disposals: set[asyncio.Task[None]] = set()
        self._failure: StoreUnavailable | StoreRefused | None = None
        self._attempted = asyncio.Event()
        self._jitter = random.Random()  # noqa: S311 - spreads reconnects, guards nothing
        self.channel: RedisChannel | None = None
        """The channel to send on, or None: then `connected` says what to do."""

    async def open(self) -> None:
        """Start to keep a channel, and return after the first attempt, whether it succeeded or Redis is away.

        Raises StoreRefused when Redis answered that it can never serve claims.
        """
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        await self._attempted.wait()
        refusal = self._failure
        if isinstance(refusal, StoreRefused):
            await self.close()
            raise refusal

    async def close(self) -> None:
        """Stop keeping a channel; commands under way fail."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        await asyncio.gather(*self._disposals)
        self._failure = StoreUnavailable("STORE_CLOSED", "the service is shutting down", Applied.NO)
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
                failure = StoreUnavailable("STORE_CONNECTION_LOST", "the connection to Redis was lost", Applied.NO)
            raise StoreUnavailable(failure.reason, str(failure), Applied.NO)
        return self.channel

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                try:
                    self.channel = await self._connect()
                except (StoreUnavailable, StoreRefused) as failure:
                    self._failure = failure
                else:
                    self._failure = None
                self._attempted.set()
                if self.channel is not None:
                    since = loop.time()
                    failure_of_channel = await self.channel.lost
                    self.channel = None
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
                self.channel = None

    async def _connect(self) -> RedisChannel:
        connection = _new_connection(self._target, self._timeout_ms / 1000)
        try:
            await self._handshake(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        # The one private name of redis-py that we rely on: its writer's transport, which the channel takes over.
        transport: asyncio.Transport = cast("Any", connection)._writer.transport  # noqa: SLF001
        channel = RedisChannel(transport, self._timeout_ms, asyncio.get_running_loop())
        transport.set_protocol(channel)
        channel.ended.add_done_callback(lambda _: self._dispose(connection))
        return channel

    def _dispose(self, connection: AbstractConnection) -> None:
        disposal = asyncio.get_running_loop().create_task(connection.disconnect(nowait=True))
        self._disposals.add(disposal)
        disposal.add_done_callback(self._disposals.discard)

    async def _handshake(self, connection: AbstractConnection) -> None:
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            await self._check_server(connection)
            if await connection.can_read():
                raise StoreUnavailable("STORE_PROTOCOL_ERROR", "Redis sent a reply that nobody asked for", Applied.NO)
        except exceptions.AuthenticationError as error:
            raise StoreUnavailable(
                "STORE_NOT_AUTHENTICATED",
                f"Redis at {self._target} refused the user name or password of the store URL: {error}",
                Applied.NO,
            ) from error
        except exceptions.NoPermissionError as error:
            raise StoreUnavailable(
                "STORE_NOT_PERMITTED", f"the Redis user of the store URL lacks a right: {error}", Applied.NO
            ) from error
        except (exceptions.RedisError, OSError) as error:
            raise StoreUnavailable(
                "STORE_UNREACHABLE", f"Redis at {self._target} cannot be reached: {error}", Applied.NO
            ) from error

    async def _check_server(self, connection: AbstractConnection) -> None:
        await connection.send_command("INFO", "server")
        try:
            info = parse_info(await connection.read_response())
        except exceptions.ResponseError:
            # Where INFO is forbidden or renamed, a server that is too old shows itself by refusing the first claim.
            return
        if info.get("redis_mode") == "sentinel":
            raise StoreRefused(f"{self._target} is a Redis Sentinel, which holds no data: name the Redis server itself")
        version = _VERSION.match(info.get("redis_version", ""))
        if version is not None and (int(version[1]), int(version[2])) < MINIMUM_REDIS:
            raise StoreRefused(
                f"Redis at {self._target} has version {version[0]}, and a claim needs SET with NX and GET together: "
                "use Redis 7.0 or newer, or Valkey 7.2 or newer"
            )


def parse_info(reply: bytes) -> dict[str, str]:
    """Return the fields of a reply to INFO."""
    lines = (line.partition(":") for line in reply.decode(errors="replace").splitlines() if not line.startswith("#"))
    return {name: value for name, colon, value in lines if colon}


def _new_connection(target: RedisTarget, timeout_s: float) -> AbstractConnection:
    options: dict[str, Any] = {
        "db": target.db,
        "username": target.username or None,
        "password": target.password or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # RESP2 needs no HELLO, which old proxies break on, and knows no push messages.
        "protocol": 2,
        "driver_info": None,
        "retry": None,
        "retry_on_timeout": False,
        "health_check_interval": 0,
    }
    make: Callable[..., AbstractConnection] = Connection
    if target.socket_path:
        make = UnixDomainSocketConnection
        options["path"] = target.socket_path
    else:
        options |= {"host": target.host, "port": target.port}
        if target.tls:
            make = SSLConnection
            options |= target.tls_files
    return make(**options)

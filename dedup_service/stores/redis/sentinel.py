"""Locates the master that Redis Sentinels name. Failure detection and failover are their job."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from redis import exceptions

from dedup_service.claims import Applied, Reason, StoreRefused, StoreUnavailable
from dedup_service.stores.redis.connection import new_connection
from dedup_service.stores.redis.url import RedisTarget, SentinelTarget

# A master cut off from its Sentinels still takes claims, which are lost when the network heals.
_RECHECK_S = 1.0


class SentinelLocator:
    """Locates a monitored master: the first Sentinel that names it decides."""

    recheck_s = _RECHECK_S

    def __init__(self, target: SentinelTarget, timeout_ms: int) -> None:
        self._target = target
        self._timeout_s = timeout_ms / 1000
        # The next call begins with the last Sentinel that answered.
        self._order: Sequence[RedisTarget] = target.sentinels

    async def locate(self) -> RedisTarget:
        """Implement RedisLocator. Each Sentinel has the store timeout."""
        unknown_to = None
        failures: list[str] = []
        for sentinel in self._order:
            # Last until it answers: one that hangs does not cost its timeout again, also if this call is cancelled.
            others = [one for one in self._order if one is not sentinel]
            self._order = (*others, sentinel)
            try:
                address = await self._ask(sentinel)
            # ValueError: an invalid host name, or a reply without an address.
            except (exceptions.RedisError, OSError, ValueError) as error:
                failures.append(f"{sentinel.address}: {error or type(error).__name__}")
                continue
            if address is None:
                # It may have lost its state; others may have theirs.
                unknown_to = unknown_to or sentinel
                continue
            self._order = (sentinel, *others)
            host, port = address
            return replace(self._target.server, host=host, port=port)
        if unknown_to is not None:
            raise StoreRefused(
                f"Sentinel {unknown_to.address} knows no master {self._target.master_name!r}: "
                "write the name of its `sentinel monitor` line into the store URL"
            )
        raise StoreUnavailable(
            Reason.SENTINEL_UNREACHABLE,
            f"none of the {len(failures)} Sentinels asked located the Redis master {self._target.master_name!r}, check "
            f"that they run and can be reached ({'; '.join(failures)})",
            Applied.NO,
        )

    async def _ask(self, sentinel: RedisTarget) -> tuple[str, int] | None:
        connection = new_connection(sentinel, self._timeout_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
                await connection.send_command("SENTINEL", "get-master-addr-by-name", self._target.master_name)
                reply = await connection.read_response()
        finally:
            await connection.disconnect(nowait=True)
        if reply is None:
            return None
        if not isinstance(reply, list) or len(reply) != 2 or not all(isinstance(part, bytes) for part in reply):
            raise ValueError("its reply is not an address")
        return reply[0].decode(), int(reply[1])

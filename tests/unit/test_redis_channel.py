"""The watchdog of the Redis channel, on a manual clock."""

import asyncio
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from dedup_service.claims import StoreUnavailable
from dedup_service.stores.redis.channel import RedisChannel

TIMEOUT_S = 1
MIB = 1024 * 1024


class ManualLoop:
    """Calls what is due when the clock is set."""

    def __init__(self) -> None:
        self.now = 100.0
        self._calls: list[tuple[float, Callable[[], None]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)

    def time(self) -> float:
        """Return the manual time."""
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Mock:
        """Call at a time."""
        self._calls.append((when, call))
        return Mock()

    def call_later(self, delay: float, call: Callable[[], None]) -> Mock:
        """Call after a delay."""
        return self.call_at(self.now + delay, call)

    def advance(self, seconds: float) -> None:
        """Let time pass, and make the calls that are then due."""
        end = self.now + seconds
        while due := [call for call in self._calls if call[0] <= end]:
            first = min(due, key=lambda call: call[0])
            self._calls.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end


async def test_a_long_reply_that_keeps_arriving_is_not_overdue() -> None:
    """A reply of 20 MiB that takes twenty timeouts is received, and so is the reply behind it.

    Protection: a reply in progress moves the deadline. Losing the connection would fail every call in flight.
    """
    loop = ManualLoop()
    channel = RedisChannel(Mock(), TIMEOUT_S * 1000, loop)  # type: ignore[arg-type]
    long, behind = channel.send("GET", "long"), channel.send("GET", "behind")
    await asyncio.sleep(0)
    channel.data_received(b"$%d\r\n" % (20 * MIB))
    for _ in range(20):
        loop.advance(0.9 * TIMEOUT_S)
        channel.data_received(bytes(MIB))
    loop.advance(0.9 * TIMEOUT_S)
    channel.data_received(b"\r\n$2\r\nok\r\n")
    assert len(await long) == 20 * MIB
    assert await behind == b"ok"


async def test_a_reply_that_trickles_is_overdue() -> None:
    """A few bytes in each timeout do not keep a reply alive, and earlier replies do not count."""
    loop = ManualLoop()
    channel = RedisChannel(Mock(), TIMEOUT_S * 1000, loop)  # type: ignore[arg-type]
    first, second = channel.send("GET", "first"), channel.send("GET", "second")
    await asyncio.sleep(0)
    loop.advance(0.9 * TIMEOUT_S)
    channel.data_received(b"$%d\r\n%b\r\n$%d\r\n" % (MIB, bytes(MIB), MIB))
    assert len(await first) == MIB
    for _ in range(4):
        loop.advance(0.1 * TIMEOUT_S)
        channel.data_received(b"few")
    with pytest.raises(StoreUnavailable, match="did not answer within 1 s"):
        await second

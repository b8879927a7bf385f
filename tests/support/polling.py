"""Waiting for what will happen, instead of sleeping and hoping that it has."""

import asyncio
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.01
DEADLINE_S = 20.0


def wait_until(condition: Callable[[], object], deadline_s: float = DEADLINE_S, what: str = "the condition") -> None:
    """Return as soon as `condition` is true; fail when it still is not after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s} s in vain for {what}")
        time.sleep(POLL_S)


async def eventually(
    condition: Callable[[], Awaitable[object]], deadline_s: float = DEADLINE_S, what: str = "the condition"
) -> None:
    """Return as soon as `condition` is true; fail when it still is not after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not await condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s} s in vain for {what}")
        await asyncio.sleep(POLL_S)

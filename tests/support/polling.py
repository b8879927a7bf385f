"""Polling for a condition, instead of sleeping for a fixed time."""

import asyncio
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.01
DEADLINE_S = 60.0


def wait_until(condition: Callable[[], object], deadline_s: float = DEADLINE_S, what: str = "the condition") -> None:
    """Return as soon as `condition` is true; fail after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"timed out after {deadline_s} s waiting for {what}")
        time.sleep(POLL_S)


async def eventually(
    condition: Callable[[], Awaitable[object]], deadline_s: float = DEADLINE_S, what: str = "the condition"
) -> None:
    """Return as soon as `condition` is true; fail after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not await condition():
        if time.monotonic() > end:
            raise AssertionError(f"timed out after {deadline_s} s waiting for {what}")
        await asyncio.sleep(POLL_S)

"""Admission control: limits in-flight calls and rejects new ones during shutdown."""

import asyncio

from dedup_service.claims import ClaimError, Reason


class ServerStopping(ClaimError):
    """The server is shutting down; nothing was done."""

    reason = Reason.SERVER_STOPPING


class TooManyCalls(ClaimError):
    """The limit of in-flight calls is reached; nothing was done."""

    reason = Reason.TOO_MANY_CALLS


class Admission:
    """Admits calls until it is closed, at most `limit` at a time. Health checks are not counted."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_flight = 0
        self.rejected = 0
        """Calls that arrived after `close`."""
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """Count a call in; every success needs one `leave`. Raises ServerStopping and TooManyCalls."""
        if self._closed:
            self.rejected += 1
            raise ServerStopping("the server is shutting down: call another one, or try again")
        if self.in_flight >= self._limit:
            raise TooManyCalls(f"{self._limit} calls are in flight: try again, or call another server")
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Count a call out."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    def close(self) -> None:
        """Admit no more calls."""
        self._closed = True

    async def idle(self) -> None:
        """Return when no call is in flight."""
        await self._idle.wait()

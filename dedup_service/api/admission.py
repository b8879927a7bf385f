"""The door of the server: counts the calls under way, admits no more than it should, and closes before the server."""

import asyncio


class ServerStopping(Exception):
    """The server is draining and took this call no further than its door."""


class TooManyCalls(Exception):
    """As many calls as the server takes are under way; this one was taken no further than its door."""


class Admission:
    """Admits calls until it is closed, at most `limit` at a time. Health checks do not come through this door."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.under_way = 0
        """How many calls are inside."""
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """Count one call in, which needs its `leave`; raise ServerStopping or TooManyCalls."""
        if self._closed:
            raise ServerStopping("the server is shutting down: call another one, or try again")
        if self.under_way >= self._limit:
            raise TooManyCalls(f"{self._limit} calls are under way already: try again, or call another server")
        self.under_way += 1
        self._empty.clear()

    def leave(self) -> None:
        """Count one call out."""
        self.under_way -= 1
        if not self.under_way:
            self._empty.set()

    def close(self) -> None:
        """Admit no more calls."""
        self._closed = True

    async def emptied(self) -> None:
        """Return when no call is under way."""
        await self._empty.wait()

"""The door of the server: counts the calls under way, and closes before the server does."""

import asyncio


class ServerStopping(Exception):
    """The server is draining and took this call no further than its door."""


class Admission:
    """Admits calls until it is closed."""

    def __init__(self) -> None:
        self._under_way = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """Count one call in; raise ServerStopping when the door is closed. Every `enter` needs its `leave`."""
        if self._closed:
            raise ServerStopping("the server is shutting down: call another one, or try again")
        self._under_way += 1
        self._empty.clear()

    def leave(self) -> None:
        """Count one call out."""
        self._under_way -= 1
        if not self._under_way:
            self._empty.set()

    def close(self) -> None:
        """Admit no more calls."""
        self._closed = True

    async def emptied(self) -> None:
        """Return when no call is under way."""
        await self._empty.wait()

"""A server that performs the handshake of a Redis and then answers commands as a test says."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Self

INFO = b"# Server\r\nredis_version:7.0.15\r\nredis_mode:standalone\r\n"

# Called with the connection when its command has arrived.
Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]


def says(reply: bytes) -> Behaviour:
    """Return a behaviour that answers with these bytes."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        await writer.drain()

    return behave


def says_and_hangs_up(reply: bytes) -> Behaviour:
    """Return a behaviour that answers with these bytes, or none, and closes the connection."""

    async def behave(writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        writer.close()

    return behave


class ScriptedRedis:
    """Implements enough of the protocol for the service to connect, and counts the SETs.

    `behaviour` answers each SET; `others` answer further commands, by name.
    """

    def __init__(self, behaviour: Behaviour, **others: Behaviour) -> None:
        self._behaviour = behaviour
        self._others = {name.upper().encode(): other for name, other in others.items()}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.sets = 0
        self.connections = 0

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every connection."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def hang_up(self) -> None:
        """Close every open connection, and return when they are closed."""
        for writer in list(self._writers):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def refuse_connections(self) -> None:
        """Stop listening."""
        assert self._server is not None
        self._server.close()

    @property
    def url(self) -> str:
        """The URL of this server."""
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        try:
            while True:
                await self._answer(await self._command(reader), writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _command(self, reader: asyncio.StreamReader) -> list[bytes]:
        count = int((await reader.readuntil(b"\r\n"))[1:])
        parts = []
        for _ in range(count):
            size = int((await reader.readuntil(b"\r\n"))[1:])
            parts.append((await reader.readexactly(size + 2))[:-2])
        return parts

    async def _answer(self, command: list[bytes], writer: asyncio.StreamWriter) -> None:
        name = command[0].upper()
        if name in self._others:
            await self._others[name](writer)
            return
        match name:
            case b"INFO":
                writer.write(b"$%d\r\n%b\r\n" % (len(INFO), INFO))
            case b"TIME":
                writer.write(b"*2\r\n$10\r\n1700000000\r\n$1\r\n0\r\n")
            case b"SET":
                self.sets += 1
                await self._behaviour(writer)
            case _:
                writer.write(b"-ERR unknown command\r\n")

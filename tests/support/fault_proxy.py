"""A TCP proxy in front of a server that can drop replies, inject bytes and close connections."""

import asyncio
import contextlib
from typing import Self


class FaultProxy:
    """Forwards bytes both ways. Faults apply to the connections that are open now.

    New connections go to `upstream_port`, and are closed while nothing listens there.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.swallow_replies = False
        self.hold_replies = asyncio.Event()
        self.hold_replies.set()
        self.connections = 0
        self.sent_upstream = bytearray()
        self.bytes_downstream = 0

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every connection."""
        assert self._server is not None
        self._server.close()
        self.drop_connections()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """The Redis URL of the proxy."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        """The port of the proxy."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def drop_connections(self) -> None:
        """Reset every client connection."""
        for client in list(self._clients):
            client.transport.abort()

    def inject(self, stray: bytes) -> None:
        """Send bytes to every client as if they came from Redis."""
        for client in self._clients:
            client.write(stray)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.add(writer)
        ends = [writer]
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
            ends.append(upstream_writer)
            await asyncio.gather(self._upstream(reader, upstream_writer), self._downstream(upstream_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._clients.discard(writer)
            self._tasks.discard(task)
            for end in ends:
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.sent_upstream += data
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _downstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.bytes_downstream += len(data)
            await self.hold_replies.wait()
            if self.swallow_replies:
                writer.transport.abort()
                return
            writer.write(data)
            await writer.drain()
        writer.close()

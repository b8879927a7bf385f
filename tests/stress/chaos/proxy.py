"""A proxy between servers and Redis that randomly drops or delays traffic while a fault is set."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Self

PROXY_FAULTS = ("drop-commands", "drop-replies", "delay-commands", "delay-replies")

_DROP_CHANCE = 0.25
_LONGEST_DELAY_S = 0.3


class LossyProxy:
    """Forwards a free TCP port to the Unix socket of a Redis, which may restart."""

    def __init__(self, upstream: Path, rng: random.Random) -> None:
        self._upstream = upstream
        self._rng = rng
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.fault = ""
        """One of PROXY_FAULTS, or empty."""
        self.struck: Counter[str] = Counter()
        """How many chunks of bytes each fault affected."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def is_open(self) -> bool:
        """Whether the proxy has been started."""
        return self._server is not None

    @property
    def url(self) -> str:
        """The Redis URL of the proxy."""
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            upstream_reader, upstream_writer = await asyncio.open_unix_connection(str(self._upstream))
            ends.append(upstream_writer)
            pumps = [
                asyncio.create_task(self._pump("commands", reader, upstream_writer)),
                asyncio.create_task(self._pump("replies", upstream_reader, writer)),
            ]
            try:
                # When either direction ends, close the connection.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for end in ends:
                end.transport.abort()

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            fault = self.fault
            if fault == f"delay-{direction}":
                self.struck[fault] += 1
                await asyncio.sleep(self._rng.uniform(0, _LONGEST_DELAY_S))
            elif fault == f"drop-{direction}" and self._rng.random() < _DROP_CHANCE:
                self.struck[fault] += 1
                return
            writer.write(data)
            await writer.drain()

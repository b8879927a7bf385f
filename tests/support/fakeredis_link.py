"""fakeredis in place of a Redis link: fast, for cases that also run on a real Redis."""

import asyncio
from typing import Any

import fakeredis
import hiredis
from redis import exceptions

from dedup_service.stores.redis.link import FixedServer, RedisLink
from dedup_service.stores.redis.url import RedisTarget


class FakeredisLink(RedisLink):
    """A link and its channel in one, which runs each command on an in-process stand-in."""

    def __init__(self) -> None:
        super().__init__(FixedServer(RedisTarget()), timeout_ms=1_000)
        self._client = fakeredis.FakeAsyncRedis(protocol=2)
        self.channel: Any = self

    async def open(self) -> None:
        """Open nothing."""

    async def close(self) -> None:
        """Accept no more commands, like a closed link."""
        self.channel = None
        await super().close()
        await self._client.aclose()

    def send(self, *command: bytes | str | float, past_limit: bool = False) -> asyncio.Task[Any]:  # noqa: ARG002
        """Run one command and return its raw reply, errors included."""
        return asyncio.get_running_loop().create_task(self._run(command))

    async def _run(self, command: tuple[bytes | str | float, ...]) -> Any:
        connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_command(*command)
            return await connection.read_response(disable_decoding=True)
        except exceptions.ResponseError as error:
            return hiredis.ReplyError(str(error))
        finally:
            await self._client.connection_pool.release(connection)

"""Makes writes over one channel wait for replicas: `WAIT` follows them on the same connection.

Redis serves nothing else on a connection that waits, so writes go in rounds: while one round waits, the next gathers,
and one WAIT answers for all writes of its round.
"""

import asyncio
from typing import Any

import hiredis

from dedup_service.claims import Applied, StoreUnavailable
from dedup_service.stores.redis.channel import RedisChannel

Command = tuple[bytes | str | int, ...]


class ReplicaQuorum:
    """Sends commands over `channel` and counts the replicas that acknowledged them, for `wait_ms` at most."""

    def __init__(self, channel: RedisChannel, replicas: int, wait_ms: int) -> None:
        self._channel = channel
        self._replicas = replicas
        self._wait_ms = wait_ms
        self._gathered: list[tuple[Command, asyncio.Future[tuple[Any, Any]]]] = []
        self._rounds: asyncio.Task[None] | None = None

    async def send(self, *command: bytes | str | int) -> tuple[Any, Any]:
        """Return the reply to the command, and the reply to the WAIT after it: the number of replicas that have it.

        Raises StoreUnavailable as `RedisChannel.send` does, of which applied is UNKNOWN also when only the WAIT was
        not answered.
        """
        answer: asyncio.Future[tuple[Any, Any]] = asyncio.get_running_loop().create_future()
        self._gathered.append((command, answer))
        if self._rounds is None:
            self._rounds = asyncio.get_running_loop().create_task(self._send_rounds())
        return await answer

    async def _send_rounds(self) -> None:
        while self._gathered:
            # Whoever has gone meanwhile was told that nothing is known, which not sending it keeps true.
            together = [(command, answer) for command, answer in self._gathered if not answer.done()]
            self._gathered = []
            if together:
                await self._send_round(together)
        self._rounds = None

    async def _send_round(self, together: list[tuple[Command, asyncio.Future[tuple[Any, Any]]]]) -> None:
        # Without an await between them they leave in one write, in this order.
        replies = [self._channel.send(*command) for command, _ in together]
        waited = self._channel.send("WAIT", self._replicas, self._wait_ms)
        acknowledged, *results = await asyncio.gather(waited, *replies, return_exceptions=True)
        for (_, answer), result in zip(together, results, strict=True):
            if answer.done():
                continue
            if isinstance(result, StoreUnavailable):
                answer.set_exception(result)
            elif type(result) is hiredis.ReplyError:
                answer.set_result((result, 0))
            elif isinstance(acknowledged, StoreUnavailable):
                # The write was answered, so whatever became of the WAIT, it may have been kept.
                answer.set_exception(StoreUnavailable(acknowledged.reason, str(acknowledged), Applied.UNKNOWN))
            else:
                answer.set_result((result, acknowledged))

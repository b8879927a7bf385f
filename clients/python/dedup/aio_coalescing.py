"""Claims of one event loop that are made within a moment travel as one BatchClaimTransactions."""

import asyncio
from typing import cast

import grpc

from dedup.batches import ClaimAnswer, Crowd, answers_of, too_late
from dedup.error_details import failure_of_call
from dedup.errors import CallFailed
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

_Waiting = tuple[dedup_pb2.ClaimTransactionRequest, float, "asyncio.Future[ClaimAnswer]"]


class Coalescer:
    """Gathers claims for at most `delay_s` seconds or 1,000 of them, whichever comes first.

    It works below the retries: every attempt of every claim keeps its own token, time and error.
    """

    def __init__(self, stub: dedup_pb2_grpc.DedupServiceStub, delay_s: float) -> None:
        self._stub = stub
        self._delay_s = delay_s
        self._waiting: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._crowd = Crowd()
        self._under_way: set[asyncio.Task[None]] = set()

    async def claim(
        self, request: dedup_pb2.ClaimTransactionRequest, timeout_s: float
    ) -> dedup_pb2.ClaimTransactionResponse:
        """Make one attempt of a claim in a batch; raises CallFailed."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ClaimAnswer] = loop.create_future()
        self._waiting.append((request, timeout_s, future))
        if self._crowd.is_gathered(len(self._waiting)):
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(self._delay_s, self._send)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await future
        except TimeoutError:
            raise too_late(timeout_s) from None
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        # The loop keeps no hold on its tasks.
        task = asyncio.get_running_loop().create_task(self._ask(batch))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _ask(self, batch: list[_Waiting]) -> None:
        answers: list[ClaimAnswer]
        try:
            answers = answers_of(await self._reply(batch), len(batch))
        except grpc.RpcError as error:
            answers = [failure_of_call(error) for _ in batch]
        except asyncio.CancelledError:
            # The channel was closed. Its callers hear it as they would without a batch.
            for _, _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - Such as that of a closed channel: every caller hears it.
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, _, future), answer in zip(batch, answers, strict=True):
            # Who was cancelled or whose time was up no longer listens.
            if not future.done():
                future.set_result(answer)

    async def _reply(self, batch: list[_Waiting]) -> dedup_pb2.BatchClaimTransactionsResponse:
        request = dedup_pb2.BatchClaimTransactionsRequest(requests=[request for request, _, _ in batch])
        self._crowd.left(len(batch))
        try:
            call = self._stub.BatchClaimTransactions(request, timeout=max(timeout_s for _, timeout_s, _ in batch))
            return await cast("grpc.aio.UnaryUnaryCall[object, dedup_pb2.BatchClaimTransactionsResponse]", call)
        finally:
            self._crowd.answered(len(batch), len(self._waiting))

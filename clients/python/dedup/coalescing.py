"""Coalescing: concurrent claims of one client travel in one BatchClaimTransactions.

It works below the retries: every attempt keeps its own token, timeout and error.
"""

import asyncio
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeGuard, cast

import grpc
from google.protobuf.message import Message

from dedup.batches import MAX_BATCH, ClaimAnswer, answers_of
from dedup.error_details import failure_of_call, failure_of_closed_client
from dedup.errors import CallFailed, Unavailable
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

_Waiting = tuple[dedup_pb2.ClaimTransactionRequest, float, "Future[ClaimAnswer]"]
_AsyncWaiting = tuple[dedup_pb2.ClaimTransactionRequest, float, "asyncio.Future[ClaimAnswer]"]


def may_coalesce(request: Message) -> TypeGuard[dedup_pb2.ClaimTransactionRequest]:
    """Return whether a request may travel in a batch: `wait` would delay the other claims."""
    return isinstance(request, dedup_pb2.ClaimTransactionRequest) and not request.HasField("wait")


class Crowd:
    """Decides when a batch may leave before its delay has passed.

    Callers answered together mostly claim again together. So a batch leaves once no other is in flight and as many
    claims wait as at the last answer.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._claims = 0
        self._expected = MAX_BATCH

    def is_gathered(self, waiting: int) -> bool:
        """Return whether a batch of `waiting` claims should leave now."""
        return waiting >= MAX_BATCH or (not self._batches and waiting >= self._expected)

    def left(self, claims: int) -> None:
        """Record that a batch has left."""
        self._batches += 1
        self._claims += claims

    def answered(self, claims: int, waiting: int) -> None:
        """Record the answer to a batch while `waiting` other claims wait."""
        self._expected = self._claims + waiting
        self._batches -= 1
        self._claims -= claims


class Coalescer:
    """Gathers up to 1,000 claims of several threads for at most `delay_s` seconds.

    The first thread of a batch sends it, so the client needs no thread of its own.
    """

    def __init__(self, stub: dedup_pb2_grpc.DedupServiceStub, delay_s: float) -> None:
        self._stub = stub
        self._delay_s = delay_s
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._crowd = Crowd()

    def claim(self, request: dedup_pb2.ClaimTransactionRequest, timeout_s: float) -> dedup_pb2.ClaimTransactionResponse:
        """Make one attempt of a claim in a batch. Raises CallFailed."""
        end = time.monotonic() + timeout_s
        future: Future[ClaimAnswer] = Future()
        with self._changed:
            # The thread that fills or sends a batch replaces `_waiting`.
            batch = self._waiting
            batch.append((request, timeout_s, future))
            leads = len(batch) == 1
            if self._crowd.is_gathered(len(batch)):
                self._leave(batch)
                self._changed.notify_all()
        if leads:
            try:
                self._gather(batch, min(self._delay_s, timeout_s))
            finally:
                # Also if this thread is interrupted: others depend on the batch.
                self._ask(batch)
        try:
            answer = future.result(max(0.0, end - time.monotonic()))
        except FutureTimeoutError:
            raise _timed_out(timeout_s) from None
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    def _gather(self, batch: list[_Waiting], delay_s: float) -> None:
        """Wait until the batch is full or its delay has passed, and close it."""
        with self._changed:
            try:
                self._changed.wait_for(lambda: self._waiting is not batch, delay_s)
            finally:
                if self._waiting is batch:
                    self._leave(batch)

    def _leave(self, batch: list[_Waiting]) -> None:
        self._waiting = []
        self._crowd.left(len(batch))

    def _ask(self, batch: list[_Waiting]) -> None:
        request = dedup_pb2.BatchClaimTransactionsRequest(requests=[request for request, _, _ in batch])
        timeout_s = max(timeout_s for _, timeout_s, _ in batch)
        try:
            call = self._stub.BatchClaimTransactions.future(request, timeout=timeout_s)
        except Exception as error:  # noqa: BLE001 - For example a closed channel: every caller must receive the error.
            self._end(batch)
            for _, _, future in batch:
                future.set_exception(error)
            return
        call.add_done_callback(lambda done: self._tell(batch, done))

    def _tell(self, batch: list[_Waiting], call: object) -> None:
        self._end(batch)
        for (_, _, future), answer in zip(batch, _answers(call, len(batch)), strict=True):
            future.set_result(answer)

    def _end(self, batch: list[_Waiting]) -> None:
        with self._changed:
            self._crowd.answered(len(batch), len(self._waiting))


class AsyncCoalescer:
    """Gathers up to 1,000 claims of one event loop for at most `delay_s` seconds."""

    def __init__(self, stub: dedup_pb2_grpc.DedupServiceStub, delay_s: float) -> None:
        self._stub = stub
        self._delay_s = delay_s
        self._waiting: list[_AsyncWaiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._crowd = Crowd()
        self._tasks: set[asyncio.Task[None]] = set()

    async def claim(
        self, request: dedup_pb2.ClaimTransactionRequest, timeout_s: float
    ) -> dedup_pb2.ClaimTransactionResponse:
        """Make one attempt of a claim in a batch. Raises CallFailed."""
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
            raise _timed_out(timeout_s) from None
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        # The event loop's references to tasks are weak.
        task = asyncio.get_running_loop().create_task(self._ask(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, batch: list[_AsyncWaiting]) -> None:
        answers: list[ClaimAnswer]
        try:
            answers = answers_of(await self._reply(batch), len(batch))
        except grpc.RpcError as error:
            answers = [failure_of_call(error) for _ in batch]
        except asyncio.CancelledError:
            # The channel was closed: cancel the callers, as gRPC does.
            for _, _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - For example a closed channel: every caller must receive the error.
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, _, future), answer in zip(batch, answers, strict=True):
            # The caller may be cancelled or timed out.
            if not future.done():
                future.set_result(answer)

    async def _reply(self, batch: list[_AsyncWaiting]) -> dedup_pb2.BatchClaimTransactionsResponse:
        request = dedup_pb2.BatchClaimTransactionsRequest(requests=[request for request, _, _ in batch])
        self._crowd.left(len(batch))
        try:
            call = self._stub.BatchClaimTransactions(request, timeout=max(timeout_s for _, timeout_s, _ in batch))
            return await cast("grpc.aio.UnaryUnaryCall[object, dedup_pb2.BatchClaimTransactionsResponse]", call)
        finally:
            self._crowd.answered(len(batch), len(self._waiting))


def _answers(call: object, claims: int) -> list[ClaimAnswer]:
    try:
        reply = cast("grpc.Future[dedup_pb2.BatchClaimTransactionsResponse]", call).result()
        return answers_of(reply, claims)
    except grpc.RpcError as error:
        return [failure_of_call(error) for _ in range(claims)]
    except grpc.FutureCancelledError:
        return [failure_of_closed_client() for _ in range(claims)]


def _timed_out(timeout_s: float) -> Unavailable:
    """Return the exception for a claim whose timeout ends before its batch is answered."""
    return Unavailable(f"no answer to the batch within {timeout_s:.3f} s", code=grpc.StatusCode.DEADLINE_EXCEEDED)

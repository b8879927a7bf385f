"""Claims of several threads that are made within a moment travel as one BatchClaimTransactions."""

import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import cast

import grpc

from dedup.batches import ClaimAnswer, Crowd, answers_of, too_late
from dedup.error_details import failure_of_call
from dedup.errors import CallFailed
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

_Waiting = tuple[dedup_pb2.ClaimTransactionRequest, float, "Future[ClaimAnswer]"]


class Coalescer:
    """Gathers claims for at most `delay_s` seconds or 1,000 of them, whichever comes first.

    It works below the retries: every attempt of every claim keeps its own token, time and error. The first thread of
    a batch keeps the time and sends it, so there is no thread of the client's own.
    """

    def __init__(self, stub: dedup_pb2_grpc.DedupServiceStub, delay_s: float) -> None:
        self._stub = stub
        self._delay_s = delay_s
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._crowd = Crowd()

    def claim(self, request: dedup_pb2.ClaimTransactionRequest, timeout_s: float) -> dedup_pb2.ClaimTransactionResponse:
        """Make one attempt of a claim in a batch; raises CallFailed."""
        end = time.monotonic() + timeout_s
        future: Future[ClaimAnswer] = Future()
        with self._changed:
            # The batch that this claim is in: whoever fills or sends it puts another list in its place.
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
                # Also when this thread was interrupted: the others of its batch count on it.
                self._ask(batch)
        try:
            answer = future.result(max(0.0, end - time.monotonic()))
        except FutureTimeoutError:
            raise too_late(timeout_s) from None
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    def _gather(self, batch: list[_Waiting], delay_s: float) -> None:
        """Return when the batch is full or its time is up, and let nobody join it any more."""
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
        except Exception as error:  # noqa: BLE001 - Such as that of a closed channel: every caller hears it.
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


def _answers(call: object, claims: int) -> list[ClaimAnswer]:
    try:
        reply = cast("grpc.Future[dedup_pb2.BatchClaimTransactionsResponse]", call).result()
        return answers_of(reply, claims)
    except grpc.RpcError as error:
        return [failure_of_call(error) for _ in range(claims)]
    except grpc.FutureCancelledError:
        return [CallFailed("CANCELLED: the client was closed", code=grpc.StatusCode.CANCELLED) for _ in range(claims)]

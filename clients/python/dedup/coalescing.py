"""Coalescing: concurrent claims of one client travel in one BatchClaimTransactions.

It works below the retries: every attempt keeps its own token, deadline and error.
"""

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import cast

import grpc
from google.protobuf.message import Message

from dedup.batches import ClaimAnswer, answers_of
from dedup.channels import current_metadata
from dedup.error_details import failure_of_call, failure_of_closed_client
from dedup.errors import CallFailed, mark_unsent
from dedup.gathering import BATCH_TIMEOUT_SHARE, MAX_CLAIM_BYTES, MAX_DELAY_S, GatheredCall, Gathering
from dedup.retries import Send
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

_OUTAGES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


@dataclass(frozen=True, slots=True)
class _Again:
    """The batch failed: send the claim alone."""

    failure: CallFailed


def may_gather(step: Send, batch_timeout_s: float) -> bool:
    """Return whether nothing about a claim is lost in a batch, and nothing of it harms the others."""
    request = step.request
    return (
        isinstance(request, dedup_pb2.ClaimTransactionRequest)
        and not step.again
        and step.timeout_s >= batch_timeout_s
        and not request.HasField("wait")
        and not current_metadata()
        and not _in_sampled_span()
        and request.ByteSize() <= MAX_CLAIM_BYTES
    )


def _in_sampled_span() -> bool:
    # Instrumentation of gRPC continues the trace of the current span, and a batch has no caller's context.
    trace = sys.modules.get("opentelemetry.trace")
    return trace is not None and bool(trace.get_current_span().get_span_context().trace_flags.sampled)


@dataclass(slots=True, eq=False)
class _Entry:
    """A claim of a thread."""

    step: Send
    end: float
    call: "GatheredCall[_Entry] | None" = None
    """The call it left in."""
    answer: "Future[ClaimAnswer | _Again | None]" = field(default_factory=Future)
    """None: send the claim alone, in its call."""


class Coalescer:
    """Gathers the claims of several threads. It needs no thread of its own: the first claim that waits limits the wait.

    `alone` makes one attempt of a claim in a call of its own.
    """

    def __init__(
        self, stub: dedup_pb2_grpc.DedupServiceStub, attempt_timeout_s: float, alone: Callable[[Send], Message]
    ) -> None:
        self._stub = stub
        self._alone = alone
        self._batch_timeout_s = attempt_timeout_s * BATCH_TIMEOUT_SHARE
        self._delay_s = MAX_DELAY_S
        self._lock = threading.Lock()
        self._gathering: Gathering[_Entry] = Gathering()

    def send(self, step: Send) -> Message:
        """Make one attempt of a call, in a batch if it may be. Raises CallFailed."""
        if not may_gather(step, self._batch_timeout_s):
            return self._alone(step)
        now = time.monotonic()
        entry = _Entry(step, now + step.timeout_s)
        with self._lock:
            admitted = self._gathering.admits(now)
            call = self._taken(self._gathering.add(entry) or self._gathering.settle()) if admitted else None
            leads = self._gathering.waiting[:1] == [entry]
        if not admitted:
            return self._alone(step)
        try:
            self._start(call)
            answer = self._answer(entry, leads=leads)
        except BaseException as error:
            if self._abandon(entry):
                mark_unsent(error)
            raise
        if answer is None:
            assert entry.call is not None  # noqa: S101 - It was sent.
            try:
                return self._alone(_rest(entry))
            finally:
                self._end(entry.call)
        if isinstance(answer, _Again):
            try:
                return self._alone(_rest(entry))
            except CallFailed as failure:
                raise _doubted(answer, failure) from failure.__cause__
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    def _answer(self, entry: _Entry, *, leads: bool) -> ClaimAnswer | _Again | None:
        if leads:
            try:
                return entry.answer.result(self._delay_s)
            except TimeoutError:
                self._expire(entry)
        # The deadline of its batch limits the wait.
        return entry.answer.result()

    def _expire(self, entry: _Entry) -> None:
        with self._lock:
            call = None
            if entry in self._gathering.waiting:
                call = self._taken(self._gathering.expired())
        self._start(call)

    def _abandon(self, entry: _Entry) -> bool:
        """Forget the claim of an interrupted thread, and return whether it was not sent.

        The others must not depend on the thread.
        """
        with self._lock:
            call = entry.call
            following = None
            if entry in self._gathering.waiting:
                self._gathering.waiting.remove(entry)
                following = self._taken(self._gathering.expired())
        self._start(following)
        if call is not None and len(call.claims) == 1:
            self._end(call)
        return call is None

    def _end(self, call: GatheredCall[_Entry], *, failed: bool = False) -> None:
        with self._lock:
            following = self._taken(self._gathering.ended(call, time.monotonic(), failed=failed))
        self._start(following)

    def _taken(self, call: GatheredCall[_Entry] | None) -> GatheredCall[_Entry] | None:
        """Note in the claims of a call that they have left. The lock is held."""
        if call is not None:
            for entry in call.claims:
                entry.call = call
        return call

    def _start(self, call: GatheredCall[_Entry] | None) -> None:
        if call is None:
            return
        if len(call.claims) == 1:
            call.claims[0].answer.set_result(None)
            return
        request = dedup_pb2.BatchClaimTransactionsRequest(requests=[_claim(entry.step) for entry in call.claims])
        left_s = min(entry.end for entry in call.claims) - time.monotonic()
        try:
            # Without the context of the caller that happens to send it.
            sent = contextvars.Context().run(
                self._stub.BatchClaimTransactions.future, request, timeout=min(self._batch_timeout_s, left_s)
            )
        except Exception as error:  # noqa: BLE001 - For example a closed channel: every caller must receive the error.
            self._end(call)
            for entry in call.claims:
                entry.answer.set_exception(error)
            return
        sent.add_done_callback(lambda done: self._tell(call, done))

    def _tell(self, call: GatheredCall[_Entry], done: object) -> None:
        answers = _answers(done, len(call.claims))
        self._end(call, failed=isinstance(answers[0], _Again))
        for entry, answer in zip(call.claims, answers, strict=True):
            entry.answer.set_result(answer)


@dataclass(slots=True, eq=False)
class _AsyncEntry:
    """A claim of a task."""

    step: Send
    end: float
    answer: "asyncio.Future[ClaimAnswer | _Again | None]"
    """None: send the claim alone, in its call."""
    call: "GatheredCall[_AsyncEntry] | None" = None
    batch: "asyncio.Task[None] | None" = None


class AsyncCoalescer:
    """Gathers the claims of one event loop. `alone` makes one attempt of a claim in a call of its own."""

    def __init__(
        self,
        stub: dedup_pb2_grpc.DedupServiceStub,
        attempt_timeout_s: float,
        alone: Callable[[Send], Awaitable[Message]],
    ) -> None:
        self._stub = stub
        self._alone = alone
        self._batch_timeout_s = attempt_timeout_s * BATCH_TIMEOUT_SHARE
        self._delay_s = MAX_DELAY_S
        self._gathering: Gathering[_AsyncEntry] = Gathering()
        self._timer: asyncio.TimerHandle | None = None
        self._settling = False
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    async def send(self, step: Send) -> Message:
        """Make one attempt of a call, in a batch if it may be. Raises CallFailed."""
        now = time.monotonic()
        if not may_gather(step, self._batch_timeout_s) or not self._gathering.admits(now):
            return await self._alone(step)
        entry = _AsyncEntry(step, now + step.timeout_s, self._loop.create_future())
        self._add(entry)
        try:
            answer = None if entry.call is not None and len(entry.call.claims) == 1 else await entry.answer
        except asyncio.CancelledError as error:
            if entry.call is None:
                mark_unsent(error)
            self._leave(entry)
            raise
        if answer is None:
            assert entry.call is not None  # noqa: S101 - It was sent.
            try:
                return await self._alone(_rest(entry))
            finally:
                self._end(entry.call)
        if isinstance(answer, _Again):
            try:
                return await self._alone(_rest(entry))
            except CallFailed as failure:
                raise _doubted(answer, failure) from failure.__cause__
        if isinstance(answer, CallFailed):
            raise answer
        return answer

    def _add(self, entry: _AsyncEntry) -> None:
        call = self._gathering.add(entry)
        if call is None and not self._gathering.crowded:
            if self._gathering.together:
                # Callers answered together mostly claim again in the same turn of the loop.
                if not self._settling:
                    self._settling = True
                    self._loop.call_soon(self._settle)
                return
            call = self._gathering.settle()
        self._start(call)

    def _settle(self) -> None:
        self._settling = False
        self._start(self._gathering.settle())

    def _expire(self) -> None:
        self._timer = None
        self._start(self._gathering.expired())

    def _end(self, call: GatheredCall[_AsyncEntry], *, failed: bool = False) -> None:
        self._start(self._gathering.ended(call, time.monotonic(), failed=failed))

    def _leave(self, entry: _AsyncEntry) -> None:
        """Forget the claim of a cancelled caller. One that has left already may be made."""
        if entry.call is None:
            self._gathering.waiting.remove(entry)
            self._start(None)
        elif entry.batch is None:
            self._end(entry.call)
        elif all(one.answer.done() for one in entry.call.claims):
            entry.batch.cancel()

    def _start(self, call: GatheredCall[_AsyncEntry] | None) -> None:
        """Make a call, and limit the wait of the claims left."""
        if call is not None:
            for entry in call.claims:
                entry.call = call
            if len(call.claims) == 1:
                if not call.claims[0].answer.done():
                    call.claims[0].answer.set_result(None)
            else:
                # In a context without that of the caller that happens to send it.
                task = self._loop.create_task(self._ask(call), context=contextvars.Context())
                # The event loop's references to tasks are weak.
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                for entry in call.claims:
                    entry.batch = task
        if not self._gathering.waiting:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = self._loop.call_later(self._delay_s, self._expire)

    async def _ask(self, call: GatheredCall[_AsyncEntry]) -> None:
        entries = call.claims
        request = dedup_pb2.BatchClaimTransactionsRequest(requests=[_claim(entry.step) for entry in entries])
        left_s = min(entry.end for entry in entries) - time.monotonic()
        answers: Sequence[ClaimAnswer | _Again]
        try:
            sent = self._stub.BatchClaimTransactions(request, timeout=min(self._batch_timeout_s, left_s))
            reply = await cast("grpc.aio.UnaryUnaryCall[object, dedup_pb2.BatchClaimTransactionsResponse]", sent)
            answers = _matched(reply, len(entries))
        except grpc.RpcError as error:
            answers = _failures([failure_of_call(error) for _ in entries])
        except asyncio.CancelledError:
            # The channel was closed, or every caller was cancelled.
            self._end(call)
            for entry in entries:
                entry.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - For example a closed channel: every caller must receive the error.
            self._end(call)
            for entry in entries:
                if not entry.answer.done():
                    entry.answer.set_exception(error)
            return
        self._end(call, failed=isinstance(answers[0], _Again))
        for entry, answer in zip(entries, answers, strict=True):
            # The caller may be cancelled.
            if not entry.answer.done():
                entry.answer.set_result(answer)


def _claim(step: Send) -> dedup_pb2.ClaimTransactionRequest:
    return cast("dedup_pb2.ClaimTransactionRequest", step.request)


def _rest(entry: _Entry | _AsyncEntry) -> Send:
    """Return the rest of an attempt."""
    return replace(entry.step, timeout_s=max(0.0, entry.end - time.monotonic()))


def _answers(done: object, claims: int) -> Sequence[ClaimAnswer | _Again]:
    try:
        return _matched(cast("grpc.Future[dedup_pb2.BatchClaimTransactionsResponse]", done).result(), claims)
    except grpc.RpcError as error:
        return _failures([failure_of_call(error) for _ in range(claims)])
    except grpc.FutureCancelledError:
        return [failure_of_closed_client() for _ in range(claims)]


def _matched(reply: dedup_pb2.BatchClaimTransactionsResponse, claims: int) -> Sequence[ClaimAnswer | _Again]:
    answers = answers_of(reply, claims)
    if len(reply.entries) != claims:
        return _failures([answer for answer in answers if isinstance(answer, CallFailed)])
    return answers


def _failures(failures: Sequence[CallFailed]) -> Sequence[CallFailed | _Again]:
    """Return the answers to the claims of a failed batch, with one failure for each."""
    # Single claims would fail as well: each is repeated by the rules of retries.
    if failures[0].code in _OUTAGES or failures[0].retry_after_s is not None:
        return failures
    return [_Again(failure) for failure in failures]


def _doubted(batch: _Again, failure: CallFailed) -> CallFailed:
    """Return the failure of a claim whose batch failed before: the batch may have made it."""
    if batch.failure.applied != "no":
        failure.applied = "unknown"
    return failure

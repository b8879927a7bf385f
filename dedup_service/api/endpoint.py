"""The one wrapper around every rpc: decode, call, answer or refuse, and write the log line. Nothing escapes it."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Generic, NoReturn, cast

import grpc
from google.protobuf.message import Message

from dedup_service.claims import Applied, present_caller
from dedup_service.api.admission import Admission
from dedup_service.api.authorization import CallerGate
from dedup_service.api.decoding import RequestT, decode_request
from dedup_service.api.errors import DeadlinePassed, DeadlineTooNear, failure_of, new_incident
from dedup_service.observability.call_log import CallLog, CallRecord
from dedup_service.observability.correlation import CORRELATION_HEADER, correlation_id

if TYPE_CHECKING:
    # Who does not ask for metrics or traces does not load their library.
    from dedup_service.observability.metrics import CallMetrics
    from dedup_service.observability.traces import CallSpan, CallTraces

# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: binary metadata that carries google.rpc.Status.
STATUS_DETAILS_KEY = "grpc-status-details-bin"

# A caller whose deadline has passed by its own clock cancels; by ours it may be about to pass.
_CLOCK_TOLERANCE_S = 0.05

# What the native engine says of a call without a deadline, where grpc.aio says None.
_NO_DEADLINE_S = float(sys.maxsize)

Context = grpc.aio.ServicerContext[bytes, bytes]

# What of the caller's time is kept for the way back: an error that says what it knows beats gRPC's own, which does not.
ANSWER_MARGIN_S = 0.01

# The request, and for how many seconds the caller will wait: None without a deadline.
Handler = Callable[[RequestT, float | None], Awaitable[Message]]


class Endpoint(Generic[RequestT]):
    """One rpc as gRPC calls it: bytes in, bytes out.

    Whatever the handler raises becomes the status that the error table says, with its details in the trailing metadata;
    the text of an unexpected exception goes to the log only. Every call that fails gets one log line, a cancelled one
    as well, and so does whichever success the log takes; a call with a line has its correlation id in the trailing
    metadata. A call is answered before its deadline, if with doubt: what its handler asked of the store then runs to
    the store's own time-out.
    """

    def __init__(
        self,
        *,
        method: str,
        request_type: type[RequestT],
        handler: Handler[RequestT],
        outcome_of: Callable[[Message], str],
        call_log: CallLog,
        admission: Admission,
        metrics: "CallMetrics | None" = None,
        gate: CallerGate | None = None,
        traces: "CallTraces | None" = None,
        may_change: bool = True,
    ) -> None:
        self._method = method
        self._request_type = request_type
        self._handler = handler
        self._outcome_of = outcome_of
        self._call_log = call_log
        self._admission = admission
        self._metrics = metrics
        self._gate = gate
        self._traces = traces
        self._may_change = may_change

    async def serve(self, raw: bytes, context: Context) -> bytes:
        """Serve one call; a bound coroutine method is what gRPC recognises as asynchronous."""
        begun = time.perf_counter()
        request = span = None
        if self._metrics is not None:
            self._metrics.started()
        try:
            if self._traces is not None:
                span = self._traces.begin(context.invocation_metadata() or ())
            self._admission.enter()
            try:
                if self._gate is not None:
                    self._gate.admit(self._method, context)
                request = decode_request(self._request_type, raw)
                remaining = _time_remaining(context)
                if remaining is None:
                    reply = await self._handler(request, None)
                else:
                    reply = await self._handle_in_time(request, remaining)
            finally:
                self._admission.leave()
            answer = reply.SerializeToString()
        except asyncio.CancelledError:
            record = self._record(begun, request, context, span)
            remaining = _time_remaining(context)
            late = remaining is not None and remaining < _CLOCK_TOLERANCE_S
            record.code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
            self._end(record)
            raise
        except Exception as error:  # noqa: BLE001 - the outermost guard: gRPC would send the exception's text
            await self._refuse(error, self._record(begun, request, context, span), context)
        duration = time.perf_counter() - begun
        if self._metrics is not None:
            self._metrics.handled("OK", duration)
        if span is not None:
            span.end("OK", namespace=_namespace(request), outcome=self._outcome_of(reply))
        if self._call_log.takes_success(duration):
            record = self._record(begun, request, context, span)
            record.outcome = self._outcome_of(reply)
            context.set_trailing_metadata(((CORRELATION_HEADER, record.correlation_id),))
            self._call_log.write(record)
        return answer

    def _end(self, record: CallRecord) -> None:
        if record.span is not None:
            what = {"reason": record.reason, "applied": record.applied, "incident": record.incident}
            record.span.end(record.code, namespace=record.namespace, **what)
        self._call_log.write(record)
        if self._metrics is not None:
            self._metrics.handled(record.code, record.duration)

    def _record(self, begun: float, request: RequestT | None, context: Context, span: "CallSpan | None") -> CallRecord:
        # Made at the end and for a line alone: reading the metadata costs as much as deciding a claim.
        duration = time.perf_counter() - begun
        caller = present_caller.get()
        return CallRecord(
            self._method,
            correlation_id(context.invocation_metadata() or ()),
            time.time() - duration,
            duration,
            transaction_id=getattr(request, "transaction_id", ""),
            caller="" if caller is None else caller.name,
            namespace=_namespace(request),
            span=span,
        )

    async def _handle_in_time(self, request: RequestT, remaining: float) -> Message:
        budget = remaining - ANSWER_MARGIN_S
        if budget <= 0:
            raise DeadlineTooNear("the deadline is too near to ask the store: nothing was done, allow more time")
        try:
            async with asyncio.timeout(budget):
                return await self._handler(request, budget)
        except TimeoutError:
            applied = Applied.UNKNOWN if self._may_change else Applied.NO
            raise DeadlinePassed("the store did not answer before the deadline", applied) from None

    async def _refuse(self, error: Exception, record: CallRecord, context: Context) -> NoReturn:
        incident = new_incident()
        failure = failure_of(error, incident)
        record.code = failure.code.name
        record.reason = failure.reason
        record.applied = failure.applied.value
        if self._metrics is not None and failure.applied is Applied.UNKNOWN:
            self._metrics.doubted(failure.reason)
        if failure.code is grpc.StatusCode.INTERNAL:
            record.incident = incident
            record.exception = error
        self._end(record)
        details = (STATUS_DETAILS_KEY, failure.status().SerializeToString())
        await context.abort(failure.code, failure.message, ((CORRELATION_HEADER, record.correlation_id), details))


def _namespace(request: Message | None) -> str | None:
    # A batch has one for each of its claims.
    return getattr(request, "namespace", None)


def _time_remaining(context: Context) -> float | None:
    # The type stubs do not know that a call may have no deadline.
    remaining = cast("float | None", context.time_remaining())
    return None if remaining is None or remaining >= _NO_DEADLINE_S else remaining

"""The endpoint around every rpc: admit, decode, call the handler, answer or reject. Nothing escapes it."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Generic, NoReturn, cast

import grpc
from google.protobuf.message import Message

from dedup_service.api.authorization import Authorization
from dedup_service.api.decoding import RequestT, decode_request
from dedup_service.api.errors import DeadlinePassed, DeadlineTooNear, ServerStopping, TooManyCalls, error_reply
from dedup_service.claims import Applied, FieldViolation, InvalidRequest
from dedup_service.observability.calls import CORRELATION_HEADER, Call, CallObserver

# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: binary metadata that carries google.rpc.Status.
STATUS_DETAILS_KEY = "grpc-status-details-bin"

# A caller whose deadline has passed by its own clock cancels; by ours it may be about to pass.
_CLOCK_TOLERANCE_S = 0.05

# The native engine's value for a call without a deadline, where grpc.aio returns None.
_NO_DEADLINE_S = float(sys.maxsize)

Context = grpc.aio.ServicerContext[bytes, bytes]

# An honest request has about 1 kB, apart from a result or a batch. Parsing 1 MiB of tiny fields takes 10 ms.
MAX_REQUEST_BYTES = 64 * 1024

# Part of the caller's time that is kept for the reply: an error with its details beats gRPC's own.
ANSWER_MARGIN_S = 0.01

# The request, the call to fill in, and the seconds until the caller's deadline; None without one.
Handler = Callable[[RequestT, Call, float | None], Awaitable[Message]]


class Admission:
    """Admits calls until it is closed. Health checks are not counted.

    Calls of holders (complete, release and extend) have a limit of their own, of the same size: other calls must not
    lock out the holder whose work they are about. Claims that wait, `waiting` in number, are limited where they wait.
    """

    def __init__(self, limit: int, waiting: Callable[[], int] = lambda: 0) -> None:
        self._limit = limit
        self._waiting = waiting
        self._holders = 0
        self._others = 0
        self.rejected = 0
        """Calls that arrived after `close`."""
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """The calls in flight, without those that wait."""
        return self._holders + self._others - self._waiting()

    def enter(self, *, holder: bool = False) -> None:
        """Count a call in; every success needs one `leave`. Raises ServerStopping and TooManyCalls."""
        if self._closed:
            self.rejected += 1
            raise ServerStopping("the server is shutting down: call another one, or try again")
        if holder:
            if self._holders >= self._limit:
                raise TooManyCalls(f"{self._limit} calls of holders are in flight: try again, or call another server")
            self._holders += 1
        else:
            if self._others - self._waiting() >= self._limit:
                raise TooManyCalls(f"{self._limit} calls are in flight: try again, or call another server")
            self._others += 1
        self._idle.clear()

    def leave(self, *, holder: bool = False) -> None:
        """Count a call out."""
        if holder:
            self._holders -= 1
        else:
            self._others -= 1
        if not self._holders and not self._others:
            self._idle.set()

    def close(self) -> None:
        """Admit no more calls."""
        self._closed = True

    async def idle(self) -> None:
        """Return when no call is in flight."""
        await self._idle.wait()


class Endpoint(Generic[RequestT]):
    """One rpc as gRPC calls it: bytes in, bytes out.

    An exception of the handler becomes the status of the error table, with its details in the trailing metadata. A call
    that is logged has its correlation id there, too. A call is answered before its deadline, with doubt if need be; the
    store's own timeout then ends what the handler asked of it.
    """

    def __init__(
        self,
        *,
        method: str,
        request_type: type[RequestT],
        handler: Handler[RequestT],
        observer: CallObserver,
        admission: Admission,
        authorization: Authorization | None = None,
        may_change: bool = True,
        holder: bool = False,
        max_bytes: int = MAX_REQUEST_BYTES,
        large_field: str = "request",
    ) -> None:
        self._method = method
        self._request_type = request_type
        self._handler = handler
        self._observer = observer
        self._admission = admission
        self._authorization = authorization
        self._may_change = may_change
        self._holder = holder
        self._max_bytes = max_bytes
        self._large_field = large_field

    async def serve(self, raw: bytes, context: Context) -> bytes:
        """Serve one call. gRPC recognises a bound coroutine method as asynchronous."""
        call = Call(self._method, context.invocation_metadata)
        try:
            self._observer.started(call)
            self._admission.enter(holder=self._holder)
            try:
                if self._authorization is not None:
                    call.caller = self._authorization.identify(context)
                    self._authorization.check(call.caller, self._method)
                self._check_size(raw)
                request = await decode_request(self._request_type, raw)
                remaining = _time_remaining(context)
                if remaining is None:
                    reply = await self._handler(request, call, None)
                else:
                    reply = await self._handle_in_time(request, call, remaining)
            finally:
                self._admission.leave(holder=self._holder)
            answer = reply.SerializeToString()
        except asyncio.CancelledError:
            remaining = _time_remaining(context)
            late = remaining is not None and remaining < _CLOCK_TOLERANCE_S
            call.end("DEADLINE_EXCEEDED" if late else "CANCELLED")
            self._observer.finished(call)
            raise
        except Exception as error:  # noqa: BLE001 - the outermost guard: gRPC would send the exception's text
            await self._reject(error, call, context)
        call.end("OK")
        self._observer.finished(call)
        if call.logged:
            context.set_trailing_metadata(((CORRELATION_HEADER, call.correlation_id),))
        return answer

    def _check_size(self, raw: bytes) -> None:
        if len(raw) > self._max_bytes:
            limit = f"{self._max_bytes} bytes are allowed for {self._method}"
            fault = f"the request has {len(raw)} bytes, at most {limit}: send less"
            raise InvalidRequest(FieldViolation(self._large_field, fault))

    async def _handle_in_time(self, request: RequestT, call: Call, remaining: float) -> Message:
        budget = remaining - ANSWER_MARGIN_S
        if budget <= 0:
            raise DeadlineTooNear("the deadline is too near to ask the store: nothing was done, allow more time")
        try:
            async with asyncio.timeout(budget) as limit:
                return await self._handler(request, call, budget)
        except TimeoutError:
            if not limit.expired():
                raise
            applied = Applied.UNKNOWN if self._may_change else Applied.NO
            raise DeadlinePassed("the store did not answer before the deadline", applied) from None

    async def _reject(self, error: Exception, call: Call, context: Context) -> NoReturn:
        reply = error_reply(error)
        call.failure = reply.failure
        call.outcome = ""
        call.end(reply.code.name)
        self._observer.finished(call)
        details = (STATUS_DETAILS_KEY, reply.status().SerializeToString())
        await context.abort(reply.code, reply.message, ((CORRELATION_HEADER, call.correlation_id), details))


def _time_remaining(context: Context) -> float | None:
    # The type stubs do not know that a call may have no deadline.
    remaining = cast("float | None", context.time_remaining())
    return None if remaining is None or remaining >= _NO_DEADLINE_S else remaining

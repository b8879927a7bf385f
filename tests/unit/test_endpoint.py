"""The endpoint around a handler: error table, deadlines, cancellation, admission and correlation ids."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from dedup.v1 import dedup_pb2
from dedup_service.api.authorization import Authorization
from dedup_service.api.endpoint import ANSWER_MARGIN_S, STATUS_DETAILS_KEY, Admission, Context, Endpoint
from dedup_service.api.errors import (
    ERROR_DOMAIN,
    RETRY_AFTER_MS,
    TABLE,
    DeadlinePassed,
    DeadlineTooNear,
    ServerStopping,
    TooManyCalls,
)
from dedup_service.claims import (
    Applied,
    Caller,
    CallerNotAllowed,
    CallerUnknown,
    FieldViolation,
    InvalidRequest,
    Policies,
    Policy,
    Reason,
    StoreRefused,
    StoreUnavailable,
    TooManyWaits,
    TransactionNotFound,
    UnreadableValue,
)
from dedup_service.observability.calls import CORRELATION_HEADER, Call

SECRET = "hunter2"
REQUEST = dedup_pb2.GetTransactionRequest(transaction_id="x")
REPLY = dedup_pb2.GetTransactionResponse()


class Aborted(Exception):
    """What `abort` raises in gRPC."""


class FakeContext:
    """The parts of gRPC's context that the endpoint uses."""

    def __init__(self, remaining_s: float | None = None, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self._remaining_s = remaining_s
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.message = ""
        self.trailing: dict[str, Any] = {}

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """Return the caller's metadata."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Return the time until the deadline."""
        return self._remaining_s

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, Any]]) -> None:
        """Keep the metadata of an answer."""
        self.trailing = dict(metadata)

    async def abort(self, code: grpc.StatusCode, message: str, metadata: Sequence[tuple[str, Any]]) -> None:
        """Keep the status, and end the call."""
        self.code, self.message, self.trailing = code, message, dict(metadata)
        raise Aborted

    @property
    def details(self) -> dict[str, Any]:
        """The details of the status, by the name of their message."""
        status = status_pb2.Status.FromString(self.trailing[STATUS_DETAILS_KEY])
        assert self.code is not None
        assert (status.code, status.message) == (self.code.value[0], self.message)
        found: dict[str, Any] = {}
        for packed in status.details:
            name = packed.type_url.rpartition(".")[2]
            found[name] = getattr(error_details_pb2, name)()
            packed.Unpack(found[name])
        return found

    @property
    def applied(self) -> str:
        """Whether the failed call may have changed the store."""
        return str(self.details["ErrorInfo"].metadata["applied"])


class Recorder:
    """Keeps the calls; marks them as logged where `logs` is set."""

    def __init__(self) -> None:
        self.begun: list[Call] = []
        self.ended: list[Call] = []
        self.logs = False

    def started(self, call: Call) -> None:
        """Keep a call."""
        self.begun.append(call)

    def finished(self, call: Call) -> None:
        """Keep a finished call."""
        call.logged = self.logs
        self.ended.append(call)


Answer = Callable[[Call, float | None], Awaitable[Message]]


class Fixture:
    """An endpoint around a handler of the test, with what observes it."""

    def __init__(
        self,
        answer: Answer,
        *,
        limit: int = 1,
        may_change: bool = True,
        authorization: Authorization | None = None,
    ) -> None:
        self.observer = Recorder()
        self.admission = Admission(limit)
        self.requests: list[Message] = []

        async def handle(request: dedup_pb2.GetTransactionRequest, call: Call, budget_s: float | None) -> Message:
            self.requests.append(request)
            return await answer(call, budget_s)

        self.endpoint = Endpoint(
            method="GetTransaction",
            request_type=dedup_pb2.GetTransactionRequest,
            handler=handle,
            observer=self.observer,
            admission=self.admission,
            authorization=authorization,
            may_change=may_change,
        )

    async def serve(self, context: FakeContext, raw: bytes = REQUEST.SerializeToString()) -> bytes:
        """Serve a call."""
        return await self.endpoint.serve(raw, cast("Context", context))

    async def reject(self, context: FakeContext, raw: bytes = REQUEST.SerializeToString()) -> Call:
        """Serve a call that must fail, check what holds for every failure, and return what was observed."""
        with pytest.raises(Aborted):
            await self.serve(context, raw)
        [call] = self.observer.ended
        assert context.code is not None
        assert call.code == context.code.name
        assert call.failure is not None
        info = context.details["ErrorInfo"]
        assert (info.domain, info.reason) == (ERROR_DOMAIN, call.failure.reason.value)
        assert info.metadata["applied"] == call.failure.applied.value
        assert context.trailing[CORRELATION_HEADER] == call.correlation_id
        assert self.admission.in_flight == 0
        return call


async def answered(*_: object) -> Message:
    """Answer at once."""
    return REPLY


async def hangs(*_: object) -> Message:
    """Never answer."""
    await asyncio.sleep(60)
    raise AssertionError


def raising(error: BaseException) -> Answer:
    """Return a handler that raises."""

    async def fail(*_: object) -> Message:
        raise error

    return fail


async def test_a_call_is_answered_and_observed() -> None:
    """The reply is the handler's, and the observer sees the call start and end."""
    fixture = Fixture(answered)
    context = FakeContext()
    assert await fixture.serve(context) == REPLY.SerializeToString()
    assert fixture.requests == [REQUEST]
    assert fixture.observer.begun == fixture.observer.ended
    [call] = fixture.observer.ended
    assert (call.method, call.code, call.failure) == ("GetTransaction", "OK", None)
    assert call.duration_s > 0
    assert fixture.admission.in_flight == 0


# For each row of the table: the exception, its status, reason and `applied`, and whether a retry makes sense.
FAILURES = [
    (InvalidRequest(FieldViolation("ttl", "is odd")), "INVALID_ARGUMENT", Reason.INVALID_REQUEST, Applied.NO, False),
    (CallerUnknown("who"), "UNAUTHENTICATED", Reason.CALLER_UNKNOWN, Applied.NO, False),
    (CallerNotAllowed("no"), "PERMISSION_DENIED", Reason.CALLER_NOT_ALLOWED, Applied.NO, False),
    (TransactionNotFound("none"), "NOT_FOUND", Reason.TRANSACTION_NOT_FOUND, Applied.NO, False),
    (
        StoreUnavailable(Reason.STORE_LOADING, "loading", Applied.NO),
        "UNAVAILABLE",
        Reason.STORE_LOADING,
        Applied.NO,
        True,
    ),
    (
        StoreUnavailable(Reason.STORE_TIMEOUT, "late", Applied.UNKNOWN),
        "UNAVAILABLE",
        Reason.STORE_TIMEOUT,
        Applied.UNKNOWN,
        True,
    ),
    (StoreRefused("too old"), "UNAVAILABLE", Reason.STORE_REFUSED, Applied.NO, False),
    (
        UnreadableValue(Reason.VALUE_DAMAGED, "damaged"),
        "FAILED_PRECONDITION",
        Reason.VALUE_DAMAGED,
        Applied.NO,
        False,
    ),
    (TooManyCalls("full"), "RESOURCE_EXHAUSTED", Reason.TOO_MANY_CALLS, Applied.NO, True),
    (TooManyWaits("full"), "RESOURCE_EXHAUSTED", Reason.TOO_MANY_WAITS, Applied.NO, True),
    (ServerStopping("bye"), "UNAVAILABLE", Reason.SERVER_STOPPING, Applied.NO, True),
    (DeadlineTooNear("near"), "DEADLINE_EXCEEDED", Reason.DEADLINE_TOO_NEAR, Applied.NO, False),
    (
        DeadlinePassed("passed", Applied.UNKNOWN),
        "DEADLINE_EXCEEDED",
        Reason.DEADLINE_PASSED,
        Applied.UNKNOWN,
        False,
    ),
]


@pytest.mark.parametrize(("error", "code", "reason", "applied", "retry"), FAILURES)
async def test_every_row_of_the_error_table(
    error: Exception, code: str, reason: Reason, applied: Applied, *, retry: bool
) -> None:
    """Each exception of the domain becomes its status, with reason, `applied`, its text, and RetryInfo if it helps."""
    context = FakeContext()
    call = await Fixture(raising(error)).reject(context)
    assert (call.code, context.message) == (code, str(error))
    assert call.failure is not None
    assert (call.failure.reason, call.failure.applied, call.failure.exception) == (reason, applied, None)
    assert ("RetryInfo" in context.details) is retry
    if retry:
        assert context.details["RetryInfo"].retry_delay.ToMilliseconds() == RETRY_AFTER_MS
    assert ("BadRequest" in context.details) is isinstance(error, InvalidRequest)


def test_the_cases_cover_the_error_table() -> None:
    """A new row needs a case above."""
    assert {type(error) for error, *_ in FAILURES} == set(TABLE)


async def test_an_invalid_request_lists_its_violations() -> None:
    """BadRequest has every field and description."""
    context = FakeContext()
    violations = (FieldViolation("ttl", "is odd"), FieldViolation("claimant", "is long"))
    await Fixture(raising(InvalidRequest(*violations))).reject(context)
    found = context.details["BadRequest"].field_violations
    assert [(one.field, one.description) for one in found] == [("ttl", "is odd"), ("claimant", "is long")]


class NewError(StoreUnavailable):
    """An exception nobody added to the table."""


@pytest.mark.parametrize(
    "error", [ValueError(SECRET), KeyError(SECRET), NewError(Reason.STORE_ERROR, SECRET, Applied.NO)]
)
async def test_an_unexpected_exception_is_internal_with_an_incident_and_without_its_text(error: Exception) -> None:
    """Neither message nor metadata contain the text of a bug; the observer receives exception and incident.

    Protection: `error_reply` replaces the text of exceptions outside the table.
    """
    context = FakeContext()
    call = await Fixture(raising(error)).reject(context)
    assert call.code == "INTERNAL"
    assert call.failure is not None
    assert (call.failure.reason, call.failure.applied) == (Reason.INTERNAL, Applied.UNKNOWN)
    assert call.failure.exception is error
    assert call.failure.incident
    assert call.failure.incident in context.message
    assert SECRET not in context.message
    assert SECRET not in str(context.trailing)


async def test_an_incident_is_found_by_a_new_id_each_time() -> None:
    """Two bugs do not share their incident."""
    contexts = FakeContext(), FakeContext()
    for context in contexts:
        await Fixture(raising(ValueError())).reject(context)
    assert contexts[0].message != contexts[1].message


async def test_a_reply_that_cannot_be_encoded_is_internal() -> None:
    """A bug after the handler is guarded, too."""

    class Broken:
        def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's
            raise ValueError(SECRET)

    async def broken(*_: object) -> Message:
        return cast("Message", Broken())

    context = FakeContext()
    assert (await Fixture(broken).reject(context)).code == "INTERNAL"
    assert SECRET not in context.message


async def test_an_undecodable_request_does_not_reach_the_handler() -> None:
    """A malformed message is INVALID_ARGUMENT, not gRPC's INTERNAL."""
    fixture = Fixture(answered)
    call = await fixture.reject(FakeContext(), b"\xff")
    assert call.code == "INVALID_ARGUMENT"
    assert not fixture.requests


@pytest.mark.parametrize("remaining_s", [-1.0, 0.0, ANSWER_MARGIN_S])
async def test_a_deadline_that_is_too_near_asks_nothing(remaining_s: float) -> None:
    """Without time for an answer the handler is not called, so nothing was applied.

    Protection: `_handle_in_time` checks the budget first.
    """
    fixture = Fixture(answered)
    context = FakeContext(remaining_s)
    call = await fixture.reject(context)
    assert call.code == "DEADLINE_EXCEEDED"
    assert context.details["ErrorInfo"].reason == "DEADLINE_TOO_NEAR"
    assert context.applied == "no"
    assert not fixture.requests


@pytest.mark.parametrize(("may_change", "applied"), [(True, "unknown"), (False, "no")])
async def test_a_passed_deadline_is_doubt_for_changes_and_none_for_reads(*, may_change: bool, applied: str) -> None:
    """The answer comes before the deadline; the handler may have applied a change, and never a read."""
    context = FakeContext(ANSWER_MARGIN_S + 0.01)
    async with asyncio.timeout(5):
        call = await Fixture(hangs, may_change=may_change).reject(context)
    assert call.code == "DEADLINE_EXCEEDED"
    assert context.details["ErrorInfo"].reason == "DEADLINE_PASSED"
    assert context.applied == applied


async def test_a_timeout_error_of_the_handler_is_not_a_passed_deadline() -> None:
    """A handler that raises TimeoutError long before the deadline has a bug, which needs an incident.

    Protection: `_handle_in_time` asks whether its own timeout expired.
    """
    error = TimeoutError(SECRET)
    call = await Fixture(raising(error)).reject(FakeContext(10.0))
    assert call.code == "INTERNAL"
    assert call.failure is not None
    assert call.failure.exception is error


@pytest.mark.parametrize(("remaining_s", "budget_s"), [(None, None), (1.0, 1.0 - ANSWER_MARGIN_S), (9.3e18, None)])
async def test_the_handler_receives_its_budget(remaining_s: float | None, budget_s: float | None) -> None:
    """The budget leaves time for the answer, and is None without a deadline, as either engine reports it."""
    budgets: list[float | None] = []

    async def note(_: Call, budget: float | None) -> Message:
        budgets.append(budget)
        return REPLY

    await Fixture(note).serve(FakeContext(remaining_s))
    assert budgets == [budget_s]


@pytest.mark.parametrize(
    ("remaining_s", "code"), [(None, "CANCELLED"), (10.0, "CANCELLED"), (0.04, "DEADLINE_EXCEEDED")]
)
async def test_a_cancelled_call_is_observed_and_leaves(remaining_s: float | None, code: str) -> None:
    """A cancelled call ends as CANCELLED, or as DEADLINE_EXCEEDED where its deadline passes, and frees its slot.

    Protection: `leave` is in a finally clause.
    """
    fixture = Fixture(hangs)
    task = asyncio.create_task(fixture.serve(FakeContext(remaining_s)))
    await asyncio.sleep(0)
    assert fixture.admission.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [call.code for call in fixture.observer.ended] == [code]
    assert fixture.admission.in_flight == 0


async def test_a_rejected_call_does_not_leave_what_it_never_entered() -> None:
    """A call beyond the limit is rejected, and the count of in-flight calls stays right."""
    release = asyncio.Event()

    async def held(*_: object) -> Message:
        await release.wait()
        return REPLY

    fixture = Fixture(held)
    first = asyncio.create_task(fixture.serve(FakeContext()))
    await asyncio.sleep(0)
    context = FakeContext()
    with pytest.raises(Aborted):
        await fixture.serve(context)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert fixture.admission.in_flight == 1
    release.set()
    await first
    assert fixture.admission.in_flight == 0


async def test_a_closed_admission_rejects_as_stopping() -> None:
    """During the shutdown a call is told to go elsewhere, certainly not applied."""
    fixture = Fixture(answered)
    fixture.admission.close()
    context = FakeContext()
    await fixture.reject(context)
    assert context.details["ErrorInfo"].reason == "SERVER_STOPPING"
    assert context.applied == "no"


@pytest.mark.parametrize("logged", [False, True])
async def test_an_answer_has_its_correlation_id_only_if_logged(*, logged: bool) -> None:
    """A correlation id in the trailing metadata stands for a line in the log."""
    fixture = Fixture(answered)
    fixture.observer.logs = logged
    context = FakeContext(metadata=[(CORRELATION_HEADER, "abc-1")])
    await fixture.serve(context)
    assert context.trailing == ({CORRELATION_HEADER: "abc-1"} if logged else {})


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([("x-request-id", "r"), (CORRELATION_HEADER, "c")], "c"),
        ([("x-request-id", "r")], "r"),
        ([(CORRELATION_HEADER, "has space"), ("x-request-id", "r")], "r"),
        ([("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")], "a" * 32),
    ],
)
async def test_a_failure_has_the_correlation_id_of_the_caller(metadata: list[tuple[str, str]], expected: str) -> None:
    """The first usable id of the caller returns with every failure."""
    context = FakeContext(metadata=metadata)
    await Fixture(raising(TransactionNotFound("none"))).reject(context)
    assert context.trailing[CORRELATION_HEADER] == expected


async def test_a_caller_without_the_right_does_not_reach_the_handler() -> None:
    """Authorization comes before decoding, and the observer learns the caller that was refused."""

    class Known(Authorization):
        def identify(self, context: Context) -> Caller:  # noqa: ARG002 - as in the original
            return Caller("box", rpcs=frozenset({"ClaimTransaction"}))

    fixture = Fixture(answered, authorization=Known(lambda: Policies(Policy(1, 1, 1))))
    call = await fixture.reject(FakeContext(), b"\xff")
    assert call.code == "PERMISSION_DENIED"
    assert call.caller is not None
    assert call.caller.name == "box"
    assert not fixture.requests

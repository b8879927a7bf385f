"""The errors of the API, and the error table: from an exception to gRPC code, reason, applied and retry."""

import secrets
from dataclasses import dataclass

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from dedup_service.claims import (
    Applied,
    CallerNotAllowed,
    CallerUnknown,
    ClaimError,
    FieldViolation,
    InvalidRequest,
    Reason,
    StoreRefused,
    StoreUnavailable,
    TooManyWaits,
    TransactionNotFound,
    UnreadableValue,
)
from dedup_service.observability.calls import Failure

ERROR_DOMAIN = "dedup.v1"

# Long enough for a reconnect or an election, short enough for a user who waits.
RETRY_AFTER_MS = 200


class ServerStopping(ClaimError):
    """The server is shutting down; nothing was done."""

    reason = Reason.SERVER_STOPPING


class TooManyCalls(ClaimError):
    """The limit of in-flight calls is reached; nothing was done."""

    reason = Reason.TOO_MANY_CALLS


class DeadlineTooNear(ClaimError):
    """The deadline leaves no time to ask the store; nothing was done."""

    reason = Reason.DEADLINE_TOO_NEAR


class DeadlinePassed(ClaimError):
    """The deadline passed before the store answered."""

    reason = Reason.DEADLINE_PASSED

    def __init__(self, message: str, applied: Applied) -> None:
        super().__init__(message)
        self.applied = applied


@dataclass(frozen=True, slots=True)
class Row:
    """`retry_after_ms` is None where a retry would not help."""

    code: grpc.StatusCode
    retry_after_ms: int | None = None


TABLE: dict[type[Exception], Row] = {
    InvalidRequest: Row(grpc.StatusCode.INVALID_ARGUMENT),
    CallerUnknown: Row(grpc.StatusCode.UNAUTHENTICATED),
    CallerNotAllowed: Row(grpc.StatusCode.PERMISSION_DENIED),
    TransactionNotFound: Row(grpc.StatusCode.NOT_FOUND),
    StoreUnavailable: Row(grpc.StatusCode.UNAVAILABLE, RETRY_AFTER_MS),
    StoreRefused: Row(grpc.StatusCode.UNAVAILABLE),
    UnreadableValue: Row(grpc.StatusCode.FAILED_PRECONDITION),
    TooManyCalls: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, RETRY_AFTER_MS),
    TooManyWaits: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, RETRY_AFTER_MS),
    DeadlineTooNear: Row(grpc.StatusCode.DEADLINE_EXCEEDED),
    DeadlinePassed: Row(grpc.StatusCode.DEADLINE_EXCEEDED),
    ServerStopping: Row(grpc.StatusCode.UNAVAILABLE, RETRY_AFTER_MS),
}


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error as the caller receives it."""

    code: grpc.StatusCode
    message: str
    failure: Failure
    retry_after_ms: int | None = None
    violations: tuple[FieldViolation, ...] = ()

    def status(self) -> status_pb2.Status:
        """Return google.rpc.Status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(
                reason=self.failure.reason.value,
                domain=ERROR_DOMAIN,
                metadata={"applied": self.failure.applied.value},
            )
        )
        if self.violations:
            violations = (
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                for v in self.violations
            )
            status.details.add().Pack(error_details_pb2.BadRequest(field_violations=violations))
        if self.retry_after_ms is not None:
            delay = duration_pb2.Duration(nanos=self.retry_after_ms * 1_000_000)
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return status


def error_reply(error: Exception) -> ErrorReply:
    """Return the reply for an exception. The text of an unexpected one goes to the log only, under an incident id."""
    row = TABLE.get(type(error))
    if row is None or not isinstance(error, ClaimError):
        incident = secrets.token_hex(8)
        return ErrorReply(
            grpc.StatusCode.INTERNAL,
            f"internal error; the log of the service has its cause under the incident {incident}",
            Failure(Reason.INTERNAL, Applied.UNKNOWN, incident, error),
        )
    violations = error.violations if isinstance(error, InvalidRequest) else ()
    return ErrorReply(row.code, str(error), Failure(error.reason, error.applied), row.retry_after_ms, violations)

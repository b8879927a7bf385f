"""The one table from what went wrong to what the caller is told: code, reason, applied, and whether to try again."""

import secrets
from dataclasses import dataclass

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from dedup_service.claims import (
    Applied,
    CallerNotAllowed,
    CallerUnknown,
    FieldViolation,
    InvalidRequest,
    StoreRefused,
    StoreUnavailable,
    TransactionNotFound,
    UnreadableValue,
)
from dedup_service.api.admission import ServerStopping, TooManyCalls

ERROR_DOMAIN = "dedup.v1"

# Long enough for a reconnect or an election to get on, short enough for a user who waits.
RETRY_AFTER_MS = 200


class DeadlineTooNear(Exception):
    """The caller would be gone before an answer could reach it, so nothing was asked of the store."""


class DeadlinePassed(Exception):
    """The caller's deadline came before the store's answer did."""

    def __init__(self, message: str, applied: Applied) -> None:
        super().__init__(message)
        self.applied = applied


@dataclass(frozen=True, slots=True)
class Failure:
    """What a caller is told instead of an answer; `retry_after_ms` is None where a retry would not help."""

    code: grpc.StatusCode
    reason: str
    message: str
    applied: Applied
    retry_after_ms: int | None = None
    violations: tuple[FieldViolation, ...] = ()

    def status(self) -> status_pb2.Status:
        """Return the failure as google.rpc.Status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(
                reason=self.reason, domain=ERROR_DOMAIN, metadata={"applied": self.applied.value}
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


@dataclass(frozen=True, slots=True)
class _Row:
    """`reason` is empty where the error carries its own; an error without an `applied` of its own changed nothing."""

    code: grpc.StatusCode
    reason: str = ""
    retry_after_ms: int | None = None


TABLE = {
    InvalidRequest: _Row(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    CallerUnknown: _Row(grpc.StatusCode.UNAUTHENTICATED, "CALLER_UNKNOWN"),
    CallerNotAllowed: _Row(grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED"),
    TransactionNotFound: _Row(grpc.StatusCode.NOT_FOUND, "TRANSACTION_NOT_FOUND"),
    StoreUnavailable: _Row(grpc.StatusCode.UNAVAILABLE, retry_after_ms=RETRY_AFTER_MS),
    StoreRefused: _Row(grpc.StatusCode.UNAVAILABLE, "STORE_REFUSED"),
    UnreadableValue: _Row(grpc.StatusCode.FAILED_PRECONDITION),
    TooManyCalls: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", RETRY_AFTER_MS),
    DeadlineTooNear: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_TOO_NEAR"),
    DeadlinePassed: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    ServerStopping: _Row(grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING", RETRY_AFTER_MS),
}


def new_incident() -> str:
    """Return an opaque id by which a caller can quote a bug."""
    return secrets.token_hex(8)


def failure_of(error: Exception, incident: str) -> Failure:
    """Return what the caller is told of `error`; for a bug that is only `incident`, an opaque id to quote."""
    row = TABLE.get(type(error))
    if row is None:
        return Failure(
            grpc.StatusCode.INTERNAL,
            "INTERNAL",
            f"internal error; its cause is in the log of the service under the incident {incident}",
            Applied.UNKNOWN,
        )
    return Failure(
        row.code,
        row.reason or getattr(error, "reason", ""),
        str(error),
        getattr(error, "applied", Applied.NO),
        row.retry_after_ms,
        getattr(error, "violations", ()),
    )

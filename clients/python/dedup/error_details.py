"""Converts gRPC errors of calls and batch entries to this client's exceptions."""

from collections.abc import Iterable
from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2

from dedup.errors import Applied, CallFailed, ClientClosed, InvalidRequest, Unavailable

_DOMAIN = "dedup.v1"
_STATUS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# gRPC's own words where it had no connection for the call. All other texts leave doubt.
_UNSENT = ("failed to connect to all addresses", "connections to all backends failing", "DNS resolution failed")
_UNAVAILABLE = {
    # A server's shutdown cancels calls. The caller's own cancellation never arrives here.
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def failure_of_call(error: grpc.RpcError) -> CallFailed:
    """Return the exception for a failed call, with the service's error details, if any."""
    # A sequence of pairs; the type stubs declare one pair.
    for key, value in cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()):
        if key == _STATUS_KEY and isinstance(value, bytes):
            return failure_of_status(status_pb2.Status.FromString(value))
    details = error.details() or ""
    unsent = error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith(_UNSENT)
    return _failure(error.code(), details, applied="no" if unsent else "unknown")


def failure_of_closed_client() -> ClientClosed:
    """Return the exception for a call in flight when its client was closed."""
    return ClientClosed("unknown")


def failure_of_status(status: status_pb2.Status) -> CallFailed:
    """Return the exception for a google.rpc.Status of a call or batch entry."""
    reason: str = ""
    applied: Applied = "unknown"
    retry_after_s: float | None = None
    violations: dict[str, str] = {}
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == _DOMAIN:
            reason = info.reason
            applied = "no" if info.metadata.get("applied") == "no" else "unknown"
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(bad):
            violations = {violation.field: violation.description for violation in bad.field_violations}
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _failure(
        code, status.message, reason=reason, applied=applied, retry_after_s=retry_after_s, violations=violations
    )


def _failure(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    applied: Applied = "unknown",
    retry_after_s: float | None = None,
    violations: dict[str, str] | None = None,
) -> CallFailed:
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(message, violations=violations or {}, reason=reason)
    kind = Unavailable if code in _UNAVAILABLE else CallFailed
    return kind(message, code=code, reason=reason, applied=applied, retry_after_s=retry_after_s)

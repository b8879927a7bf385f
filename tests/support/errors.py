"""Reads the error details of a failed call."""

from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass
class RefusedCall:
    """The status and error details of a failed call."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    domain: str = ""
    applied: str = ""
    retry_after_ms: int | None = None
    violations: dict[str, str] = field(default_factory=dict)


def refused(call: Callable[[], object]) -> RefusedCall:
    """Return the error of a call; fail if the call succeeds."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    found = RefusedCall(error.code(), error.details() or "")
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            found.reason, found.domain, found.applied = info.reason, info.domain, info.metadata["applied"]
        elif detail.Unpack(retry):
            found.retry_after_ms = retry.retry_delay.ToMilliseconds()
        elif detail.Unpack(bad):
            found.violations = {violation.field: violation.description for violation in bad.field_violations}
    return found

"""Errors of the domain, and the stable reason of each. `api/errors.py` maps them to gRPC codes."""

from dataclasses import dataclass
from enum import Enum, StrEnum


class Applied(Enum):
    """Whether a failed call may have changed the store."""

    NO = "no"
    UNKNOWN = "unknown"


class Reason(StrEnum):
    """The stable, machine-readable cause of every error. Error table, metrics and documentation read this list."""

    INVALID_REQUEST = "INVALID_REQUEST"
    CALLER_UNKNOWN = "CALLER_UNKNOWN"
    CALLER_NOT_ALLOWED = "CALLER_NOT_ALLOWED"
    TRANSACTION_NOT_FOUND = "TRANSACTION_NOT_FOUND"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    TOO_MANY_WAITS = "TOO_MANY_WAITS"
    DEADLINE_TOO_NEAR = "DEADLINE_TOO_NEAR"
    DEADLINE_PASSED = "DEADLINE_PASSED"
    SERVER_STOPPING = "SERVER_STOPPING"
    INTERNAL = "INTERNAL"
    STORE_REFUSED = "STORE_REFUSED"
    KEY_OF_ANOTHER_TYPE = "KEY_OF_ANOTHER_TYPE"
    VALUE_VERSION_UNKNOWN = "VALUE_VERSION_UNKNOWN"
    VALUE_DAMAGED = "VALUE_DAMAGED"
    STORE_UNREACHABLE = "STORE_UNREACHABLE"
    SENTINEL_UNREACHABLE = "SENTINEL_UNREACHABLE"
    CLUSTER_UNREACHABLE = "CLUSTER_UNREACHABLE"
    STORE_CLUSTER_DOWN = "STORE_CLUSTER_DOWN"
    STORE_CONNECTION_LOST = "STORE_CONNECTION_LOST"
    STORE_TIMEOUT = "STORE_TIMEOUT"
    STORE_NOT_REPLICATED = "STORE_NOT_REPLICATED"
    STORE_PROTOCOL_ERROR = "STORE_PROTOCOL_ERROR"
    STORE_ERROR = "STORE_ERROR"
    STORE_QUEUE_FULL = "STORE_QUEUE_FULL"
    STORE_CLOSED = "STORE_CLOSED"
    STORE_READ_ONLY = "STORE_READ_ONLY"
    STORE_LOADING = "STORE_LOADING"
    STORE_MASTER_DOWN = "STORE_MASTER_DOWN"
    STORE_OUT_OF_MEMORY = "STORE_OUT_OF_MEMORY"
    STORE_NOT_AUTHENTICATED = "STORE_NOT_AUTHENTICATED"
    STORE_NOT_PERMITTED = "STORE_NOT_PERMITTED"
    STORE_BUSY = "STORE_BUSY"
    STORE_MISCONFIGURED = "STORE_MISCONFIGURED"
    STORE_TOO_FEW_REPLICAS = "STORE_TOO_FEW_REPLICAS"
    STORE_MOVED = "STORE_MOVED"
    STORE_TRY_AGAIN = "STORE_TRY_AGAIN"
    STORE_FULL = "STORE_FULL"
    STORE_IO_ERROR = "STORE_IO_ERROR"
    STORE_CORRUPT = "STORE_CORRUPT"
    STORE_CANNOT_OPEN = "STORE_CANNOT_OPEN"
    STORE_FILE_REPLACED = "STORE_FILE_REPLACED"
    STORE_STALLED = "STORE_STALLED"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One fault of one field of a request; `description` names the limit and the remedy."""

    field: str
    description: str


class ClaimError(Exception):
    """A call that ended without an outcome; the message is a sentence for people and contains no secret."""

    reason: Reason
    applied: Applied = Applied.NO


class InvalidRequest(ClaimError):
    """The request breaks the contract; nothing was read or written."""

    reason = Reason.INVALID_REQUEST

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class CallerUnknown(ClaimError):
    """The call does not identify its caller credibly; nothing was read or written."""

    reason = Reason.CALLER_UNKNOWN


class CallerNotAllowed(ClaimError):
    """The caller lacks the right to this call; nothing was read or written."""

    reason = Reason.CALLER_NOT_ALLOWED


class TransactionNotFound(ClaimError):
    """The transaction is not claimed."""

    reason = Reason.TRANSACTION_NOT_FOUND


class TooManyWaits(ClaimError):
    """The limit of waiting claims is reached; this one met a holder, and nothing was written."""

    reason = Reason.TOO_MANY_WAITS


class StoreUnavailable(ClaimError):
    """The store could not answer; `applied` says whether it may have carried the command out."""

    def __init__(self, reason: Reason, message: str, applied: Applied) -> None:
        super().__init__(message)
        self.reason = reason
        self.applied = applied

    def with_applied(self, applied: Applied) -> "StoreUnavailable":
        """Return a copy that says `applied`; an exception raised in several tasks would collect their tracebacks."""
        return StoreUnavailable(self.reason, str(self), applied)


class UnreadableValue(ClaimError):
    """The value under the transaction's key cannot be read by this version; it was left alone."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StoreRefused(ClaimError):
    """The store cannot work as it is configured, and waiting will not help; the message says what to change."""

    reason = Reason.STORE_REFUSED

"""The exceptions that this client raises."""

from collections.abc import Mapping
from typing import Literal

import grpc

from dedup.transactions import Transaction

Applied = Literal["no", "unknown"]
""""no": a failed call certainly changed nothing. "unknown": it may have changed something."""


class DedupError(Exception):
    """The base class of all exceptions of this client."""


class DuplicateTransaction(DedupError):
    """Another caller holds the transaction, or it is completed. Do not do the work. Answer 409.

    `holder` tells who claimed it, when, until when, and once completed its first result.
    """

    def __init__(self, holder: Transaction) -> None:
        state = "is completed" if holder.completed else "is in progress"
        claimant = holder.claimant or "an unnamed claimant"
        super().__init__(f"transaction {holder.transaction_id!r} {state}, claimed by {claimant}")
        self.holder = holder


class PayloadMismatch(DedupError):
    """The transaction was claimed with another fingerprint: its id was reused. Answer 422."""

    def __init__(self, holder: Transaction) -> None:
        super().__init__(f"transaction {holder.transaction_id!r} was claimed with another payload")
        self.holder = holder


class NotHeld(DedupError):
    """The claim expired, was released, was claimed by another caller, or is completed.

    Nothing was changed. After a completion, the work was done and another caller may repeat it.
    """

    def __init__(self, transaction_id: str) -> None:
        super().__init__(f"transaction {transaction_id!r} is no longer held by this claim")
        self.transaction_id = transaction_id


class CallFailed(DedupError):
    """The call was not answered. Do not do the work, and never answer 409.

    `code` is the gRPC code. `reason` is the service's stable reason, empty if gRPC itself made the error. `message` is
    the text without both. `applied` covers all attempts. `retry_after_s` is the delay in seconds that the service asks
    for, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        applied: Applied = "unknown",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name} {reason}: {message}" if reason else f"{code.name}: {message}")
        self.message = message
        self.code = code
        self.reason = reason
        self.applied = applied
        self.retry_after_s = retry_after_s


class Unavailable(CallFailed):
    """The service or its store did not answer within the budget, retries included. Answer 503."""


class InvalidRequest(CallFailed):
    """The request is invalid. Nothing was changed. `violations` maps each invalid field to its fault."""

    def __init__(self, message: str, *, violations: Mapping[str, str], reason: str = "INVALID_REQUEST") -> None:
        super().__init__(message, code=grpc.StatusCode.INVALID_ARGUMENT, reason=reason, applied="no")
        self.violations = dict(violations)

"""The exceptions that this client raises."""

from collections.abc import Mapping
from typing import Literal

import grpc

from dedup.ids import logged_id
from dedup.transactions import Transaction

Applied = Literal["no", "unknown"]
""""no": a failed call certainly changed nothing. "unknown": it may have changed something."""


class DedupError(Exception):
    """The base class of all exceptions of this client. Texts name a transaction by its hashed id, as logs do."""


class DuplicateTransaction(DedupError):
    """Another caller holds the transaction, or it is completed. Do not do the work. Answer 409.

    `holder` tells who claimed it, when, until when, and once completed its first result.
    """

    def __init__(self, holder: Transaction) -> None:
        state = "is completed" if holder.completed else "is in progress"
        claimant = holder.claimant or "an unnamed claimant"
        super().__init__(f"transaction {logged_id(holder.transaction_id)} {state}, claimed by {claimant}")
        self.holder = holder


class PayloadMismatch(DedupError):
    """The transaction was claimed with another fingerprint: its id was reused. Answer 422."""

    def __init__(self, holder: Transaction) -> None:
        super().__init__(f"transaction {logged_id(holder.transaction_id)} was claimed with another payload")
        self.holder = holder


class NotHeld(DedupError):
    """The claim expired, was released, was claimed by another caller, or is completed.

    Nothing was changed. After a completion, the work was done and another caller may repeat it.
    """

    def __init__(self, transaction_id: str) -> None:
        super().__init__(f"transaction {logged_id(transaction_id)} is no longer held by this claim")
        self.transaction_id = transaction_id


class ClaimLost(DedupError):
    """The block was cancelled because its claim was lost while the work ran. Another caller may repeat the work."""

    def __init__(self, transaction_id: str) -> None:
        super().__init__(f"the claim of transaction {logged_id(transaction_id)} was lost while its work ran")
        self.transaction_id = transaction_id


class WrongEventLoop(DedupError):
    """The asynchronous client was used from another event loop than that of its first call."""

    def __init__(self) -> None:
        super().__init__("this client belongs to another event loop: make one client for each event loop")


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


class ClientClosed(CallFailed):
    """The client is closed. `applied` is "no" for a call made after that, "unknown" for one that was in flight."""

    def __init__(self, applied: Applied = "no") -> None:
        super().__init__("the client was closed", code=grpc.StatusCode.CANCELLED, applied=applied)


class Unavailable(CallFailed):
    """The service or its store did not answer within the budget, retries included. Answer 503."""


class InvalidRequest(CallFailed):
    """The request is invalid. Nothing was changed. `violations` maps each invalid field to its fault."""

    def __init__(self, message: str, *, violations: Mapping[str, str], reason: str = "INVALID_REQUEST") -> None:
        super().__init__(message, code=grpc.StatusCode.INVALID_ARGUMENT, reason=reason, applied="no")
        self.violations = dict(violations)


_UNSENT = "dedup_unsent"


def mark_unsent(error: BaseException) -> None:
    """Note in a cancellation or interruption that the claim had not been sent."""
    setattr(error, _UNSENT, True)


def is_unsent(error: BaseException) -> bool:
    """Return whether the claim that ended with `error` had not been sent."""
    return getattr(error, _UNSENT, False)

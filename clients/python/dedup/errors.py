"""What a caller is told instead of a claim."""

from collections.abc import Mapping
from typing import Literal

import grpc

from dedup.transactions import Transaction

Applied = Literal["no", "unknown"]
"""Whether a failed call certainly changed nothing ("no") or may have ("unknown")."""


class DedupError(Exception):
    """The root of everything that this client raises of its own."""


class DuplicateTransaction(DedupError):
    """Somebody else holds the transaction, or it is completed: do not do the work, and answer 409.

    `holder` says who, since when and until when, and has the first result once the work is completed.
    """

    def __init__(self, holder: Transaction) -> None:
        state = "is completed" if holder.completed else "is in progress"
        super().__init__(f"transaction {holder.transaction_id!r} {state}, claimed by {holder.claimant or 'somebody'}")
        self.holder = holder


class PayloadMismatch(DedupError):
    """The transaction is known with another fingerprint: the id was reused for different work. Answer 422."""

    def __init__(self, holder: Transaction) -> None:
        super().__init__(f"transaction {holder.transaction_id!r} is known with another payload")
        self.holder = holder


class NotHeld(DedupError):
    """The claim is not held (any more): it expired, was released, was taken by another caller, or is completed.

    Nothing was changed. When it is told of a completion, the work was done and another caller may do it again.
    """

    def __init__(self, transaction_id: str) -> None:
        super().__init__(f"transaction {transaction_id!r} is not held by this claim any more")
        self.transaction_id = transaction_id


class CallFailed(DedupError):
    """The question was not answered: do not do the work, and never answer 409.

    `code` is the gRPC code, `reason` the stable reason of the service (empty when gRPC itself made the error), and
    `applied` whether the call, all its attempts together, certainly changed nothing. `retry_after_s` is how long the
    service asks to stay away, in seconds; None when it does not ask.
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
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.applied = applied
        self.retry_after_s = retry_after_s


class Unavailable(CallFailed):
    """The service or its store could not be asked in time, retries included. Answer 503."""


class InvalidRequest(CallFailed):
    """The service refuses the request as it is; `violations` has what is wrong with each field. Nothing was changed."""

    def __init__(self, message: str, *, violations: Mapping[str, str], reason: str = "INVALID_REQUEST") -> None:
        super().__init__(message, code=grpc.StatusCode.INVALID_ARGUMENT, reason=reason, applied="no")
        self.violations = dict(violations)

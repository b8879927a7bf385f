"""What can go wrong with a claim, in the words of the domain; the servicer alone knows which gRPC code each one is."""

from dataclasses import dataclass
from enum import Enum


class Applied(Enum):
    """Whether the failed call may have changed the store."""

    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing that is wrong with one field of a request: `description` names the limit and what to do."""

    field: str
    description: str


class InvalidRequest(Exception):
    """The request breaks the contract; nothing was read or written."""

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class CallerUnknown(Exception):
    """The caller did not say who it is in a way that can be believed; nothing was read or written."""


class CallerNotAllowed(Exception):
    """The caller is known, and may not ask for this; nothing was read or written."""


class TransactionNotFound(Exception):
    """Nobody holds the transaction that was looked up."""


class StoreUnavailable(Exception):
    """The store could not answer.

    `reason` is a stable UPPER_SNAKE_CASE word for machines, the message a sentence for people without any secret, and
    `applied` says whether the command may have been carried out all the same.
    """

    def __init__(self, reason: str, message: str, applied: Applied) -> None:
        super().__init__(message)
        self.reason = reason
        self.applied = applied


class UnreadableValue(Exception):
    """The store holds something under this transaction's key that this version cannot read; it was left alone."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StoreRefused(Exception):
    """The store cannot be used as it is configured, and waiting will not mend it; the message says what to change."""

"""The domain: transactions, outcomes, errors and the store port. It imports nothing but the standard library."""

from dedup_service.claims.errors import (
    Applied,
    FieldViolation,
    InvalidRequest,
    StoreRefused,
    StoreUnavailable,
    TransactionNotFound,
    UnreadableValue,
)
from dedup_service.claims.limits import DEFAULT_NAMESPACE, Policy
from dedup_service.claims.service import ClaimService, system_clock_ms
from dedup_service.claims.store import ClaimStore
from dedup_service.claims.transaction import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    Transaction,
    TransactionState,
)

__all__ = [
    "DEFAULT_NAMESPACE",
    "Applied",
    "ClaimAnswer",
    "ClaimOutcome",
    "ClaimRequest",
    "ClaimService",
    "ClaimStore",
    "FieldViolation",
    "InvalidRequest",
    "Policy",
    "StoreRefused",
    "StoreUnavailable",
    "Transaction",
    "TransactionNotFound",
    "TransactionState",
    "UnreadableValue",
    "system_clock_ms",
]

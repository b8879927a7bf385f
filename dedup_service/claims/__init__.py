"""The domain: transactions, outcomes, errors and the store port. It imports nothing but the standard library."""

from dedup_service.claims.callers import Caller, present_caller
from dedup_service.claims.errors import (
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
from dedup_service.claims.limits import DEFAULT_NAMESPACE
from dedup_service.claims.policy import Policies, Policy
from dedup_service.claims.service import DEFAULT_MAX_RESULT_BYTES, ClaimService, system_clock_ms
from dedup_service.claims.store import ClaimStore, StoreNotice, StoreObserver
from dedup_service.claims.transaction import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    HolderRequest,
    Transaction,
    TransactionState,
)
from dedup_service.claims.transitions import Completion, Extension, Release

__all__ = [
    "DEFAULT_MAX_RESULT_BYTES",
    "DEFAULT_NAMESPACE",
    "Applied",
    "Caller",
    "CallerNotAllowed",
    "CallerUnknown",
    "ClaimAnswer",
    "ClaimOutcome",
    "ClaimRequest",
    "ClaimService",
    "ClaimStore",
    "Completion",
    "Extension",
    "FieldViolation",
    "HolderRequest",
    "InvalidRequest",
    "Policies",
    "Policy",
    "Release",
    "StoreNotice",
    "StoreObserver",
    "StoreRefused",
    "StoreUnavailable",
    "Transaction",
    "TransactionNotFound",
    "TransactionState",
    "UnreadableValue",
    "present_caller",
    "system_clock_ms",
]

"""The domain: transactions, policies, errors, and the port to the stores. Imports no library."""

from dedup_service.claims.errors import (
    Applied,
    CallerNotAllowed,
    CallerUnknown,
    ClaimError,
    FieldViolation,
    InvalidRequest,
    Reason,
    StoreRefused,
    StoreUnavailable,
    TransactionNotFound,
    UnreadableValue,
)
from dedup_service.claims.findings import Finding, Severity, worst
from dedup_service.claims.policies import Caller, Policies, Policy
from dedup_service.claims.service import DEFAULT_MAX_RESULT_BYTES, ClaimService, system_clock_ms
from dedup_service.claims.store import ClaimStore, ConnectionObserver, StoreNotice
from dedup_service.claims.transaction import (
    DEFAULT_NAMESPACE,
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    Expiry,
    HolderRequest,
    RequestedExpiry,
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
    "ClaimError",
    "ClaimOutcome",
    "ClaimRequest",
    "ClaimService",
    "ClaimStore",
    "Completion",
    "ConnectionObserver",
    "Expiry",
    "Extension",
    "FieldViolation",
    "Finding",
    "HolderRequest",
    "InvalidRequest",
    "Policies",
    "Policy",
    "Reason",
    "Release",
    "RequestedExpiry",
    "Severity",
    "StoreNotice",
    "StoreRefused",
    "StoreUnavailable",
    "Transaction",
    "TransactionNotFound",
    "TransactionState",
    "UnreadableValue",
    "system_clock_ms",
    "worst",
]

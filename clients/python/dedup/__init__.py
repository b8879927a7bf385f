"""The client of the dedup service: exactly one caller is told to do the work of a transaction.

`Client` blocks, `dedup.aio.Client` awaits; `dedup.v1` holds the generated messages and stubs of the contract.
"""

from dedup.client import Claim, Client
from dedup.errors import (
    CallFailed,
    DedupError,
    DuplicateTransaction,
    InvalidRequest,
    NotHeld,
    PayloadMismatch,
    Unavailable,
)
from dedup.ids import new_claim_token, transaction_id
from dedup.metadata import call_metadata
from dedup.once import once
from dedup.transactions import Transaction, TransactionState

__all__ = [
    "CallFailed",
    "Claim",
    "Client",
    "DedupError",
    "DuplicateTransaction",
    "InvalidRequest",
    "NotHeld",
    "PayloadMismatch",
    "Transaction",
    "TransactionState",
    "Unavailable",
    "call_metadata",
    "new_claim_token",
    "once",
    "transaction_id",
]

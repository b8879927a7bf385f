"""The client of the dedup service: exactly one caller that claims a transaction receives the claim.

Use `Client` in blocking code and `dedup.aio.Client` with asyncio. `dedup.v1` holds the generated messages and stubs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dedup.batches import claim_batch
    from dedup.channels import call_metadata
    from dedup.client import Claim, Client
    from dedup.decorator import once
    from dedup.errors import (
        CallFailed,
        ClaimLost,
        ClientClosed,
        DedupError,
        DuplicateTransaction,
        InvalidRequest,
        NotHeld,
        PayloadMismatch,
        Unavailable,
        WrongEventLoop,
    )
    from dedup.ids import new_claim_token, transaction_id
    from dedup.retries import RetryPolicy
    from dedup.transactions import Transaction, TransactionState

__all__ = [
    "CallFailed",
    "Claim",
    "ClaimLost",
    "Client",
    "ClientClosed",
    "DedupError",
    "DuplicateTransaction",
    "InvalidRequest",
    "NotHeld",
    "PayloadMismatch",
    "RetryPolicy",
    "Transaction",
    "TransactionState",
    "Unavailable",
    "WrongEventLoop",
    "call_metadata",
    "claim_batch",
    "new_claim_token",
    "once",
    "transaction_id",
]

_NAMES = {
    "batches": ("claim_batch",),
    "channels": ("call_metadata",),
    "client": ("Claim", "Client"),
    "decorator": ("once",),
    "errors": (
        "CallFailed",
        "ClaimLost",
        "ClientClosed",
        "DedupError",
        "DuplicateTransaction",
        "InvalidRequest",
        "NotHeld",
        "PayloadMismatch",
        "Unavailable",
        "WrongEventLoop",
    ),
    "ids": ("new_claim_token", "transaction_id"),
    "retries": ("RetryPolicy",),
    "transactions": ("Transaction", "TransactionState"),
}
_MODULE_OF = {name: f"dedup.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Imported on first use: the server imports `dedup.v1` without the client.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value

"""The client of the dedup service: exactly one caller is told to do the work of a transaction.

`Client` blocks, `dedup.aio.Client` awaits; `dedup.v1` holds the generated messages and stubs of the contract.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dedup.client import Claim, Client
    from dedup.decorator import once
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

_HOMES = {
    "client": ("Claim", "Client"),
    "decorator": ("once",),
    "errors": (
        "CallFailed",
        "DedupError",
        "DuplicateTransaction",
        "InvalidRequest",
        "NotHeld",
        "PayloadMismatch",
        "Unavailable",
    ),
    "ids": ("new_claim_token", "transaction_id"),
    "metadata": ("call_metadata",),
    "transactions": ("Transaction", "TransactionState"),
}
_HOME_OF = {name: f"dedup.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: who needs the stubs alone, as the server does, does not pay for the client.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value

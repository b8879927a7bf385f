"""What a claim is: the stored transaction, the question a caller asks, and the answer. Times are Unix milliseconds.

Each call makes several of these, hence named tuples: frozen dataclasses take three times as long to make.
"""

from enum import Enum, IntEnum
from typing import NamedTuple


class TransactionState(IntEnum):
    """What has become of a claimed transaction; the numbers are those of the stored value and of the contract."""

    IN_PROGRESS = 1
    COMPLETED = 2


class ClaimOutcome(Enum):
    """How a claim ended; only CLAIMED means "go"."""

    CLAIMED = "CLAIMED"
    DUPLICATE = "DUPLICATE"
    PAYLOAD_MISMATCH = "PAYLOAD_MISMATCH"


def _without_token(values: NamedTuple) -> str:
    """Return a representation that no log line or traceback can show a token by."""
    shown = (f"{name}={value!r}" for name, value in values._asdict().items() if name != "claim_token")
    return f"{type(values).__name__}({', '.join(shown)})"


class Transaction(NamedTuple):
    """A claimed transaction as a store holds it.

    A claim that was not written by this service (its holder is unknown) has no token, no claim time, and an expiry only
    where the store was asked for it.
    """

    namespace: str
    transaction_id: str
    claim_token: str | None
    claimant: str
    claim_time_ms: int | None
    expire_time_ms: int | None
    state: TransactionState = TransactionState.IN_PROGRESS
    payload_fingerprint: bytes = b""
    completion_time_ms: int | None = None
    result: bytes = b""

    def __repr__(self) -> str:
        return _without_token(self)


class ClaimRequest(NamedTuple):
    """One caller's question, as it came in: nothing in it has been checked yet.

    At most one of `ttl_ms` and `expire_time_ms` is set; an empty `claim_token` asks for a generated one. A duplicate of
    work in progress waits up to `wait_ms` for its end.
    """

    transaction_id: str
    namespace: str = ""
    ttl_ms: int | None = None
    expire_time_ms: int | None = None
    claim_token: str = ""
    claimant: str = ""
    payload_fingerprint: bytes = b""
    wait_ms: int = 0

    def __repr__(self) -> str:
        return _without_token(self)


class HolderRequest(NamedTuple):
    """What a caller asks of a transaction that its token holds, as it came in.

    `result` belongs to a completion, `allow_shortening` to an extension; a release has no expiry.
    """

    transaction_id: str
    namespace: str = ""
    claim_token: str = ""
    ttl_ms: int | None = None
    expire_time_ms: int | None = None
    result: bytes = b""
    allow_shortening: bool = False

    def __repr__(self) -> str:
        return _without_token(self)


class ClaimAnswer(NamedTuple):
    """The outcome of one claim, and the transaction as the store holds it after it.

    `claim_token` is the caller's own. It may differ from the transaction's, which nobody but its holder may see.
    """

    outcome: ClaimOutcome
    transaction: Transaction
    claim_token: str
    replayed: bool = False
    shadow_duplicate: bool = False

    def __repr__(self) -> str:
        return _without_token(self)

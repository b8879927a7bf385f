"""Claims as values: the stored transaction, the caller's request, the answer, and what a holder may change.

Times are Unix milliseconds. Each call makes several of these, hence named tuples: a frozen dataclass takes three times
as long to make.
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import NamedTuple

DEFAULT_NAMESPACE = "default"


class TransactionState(IntEnum):
    """State of a claimed transaction; the numbers are those of the stored value and of the contract."""

    IN_PROGRESS = 1
    COMPLETED = 2


class ClaimOutcome(Enum):
    """Outcome of a claim; only CLAIMED means "go"."""

    CLAIMED = "CLAIMED"
    DUPLICATE = "DUPLICATE"
    PAYLOAD_MISMATCH = "PAYLOAD_MISMATCH"


def _without_token(values: NamedTuple) -> str:
    """Return a representation that is safe for logs and tracebacks."""
    shown = (f"{name}={value!r}" for name, value in values._asdict().items() if name != "claim_token")
    return f"{type(values).__name__}({', '.join(shown)})"


class Expiry(NamedTuple):
    """The end of a record by the clock of the store: `ttl_ms` after it receives the record, or else at `time_ms`.

    With a ttl, `time_ms` is the expected end by the clock of this host. Without one, the store checks that `time_ms` is
    in the future and at most `max_ttl_ms` away.
    """

    time_ms: int
    ttl_ms: int | None = None
    max_ttl_ms: int | None = None


class RequestedExpiry(NamedTuple):
    """The end a caller asks for: a ttl, a time, or neither for the default of the namespace."""

    ttl_ms: int | None = None
    time_ms: int | None = None

    def resolve(self, default_ttl_ms: int, max_ttl_ms: int, now_ms: int) -> Expiry:
        """Return the end, counted from `now_ms` where it is a ttl."""
        if self.time_ms is not None:
            return Expiry(self.time_ms, max_ttl_ms=max_ttl_ms)
        ttl_ms = default_ttl_ms if self.ttl_ms is None else self.ttl_ms
        return Expiry(now_ms + ttl_ms, ttl_ms)


class Transaction(NamedTuple):
    """A claimed transaction as a store holds it.

    A claim this service did not write has an unknown holder: no token, no claim time, and an expire time only where the
    store was asked for it.
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
    """A claim as the caller sent it, not yet checked.

    An empty `claim_token` asks for a generated one. A duplicate of work in progress waits up to `wait_ms` for its end.
    """

    transaction_id: str
    namespace: str = DEFAULT_NAMESPACE
    expiry: RequestedExpiry = RequestedExpiry()
    claim_token: str = ""
    claimant: str = ""
    payload_fingerprint: bytes = b""
    wait_ms: int = 0

    def __repr__(self) -> str:
        return _without_token(self)


class HolderRequest(NamedTuple):
    """A request of the holder, not yet checked. Completions use `result`, extensions `allow_shortening`."""

    transaction_id: str
    namespace: str = DEFAULT_NAMESPACE
    claim_token: str = ""
    expiry: RequestedExpiry = RequestedExpiry()
    result: bytes = b""
    allow_shortening: bool = False

    def __repr__(self) -> str:
        return _without_token(self)


class ClaimAnswer(NamedTuple):
    """The outcome of a claim, and the transaction as the store holds it now.

    `claim_token` is the caller's own. The transaction's token may be another one, which only its holder may see.
    """

    outcome: ClaimOutcome
    transaction: Transaction
    claim_token: str
    replayed: bool = False
    shadow_duplicate: bool = False

    def __repr__(self) -> str:
        return _without_token(self)


@dataclass(frozen=True, slots=True)
class Completion:
    """In progress to completed, with a result; `expiry` ends the retention."""

    namespace: str
    transaction_id: str
    claim_token: str = field(repr=False)
    result: bytes
    completion_time_ms: int
    expiry: Expiry

    def of(self, holder: Transaction) -> Transaction | None:
        """Return the completed transaction, `holder` itself for a repeated completion, or None if not held."""
        if holder.claim_token != self.claim_token:
            return None
        if holder.state is TransactionState.COMPLETED:
            return holder if holder.result == self.result else None
        return holder._replace(
            state=TransactionState.COMPLETED,
            result=self.result,
            completion_time_ms=self.completion_time_ms,
            expire_time_ms=self.expiry.time_ms,
        )


@dataclass(frozen=True, slots=True)
class Extension:
    """A later end of a claim in progress, or an earlier one where `allow_shortening` is set."""

    namespace: str
    transaction_id: str
    claim_token: str = field(repr=False)
    expiry: Expiry
    allow_shortening: bool

    def of(self, holder: Transaction) -> Transaction | None:
        """Return the extended transaction, `holder` itself if it would become shorter, or None if not held."""
        if holder.claim_token != self.claim_token or holder.state is not TransactionState.IN_PROGRESS:
            return None
        if not self.allow_shortening and holder.expire_time_ms and self.expiry.time_ms <= holder.expire_time_ms:
            return holder
        return holder._replace(expire_time_ms=self.expiry.time_ms)


@dataclass(frozen=True, slots=True)
class Release:
    """Deletion of a claim in progress."""

    namespace: str
    transaction_id: str
    claim_token: str = field(repr=False)

    def releases(self, holder: Transaction) -> bool:
        """Return whether the token holds the transaction in progress."""
        return holder.claim_token == self.claim_token and holder.state is TransactionState.IN_PROGRESS

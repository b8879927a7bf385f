"""What the holder of a token may do with a transaction: pure functions that every store carries out atomically."""

from dataclasses import dataclass, field

from dedup_service.claims.transaction import Expiry, Transaction, TransactionState


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

"""What a token may do with the transaction that it holds: pure functions, which every store carries out atomically."""

from dataclasses import dataclass, field

from dedup_service.claims.transaction import Transaction, TransactionState


@dataclass(frozen=True, slots=True)
class Completion:
    """In progress to completed, with a result. `ttl_ms` is set when the end was given relative to now."""

    namespace: str
    transaction_id: str
    claim_token: str = field(repr=False)
    result: bytes
    completion_time_ms: int
    expire_time_ms: int
    ttl_ms: int | None

    def of(self, holder: Transaction) -> Transaction | None:
        """Return the transaction after it, `holder` itself when this was done before, or None when it is not held."""
        if holder.claim_token != self.claim_token:
            return None
        if holder.state is TransactionState.COMPLETED:
            return holder if holder.result == self.result else None
        return holder._replace(
            state=TransactionState.COMPLETED,
            result=self.result,
            completion_time_ms=self.completion_time_ms,
            expire_time_ms=self.expire_time_ms,
        )


@dataclass(frozen=True, slots=True)
class Extension:
    """A later end of a claim in progress, or an earlier one where that is allowed. `ttl_ms` is as in Completion."""

    namespace: str
    transaction_id: str
    claim_token: str = field(repr=False)
    expire_time_ms: int
    ttl_ms: int | None
    allow_shortening: bool

    def of(self, holder: Transaction) -> Transaction | None:
        """Return the transaction after it, `holder` itself when it would shorten it, or None when it is not held."""
        if holder.claim_token != self.claim_token or holder.state is not TransactionState.IN_PROGRESS:
            return None
        if not self.allow_shortening and holder.expire_time_ms and self.expire_time_ms <= holder.expire_time_ms:
            return holder
        return holder._replace(expire_time_ms=self.expire_time_ms)


@dataclass(frozen=True, slots=True)
class Release:
    """A claim in progress given back."""

    namespace: str
    transaction_id: str
    claim_token: str = field(repr=False)

    def releases(self, holder: Transaction) -> bool:
        """Return whether `holder` is to be forgotten."""
        return holder.claim_token == self.claim_token and holder.state is TransactionState.IN_PROGRESS

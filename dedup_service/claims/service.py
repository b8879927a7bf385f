"""The claim semantics: what is asked of the store, and what its answer means. It knows no protocol and no database."""

import secrets
import time
from collections.abc import Callable

from dedup_service.claims.errors import Applied, InvalidRequest, StoreUnavailable, TransactionNotFound
from dedup_service.claims.limits import DEFAULT_NAMESPACE, Policy, claim_violations, identity_violations
from dedup_service.claims.store import ClaimStore
from dedup_service.claims.transaction import ClaimAnswer, ClaimOutcome, ClaimRequest, Transaction, TransactionState


def system_clock_ms() -> int:
    """Return the Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class ClaimService:
    """Admits each transaction at most once, over any store."""

    def __init__(self, store: ClaimStore, policy: Policy, clock_ms: Callable[[], int] = system_clock_ms) -> None:
        self._store = store
        self._policy = policy
        self._clock_ms = clock_ms

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim a transaction with one atomic command of the store.

        CLAIMED only when the store took this very claim, or holds one in progress with the caller's own token (then
        `replayed`). Raises InvalidRequest before anything is written, StoreUnavailable and UnreadableValue.
        """
        now_ms = self._clock_ms()
        namespace = request.namespace or DEFAULT_NAMESPACE
        if violations := tuple(claim_violations(request, namespace, self._policy, now_ms)):
            raise InvalidRequest(*violations)
        ttl_ms = request.ttl_ms
        if ttl_ms is None and request.expire_time_ms is None:
            ttl_ms = self._policy.default_ttl_ms
        claim = Transaction(
            namespace=namespace,
            transaction_id=request.transaction_id,
            claim_token=request.claim_token or secrets.token_urlsafe(16),
            claimant=request.claimant,
            claim_time_ms=now_ms,
            expire_time_ms=request.expire_time_ms if ttl_ms is None else now_ms + ttl_ms,
            payload_fingerprint=request.payload_fingerprint,
        )
        return decide(claim, await self._store.claim(claim, ttl_ms))

    async def get(self, namespace: str, transaction_id: str) -> Transaction:
        """Return a transaction and change nothing.

        Raises TransactionNotFound, InvalidRequest, StoreUnavailable and UnreadableValue.
        """
        namespace = namespace or DEFAULT_NAMESPACE
        if violations := tuple(identity_violations(transaction_id, namespace)):
            raise InvalidRequest(*violations)
        try:
            transaction = await self._store.get(namespace, transaction_id)
        except StoreUnavailable as error:
            # Whatever became of the question, it changed nothing.
            raise StoreUnavailable(error.reason, str(error), Applied.NO) from error
        if transaction is None:
            raise TransactionNotFound(f"no transaction with this id is claimed in the namespace {namespace!r}")
        return transaction


def decide(claim: Transaction, holder: Transaction | None) -> ClaimAnswer:
    """Return what it means that a store met `holder` when it was asked to keep `claim`."""
    if holder is None:
        return ClaimAnswer(ClaimOutcome.CLAIMED, claim)
    fingerprints = (claim.payload_fingerprint, holder.payload_fingerprint)
    if all(fingerprints) and fingerprints[0] != fingerprints[1]:
        return ClaimAnswer(ClaimOutcome.PAYLOAD_MISMATCH, holder)
    # A completed transaction is a duplicate even to its own token: CLAIMED always means that there is work to do.
    if holder.claim_token == claim.claim_token and holder.state is TransactionState.IN_PROGRESS:
        return ClaimAnswer(ClaimOutcome.CLAIMED, holder, replayed=True)
    return ClaimAnswer(ClaimOutcome.DUPLICATE, holder)

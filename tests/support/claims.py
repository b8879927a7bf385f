"""Claims and expiries to put into stores."""

from dedup_service.claims import ClaimStore, Expiry, Transaction, system_clock_ms


def a_claim(
    transaction_id: str, *, ttl_ms: int = 60_000, token: str = "token-of-sixteen", **fields: object
) -> Transaction:
    """Return a claim made now."""
    now_ms = system_clock_ms()
    values: dict[str, object] = {
        "namespace": "default",
        "claimant": "",
        "claim_time_ms": now_ms,
        "expire_time_ms": now_ms + ttl_ms,
    }
    return Transaction(transaction_id=transaction_id, claim_token=token, **(values | fields))  # type: ignore[arg-type]


def lasting(ttl_ms: int) -> Expiry:
    """Return an expiry by ttl, counted by the clock of the store."""
    return Expiry(system_clock_ms() + ttl_ms, ttl_ms)


def end_of(claim: Transaction) -> Expiry:
    """Return the expire time of a claim as an absolute expiry."""
    assert claim.expire_time_ms is not None
    return Expiry(claim.expire_time_ms)


async def claim_to_end(store: ClaimStore, claim: Transaction) -> Transaction | None:
    """Claim, with the expire time that `claim` has."""
    return await store.claim(claim, end_of(claim))


MINUTE = lasting(60_000)

"""Claims to put into stores."""

from dedup_service.claims import Transaction, system_clock_ms


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

"""From Python's values to the messages of the contract."""

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.ids import new_claim_token
from dedup.v1 import dedup_pb2

Span = timedelta | float
"""A length of time: a timedelta, or seconds."""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def seconds(span: Span) -> float:
    """Return a span in seconds."""
    return span.total_seconds() if isinstance(span, timedelta) else float(span)


def duration(span: Span | None) -> Duration | None:
    """Return a span to the millisecond, which is as fine as the service counts."""
    if span is None:
        return None
    message = Duration()
    message.FromMilliseconds(round(seconds(span) * 1000))
    return message


def timestamp(moment: datetime | None) -> Timestamp | None:
    """Return a moment to the millisecond.

    Raises ValueError for a naive time: nobody knows which moment it means.
    """
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise ValueError("expire_time has no time zone: use an aware datetime, such as datetime.now(UTC)")
    message = Timestamp()
    message.FromMilliseconds((moment - _EPOCH) // timedelta(milliseconds=1))
    return message


def refuse_both(ttl: Span | None, expire_time: datetime | None) -> None:
    """Raise ValueError when an expiry is given in both ways."""
    if ttl is not None and expire_time is not None:
        raise ValueError("give a ttl or an expire_time, not both")


def claim_request(
    transaction_id: str,
    *,
    ttl: Span | None,
    expire_time: datetime | None,
    namespace: str,
    claimant: str,
    fingerprint: bytes,
    token: str | None,
) -> dedup_pb2.ClaimTransactionRequest:
    """Return the request of one logical claim, which all its attempts repeat.

    It always has a token of this caller's: without one, the service would make a new one for each attempt, and a retry
    would be the duplicate of the attempt whose answer was lost.
    """
    refuse_both(ttl, expire_time)
    return dedup_pb2.ClaimTransactionRequest(
        transaction_id=transaction_id,
        namespace=namespace,
        ttl=duration(ttl),
        expire_time=timestamp(expire_time),
        claim_token=token or new_claim_token(),
        claimant=claimant,
        payload_fingerprint=fingerprint,
    )

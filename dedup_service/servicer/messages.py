"""Messages to domain values and back: protobuf durations and times at the edge, integer milliseconds inside."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2
from dedup_service.claims import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    FieldViolation,
    InvalidRequest,
    Transaction,
)

_NANOS_PER_MS = 1_000_000
_NANOS_PER_SECOND = 1_000_000_000
_EITHER_SIGN = range(1 - _NANOS_PER_SECOND, _NANOS_PER_SECOND)
_OUTCOMES = {
    ClaimOutcome.CLAIMED: dedup_pb2.CLAIM_OUTCOME_CLAIMED,
    ClaimOutcome.DUPLICATE: dedup_pb2.CLAIM_OUTCOME_DUPLICATE,
    ClaimOutcome.PAYLOAD_MISMATCH: dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH,
}


def claim_request(message: dedup_pb2.ClaimTransactionRequest) -> ClaimRequest:
    """Return the claim that a message asks for; raise InvalidRequest for what milliseconds cannot say."""
    expiry = message.WhichOneof("expiry")
    return ClaimRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace,
        ttl_ms=milliseconds("ttl", message.ttl) if expiry == "ttl" else None,
        expire_time_ms=milliseconds("expire_time", message.expire_time) if expiry == "expire_time" else None,
        claim_token=message.claim_token,
        claimant=message.claimant,
        payload_fingerprint=message.payload_fingerprint,
    )


def claim_response(answer: ClaimAnswer) -> dedup_pb2.ClaimTransactionResponse:
    """Return the message of an answer; the token is in it only when the outcome is CLAIMED."""
    claimed = answer.outcome is ClaimOutcome.CLAIMED
    return dedup_pb2.ClaimTransactionResponse(
        outcome=_OUTCOMES[answer.outcome],
        claim_token=answer.transaction.claim_token if claimed else None,
        replayed=answer.replayed,
        transaction=transaction_message(answer.transaction),
    )


def transaction_message(transaction: Transaction) -> dedup_pb2.Transaction:
    """Return the message that shows a transaction to anybody: without its token."""
    return dedup_pb2.Transaction(
        transaction_id=transaction.transaction_id,
        namespace=transaction.namespace,
        # The numbers of the domain are those of the contract.
        state=transaction.state.value,  # type: ignore[arg-type]
        claimant=transaction.claimant,
        claim_time=_timestamp(transaction.claim_time_ms),
        expire_time=_timestamp(transaction.expire_time_ms),
        completion_time=_timestamp(transaction.completion_time_ms),
        result=transaction.result,
    )


def milliseconds(field: str, value: Duration | Timestamp) -> int:
    """Return a duration or time in whole milliseconds; raise InvalidRequest when it is malformed or finer than that."""
    nanos_allowed = range(_NANOS_PER_SECOND) if isinstance(value, Timestamp) or value.seconds > 0 else _EITHER_SIGN
    if value.nanos not in nanos_allowed or value.seconds < 0 < value.nanos:
        raise InvalidRequest(
            FieldViolation(field, "is malformed: nanos must be below a second, with the sign of seconds")
        )
    if value.nanos % _NANOS_PER_MS:
        raise InvalidRequest(FieldViolation(field, "is finer than a millisecond: send whole milliseconds"))
    return value.seconds * 1_000 + value.nanos // _NANOS_PER_MS


def _timestamp(unix_ms: int | None) -> Timestamp | None:
    if unix_ms is None:
        return None
    seconds, ms = divmod(unix_ms, 1_000)
    return Timestamp(seconds=seconds, nanos=ms * _NANOS_PER_MS)

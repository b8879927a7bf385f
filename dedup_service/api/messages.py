"""Messages to domain values and back: protobuf durations and times at the edge, integer milliseconds inside."""

from typing import Protocol

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2
from dedup_service.claims import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    FieldViolation,
    HolderRequest,
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
    ttl_ms, expire_time_ms = _lifetime(message, message.WhichOneof("expiry"))
    return ClaimRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace,
        ttl_ms=ttl_ms,
        expire_time_ms=expire_time_ms,
        claim_token=message.claim_token,
        claimant=message.claimant,
        payload_fingerprint=message.payload_fingerprint,
        wait_ms=milliseconds("wait", message.wait) if message.HasField("wait") else 0,
    )


def batched_claim_request(message: dedup_pb2.ClaimTransactionRequest) -> ClaimRequest:
    """Return the claim that an entry of a batch asks for; raise InvalidRequest also for one that would wait."""
    claim = claim_request(message)
    if claim.wait_ms:
        raise InvalidRequest(FieldViolation("wait", "is not for batches: claim this transaction alone"))
    return claim


def complete_request(message: dedup_pb2.CompleteTransactionRequest) -> HolderRequest:
    """Return the completion that a message asks for; raise InvalidRequest as `claim_request`."""
    ttl_ms, expire_time_ms = _lifetime(message, message.WhichOneof("retention"))
    return HolderRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace,
        claim_token=message.claim_token,
        ttl_ms=ttl_ms,
        expire_time_ms=expire_time_ms,
        result=message.result,
    )


def release_request(message: dedup_pb2.ReleaseTransactionRequest) -> HolderRequest:
    """Return the release that a message asks for."""
    return HolderRequest(message.transaction_id, message.namespace, message.claim_token)


def extend_request(message: dedup_pb2.ExtendTransactionRequest) -> HolderRequest:
    """Return the extension that a message asks for; raise InvalidRequest as `claim_request`."""
    ttl_ms, expire_time_ms = _lifetime(message, message.WhichOneof("expiry"))
    return HolderRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace,
        claim_token=message.claim_token,
        ttl_ms=ttl_ms,
        expire_time_ms=expire_time_ms,
        allow_shortening=message.allow_shortening,
    )


def claim_response(answer: ClaimAnswer) -> dedup_pb2.ClaimTransactionResponse:
    """Return the message of an answer; the token is in it only when the outcome is CLAIMED."""
    message = dedup_pb2.ClaimTransactionResponse()
    fill_claim_response(message, answer)
    return message


def fill_claim_response(message: dedup_pb2.ClaimTransactionResponse, answer: ClaimAnswer) -> None:
    """Put an answer into an empty message; one that is a part of a larger message need not be copied into it then."""
    message.outcome = _OUTCOMES[answer.outcome]
    if answer.outcome is ClaimOutcome.CLAIMED:
        message.claim_token = answer.claim_token
    message.replayed = answer.replayed
    message.shadow_duplicate = answer.shadow_duplicate
    _fill_transaction(message.transaction, answer.transaction)


def transaction_message(transaction: Transaction) -> dedup_pb2.Transaction:
    """Return the message that shows a transaction to anybody: without its token."""
    message = dedup_pb2.Transaction()
    _fill_transaction(message, transaction)
    return message


def _fill_transaction(message: dedup_pb2.Transaction, transaction: Transaction) -> None:
    message.transaction_id = transaction.transaction_id
    message.namespace = transaction.namespace
    # The numbers of the domain are those of the contract.
    message.state = transaction.state.value  # type: ignore[assignment]
    message.claimant = transaction.claimant
    message.result = transaction.result
    if transaction.claim_time_ms is not None:
        _fill_time(message.claim_time, transaction.claim_time_ms)
    if transaction.expire_time_ms is not None:
        _fill_time(message.expire_time, transaction.expire_time_ms)
    if transaction.completion_time_ms is not None:
        _fill_time(message.completion_time, transaction.completion_time_ms)


class WithLifetime(Protocol):
    """A request with a ttl or an expire time."""

    ttl: Duration
    expire_time: Timestamp


def _lifetime(message: WithLifetime, chosen: str | None) -> tuple[int | None, int | None]:
    if chosen == "ttl":
        return milliseconds("ttl", message.ttl), None
    if chosen == "expire_time":
        return None, milliseconds("expire_time", message.expire_time)
    return None, None


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


def _fill_time(message: Timestamp, unix_ms: int) -> None:
    message.seconds, ms = divmod(unix_ms, 1_000)
    message.nanos = ms * _NANOS_PER_MS

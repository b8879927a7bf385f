"""Converts messages to domain values and back: protobuf times at the edge, integer milliseconds inside."""

from typing import Protocol

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2
from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    FieldViolation,
    HolderRequest,
    InvalidRequest,
    RequestedExpiry,
    Transaction,
)

_NANOS_PER_MS = 1_000_000
_NANOS_PER_SECOND = 1_000_000_000
_EITHER_SIGN = range(1 - _NANOS_PER_SECOND, _NANOS_PER_SECOND)
_DEFAULT_EXPIRY = RequestedExpiry()
_OUTCOMES = {
    ClaimOutcome.CLAIMED: dedup_pb2.CLAIM_OUTCOME_CLAIMED,
    ClaimOutcome.DUPLICATE: dedup_pb2.CLAIM_OUTCOME_DUPLICATE,
    ClaimOutcome.PAYLOAD_MISMATCH: dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH,
}


def claim_request(message: dedup_pb2.ClaimTransactionRequest) -> ClaimRequest:
    """Return the claim. Raises InvalidRequest for a time that is malformed or finer than a millisecond."""
    return ClaimRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace or DEFAULT_NAMESPACE,
        expiry=_expiry(message, message.WhichOneof("expiry")),
        claim_token=message.claim_token,
        claimant=message.claimant,
        payload_fingerprint=message.payload_fingerprint,
        wait_ms=milliseconds("wait", message.wait) if message.HasField("wait") else 0,
    )


def batched_claim_request(message: dedup_pb2.ClaimTransactionRequest) -> ClaimRequest:
    """Return an entry of a batch. Raises InvalidRequest as `claim_request`, and for one that would wait."""
    claim = claim_request(message)
    if claim.wait_ms:
        raise InvalidRequest(FieldViolation("wait", "is not allowed in a batch: claim this transaction alone"))
    return claim


def complete_request(message: dedup_pb2.CompleteTransactionRequest) -> HolderRequest:
    """Return the completion. Raises InvalidRequest as `claim_request`."""
    return HolderRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace or DEFAULT_NAMESPACE,
        claim_token=message.claim_token,
        expiry=_expiry(message, message.WhichOneof("retention")),
        result=message.result,
    )


def release_request(message: dedup_pb2.ReleaseTransactionRequest) -> HolderRequest:
    """Return the release."""
    return HolderRequest(message.transaction_id, message.namespace or DEFAULT_NAMESPACE, message.claim_token)


def extend_request(message: dedup_pb2.ExtendTransactionRequest) -> HolderRequest:
    """Return the extension. Raises InvalidRequest as `claim_request`."""
    return HolderRequest(
        transaction_id=message.transaction_id,
        namespace=message.namespace or DEFAULT_NAMESPACE,
        claim_token=message.claim_token,
        expiry=_expiry(message, message.WhichOneof("expiry")),
        allow_shortening=message.allow_shortening,
    )


def claim_response(answer: ClaimAnswer) -> dedup_pb2.ClaimTransactionResponse:
    """Return the message of an answer; only CLAIMED carries the token."""
    message = dedup_pb2.ClaimTransactionResponse()
    fill_claim_response(message, answer)
    return message


def fill_claim_response(message: dedup_pb2.ClaimTransactionResponse, answer: ClaimAnswer) -> None:
    """Fill an empty message, which may be part of a larger one, with an answer."""
    message.outcome = _OUTCOMES[answer.outcome]
    if answer.outcome is ClaimOutcome.CLAIMED:
        message.claim_token = answer.claim_token
    message.replayed = answer.replayed
    message.shadow_duplicate = answer.shadow_duplicate
    _fill_transaction(message.transaction, answer.transaction)


def transaction_message(transaction: Transaction) -> dedup_pb2.Transaction:
    """Return the public message of a transaction, without its token."""
    message = dedup_pb2.Transaction()
    _fill_transaction(message, transaction)
    return message


def _fill_transaction(message: dedup_pb2.Transaction, transaction: Transaction) -> None:
    message.transaction_id = transaction.transaction_id
    message.namespace = transaction.namespace
    # The domain has the numbers of the contract.
    message.state = transaction.state.value  # type: ignore[assignment]
    message.claimant = transaction.claimant
    message.result = transaction.result
    if transaction.claim_time_ms is not None:
        _fill_time(message.claim_time, transaction.claim_time_ms)
    if transaction.expire_time_ms is not None:
        _fill_time(message.expire_time, transaction.expire_time_ms)
    if transaction.completion_time_ms is not None:
        _fill_time(message.completion_time, transaction.completion_time_ms)


class WithExpiry(Protocol):
    """A request with a ttl or an expire time."""

    ttl: Duration
    expire_time: Timestamp


def _expiry(message: WithExpiry, chosen: str | None) -> RequestedExpiry:
    if chosen == "ttl":
        return RequestedExpiry(ttl_ms=milliseconds("ttl", message.ttl))
    if chosen == "expire_time":
        return RequestedExpiry(time_ms=milliseconds("expire_time", message.expire_time))
    return _DEFAULT_EXPIRY


def milliseconds(field: str, value: Duration | Timestamp) -> int:
    """Return a duration or time in whole milliseconds. Raises InvalidRequest if it is malformed or finer than that."""
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

"""The limits of the contract, each checked in one place. A violation names its field, the limit and the remedy."""

import re
from collections.abc import Iterator

from dedup_service.claims.errors import FieldViolation, InvalidRequest
from dedup_service.claims.policies import Policy
from dedup_service.claims.transaction import ClaimRequest, Expiry, HolderRequest, RequestedExpiry
from dedup_service.config.durations import format_duration

MAX_TRANSACTION_ID_BYTES = 512
MAX_CLAIMANT_BYTES = 256
MIN_TOKEN_LENGTH = 16
MAX_TOKEN_LENGTH = 64
MAX_FINGERPRINT_BYTES = 64
MAX_WAIT_MS = 300_000

_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_TOKEN = re.compile(r"[\x20-\x7e]{16,64}")
# Unicode's category Cc: the C0 controls, delete, and the C1 controls.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def namespace_fault(namespace: str) -> str | None:
    """Return what is wrong with the name of a namespace, or None."""
    if _NAMESPACE.fullmatch(namespace):
        return None
    return "must be 1 to 63 of the characters a-z, 0-9, '_', '.' and '-', and begin with a letter or digit"


def identity_violations(transaction_id: str, namespace: str) -> Iterator[FieldViolation]:
    """Yield the faults of a transaction id and its namespace."""
    size = len(transaction_id.encode())
    if not size:
        yield FieldViolation("transaction_id", "is empty: send the id of the transaction, 1 to 512 bytes of UTF-8")
    elif size > MAX_TRANSACTION_ID_BYTES:
        yield FieldViolation(
            "transaction_id",
            f"has {size} bytes of UTF-8, at most {MAX_TRANSACTION_ID_BYTES} are allowed: send a digest of a longer id",
        )
    if control := _CONTROL.search(transaction_id):
        yield FieldViolation("transaction_id", _control_character(control))
    if fault := namespace_fault(namespace):
        yield FieldViolation("namespace", fault)


def claim_violations(request: ClaimRequest, policy: Policy) -> Iterator[FieldViolation]:
    """Yield every fault of a claim."""
    yield from identity_violations(request.transaction_id, request.namespace)
    yield from _ttl_violations(request.expiry, policy)
    if request.claim_token and not _TOKEN.fullmatch(request.claim_token):
        yield FieldViolation(
            "claim_token",
            f"must be {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH} printable ASCII characters: "
            "send a fresh random one for each logical call, or leave it out",
        )
    if len(request.claimant.encode()) > MAX_CLAIMANT_BYTES:
        yield FieldViolation("claimant", f"has more than {MAX_CLAIMANT_BYTES} bytes of UTF-8: shorten it")
    if control := _CONTROL.search(request.claimant):
        yield FieldViolation("claimant", _control_character(control))
    if len(request.payload_fingerprint) > MAX_FINGERPRINT_BYTES:
        yield FieldViolation(
            "payload_fingerprint",
            f"has {len(request.payload_fingerprint)} bytes, at most {MAX_FINGERPRINT_BYTES} are allowed: send a digest",
        )
    if request.wait_ms < 0:
        yield FieldViolation("wait", "is negative: leave it out to receive the answer at once")
    elif request.wait_ms > MAX_WAIT_MS:
        longest = format_duration(MAX_WAIT_MS)
        yield FieldViolation(
            "wait", f"is longer than the maximum of {longest}: shorten it, or set a deadline of at most {longest}"
        )


def holder_violations(request: HolderRequest, policy: Policy, max_result_bytes: int) -> Iterator[FieldViolation]:
    """Yield every fault of a completion, an extension or a release."""
    yield from identity_violations(request.transaction_id, request.namespace)
    yield from _ttl_violations(request.expiry, policy)
    if not request.claim_token:
        yield FieldViolation("claim_token", "is empty: send the token the claim returned")
    elif not _TOKEN.fullmatch(request.claim_token):
        yield FieldViolation("claim_token", "is not a claim token: send the one the claim returned")
    if len(request.result) > max_result_bytes:
        yield FieldViolation(
            "result",
            f"has {len(request.result)} bytes, at most {max_result_bytes} are allowed: store it elsewhere, send a key",
        )


def _ttl_violations(expiry: RequestedExpiry, policy: Policy) -> Iterator[FieldViolation]:
    if expiry.ttl_ms is not None:
        if expiry.ttl_ms <= 0:
            yield FieldViolation("ttl", "must be at least 1 ms: leave it out for the default of the namespace")
        elif expiry.ttl_ms > policy.max_ttl_ms:
            yield FieldViolation("ttl", f"is longer than the maximum of {format_duration(policy.max_ttl_ms)}")


def end_by_store_clock(expiry: Expiry, now_ms: int) -> int:
    """Return the end of a record where the clock of the store reads `now_ms`.

    Raises InvalidRequest for an expire time that is past or too far away.
    """
    if expiry.ttl_ms is not None:
        return now_ms + expiry.ttl_ms
    if expiry.time_ms <= now_ms:
        raise expire_time_past()
    if expiry.max_ttl_ms is not None and expiry.time_ms - now_ms > expiry.max_ttl_ms:
        raise expire_time_too_far(expiry.max_ttl_ms)
    return expiry.time_ms


def expire_time_past() -> InvalidRequest:
    """Return the refusal of an expire time that is past by the clock of the store."""
    return InvalidRequest(
        FieldViolation("expire_time", "is in the past by the clock of the store: send a later time, or a ttl")
    )


def expire_time_too_far(max_ttl_ms: int) -> InvalidRequest:
    """Return the refusal of an expire time that is too far away by the clock of the store."""
    limit = format_duration(max_ttl_ms)
    return InvalidRequest(
        FieldViolation("expire_time", f"is further away than the maximum ttl of {limit} by the clock of the store")
    )


def _control_character(match: re.Match[str]) -> str:
    return f"has the control character U+{ord(match[0]):04X} at position {match.start()}: remove it"

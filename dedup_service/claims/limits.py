"""The limits of the contract, each checked in one place; every violation names its field, the limit and the remedy."""

import re
from collections.abc import Iterator

from dedup_service.claims.errors import FieldViolation
from dedup_service.claims.policy import Policy
from dedup_service.claims.transaction import ClaimRequest, HolderRequest
from dedup_service.durations import format_duration

DEFAULT_NAMESPACE = "default"

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


def identity_violations(transaction_id: str, namespace: str) -> Iterator[FieldViolation]:
    """Yield what is wrong with a transaction id and its namespace (already defaulted)."""
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
    if not _NAMESPACE.fullmatch(namespace):
        yield FieldViolation(
            "namespace",
            "must be 1 to 63 of the characters a-z, 0-9, '_', '.' and '-', and begin with a letter or digit",
        )


def claim_violations(request: ClaimRequest, namespace: str, policy: Policy, now_ms: int) -> Iterator[FieldViolation]:
    """Yield everything that is wrong with a claim, for a namespace already defaulted."""
    yield from identity_violations(request.transaction_id, namespace)
    yield from expiry_violations(request.ttl_ms, request.expire_time_ms, policy, now_ms)
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
        yield FieldViolation("wait", "is negative: leave it out in order not to wait")
    elif request.wait_ms > MAX_WAIT_MS:
        yield FieldViolation("wait", f"is longer than the maximum of {format_duration(MAX_WAIT_MS)}")


def holder_violations(
    request: HolderRequest, namespace: str, policy: Policy, now_ms: int, max_result_bytes: int
) -> Iterator[FieldViolation]:
    """Yield everything that is wrong with a completion, an extension or a release."""
    yield from identity_violations(request.transaction_id, namespace)
    yield from expiry_violations(request.ttl_ms, request.expire_time_ms, policy, now_ms)
    if not request.claim_token:
        yield FieldViolation("claim_token", "is empty: send the token that the claim returned")
    elif not _TOKEN.fullmatch(request.claim_token):
        yield FieldViolation("claim_token", "is no claim token: send the one that the claim returned")
    if len(request.result) > max_result_bytes:
        yield FieldViolation(
            "result",
            f"has {len(request.result)} bytes, at most {max_result_bytes} are allowed: keep it elsewhere, send a key",
        )


def expiry_violations(
    ttl_ms: int | None, expire_time_ms: int | None, policy: Policy, now_ms: int
) -> Iterator[FieldViolation]:
    """Yield what is wrong with a ttl or an expire time against a policy."""
    if ttl_ms is not None:
        if ttl_ms <= 0:
            yield FieldViolation("ttl", "must be at least 1 ms: leave it out for the default of the namespace")
        elif ttl_ms > policy.max_ttl_ms:
            yield FieldViolation("ttl", f"is longer than the maximum of {format_duration(policy.max_ttl_ms)}")
    if expire_time_ms is not None:
        if expire_time_ms <= now_ms:
            yield FieldViolation("expire_time", "is in the past: send a time in the future, or a ttl")
        elif expire_time_ms - now_ms > policy.max_ttl_ms:
            yield FieldViolation(
                "expire_time", f"is further away than the maximum ttl of {format_duration(policy.max_ttl_ms)}"
            )


def _control_character(match: re.Match[str]) -> str:
    return f"has the control character U+{ord(match[0]):04X} at position {match.start()}: remove it"

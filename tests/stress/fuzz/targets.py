"""The fuzz targets. Each takes arbitrary bytes and raises only if a promise about them is broken."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgpack

from dedup.v1 import dedup_pb2
from dedup_service.api import messages
from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    ClaimOutcome,
    ClaimRequest,
    HolderRequest,
    InvalidRequest,
    Policy,
    RequestedExpiry,
    Transaction,
    UnreadableValue,
)
from dedup_service.claims.limits import claim_violations, holder_violations, identity_violations
from dedup_service.claims.service import decide
from dedup_service.config.errors import BadSettings
from dedup_service.config.settings import Settings
from dedup_service.server.policies import load_policies
from dedup_service.stores import stored_value
from tests.stress.fuzz.wire import NotAMessage, fields
from tests.support.decoding import decoded

Target = Callable[[bytes], None]

NOW_MS = 1_700_000_000_000
POLICY = Policy(default_ttl_ms=60_000, max_ttl_ms=3_600_000, retention_ms=600_000)
_ASKED = Transaction("pay", "x", "token-of-the-asker", "asker", NOW_MS, NOW_MS + 60_000)
_UNKNOWN = Transaction("pay", "x", None, "", None, None)
_MAX_RESULT_BYTES = 4_096


def read_stored_value(data: bytes) -> None:
    """A stored value is a holder, a claim by an unknown holder, or UnreadableValue; only its own token may get CLAIMED.

    A decoded value can be sent to callers, and decodes to the same claim after it is encoded again.
    """
    try:
        holder = stored_value.decode(data, "pay", "x")
    except UnreadableValue:
        return
    outcome = decide(_ASKED, "token-of-the-asker", holder).outcome
    mine = holder.claim_token == "token-of-the-asker"
    assert mine or outcome is not ClaimOutcome.CLAIMED, "CLAIMED for a token that does not hold the claim"
    messages.transaction_message(holder).SerializeToString()
    if holder == _UNKNOWN:
        assert not _is_versioned(data), "a value of this service was read as one of another writer"
        return
    for again in (stored_value.encode(holder), stored_value.encode(holder, over=data)):
        assert stored_value.decode(again, "pay", "x") == holder, "encoding and decoding changed the claim"


@cache
def _policy_file() -> tuple[Any, Settings]:
    # One file for all inputs: removing a file takes longer than reading it.
    file = tempfile.NamedTemporaryFile(suffix=".toml", buffering=0)  # noqa: SIM115 - open until the process ends
    settings = Settings(policy_file=Path(file.name), default_ttl=60_000, max_ttl=3_600_000, retention=600_000)
    return file, settings


def _is_versioned(data: bytes) -> bool:
    try:
        value = msgpack.unpackb(data)
    except ValueError:
        return False
    return isinstance(value, list) and value != [] and type(value[0]) is int


def read_policy_file(data: bytes) -> None:
    """A policy file is a consistent set of rules, or BadSettings with one line that names the file."""
    file, settings = _policy_file()
    file.seek(0)
    file.truncate()
    file.write(data)
    try:
        policies = load_policies(settings)
    except BadSettings as error:
        sentence = str(error)
        assert file.name in sentence, "the error does not name the file"
        assert sentence.isprintable(), "the error has several lines or control characters"
        return
    for name, policy in policies.namespaces.items():
        assert not list(identity_violations("any", name)), "an invalid namespace was accepted"
        assert 1 <= policy.default_ttl_ms <= policy.max_ttl_ms, "the default ttl is above the maximum"
        assert 1 <= policy.retention_ms <= policy.max_ttl_ms, "the retention is above the maximum"
        assert policies.of(name) is policy


_REQUESTS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (dedup_pb2.ClaimTransactionRequest, messages.claim_request),
    (dedup_pb2.CompleteTransactionRequest, messages.complete_request),
    (dedup_pb2.ReleaseTransactionRequest, messages.release_request),
    (dedup_pb2.ExtendTransactionRequest, messages.extend_request),
    (dedup_pb2.GetTransactionRequest, lambda message: message),
    (dedup_pb2.BatchClaimTransactionsRequest, lambda message: message),
)


def read_request(data: bytes) -> None:
    """Any bytes are a request within every limit, or rejected with violations in printable words.

    The first byte chooses the rpc, in the order of the contract.
    """
    if not data:
        return
    request_type, convert = _REQUESTS[data[0] % len(_REQUESTS)]
    raw = data[1:]
    try:
        message = decoded(request_type, raw)
        _check_oneofs(request_type.DESCRIPTOR, raw)
        request = convert(message)
    except InvalidRequest as rejection:
        _check_violations(rejection)
        return
    if isinstance(message, dedup_pb2.BatchClaimTransactionsRequest):
        for entry in message.requests:
            try:
                _check_claim(messages.batched_claim_request(entry))
            except InvalidRequest as rejection:
                _check_violations(rejection)
    elif isinstance(request, ClaimRequest):
        _check_claim(request)
    elif isinstance(request, HolderRequest):
        _check_holder(request)
    else:
        namespace = request.namespace or DEFAULT_NAMESPACE
        if violations := list(identity_violations(request.transaction_id, namespace)):
            _check_violations(InvalidRequest(*violations))
        else:
            _check_identity(request.transaction_id, namespace)


def _check_claim(request: ClaimRequest) -> None:
    if violations := list(claim_violations(request, POLICY)):
        _check_violations(InvalidRequest(*violations))
        return
    _check_identity(request.transaction_id, request.namespace)
    _check_expiry(request.expiry)
    assert not request.claim_token or _is_token(request.claim_token)
    assert len(request.claimant.encode()) <= 256
    assert len(request.payload_fingerprint) <= 64
    assert 0 <= request.wait_ms <= 300_000
    claim = Transaction(
        request.namespace,
        request.transaction_id,
        request.claim_token,
        request.claimant,
        NOW_MS,
        request.expiry.resolve(POLICY.default_ttl_ms, POLICY.max_ttl_ms, NOW_MS).time_ms,
        payload_fingerprint=request.payload_fingerprint,
    )
    assert stored_value.decode(stored_value.encode(claim), request.namespace, request.transaction_id) == claim


def _check_holder(request: HolderRequest) -> None:
    if violations := list(holder_violations(request, POLICY, _MAX_RESULT_BYTES)):
        _check_violations(InvalidRequest(*violations))
        return
    _check_identity(request.transaction_id, request.namespace)
    _check_expiry(request.expiry)
    assert _is_token(request.claim_token)
    assert len(request.result) <= _MAX_RESULT_BYTES


def _check_identity(transaction_id: str, namespace: str) -> None:
    assert 1 <= len(transaction_id.encode()) <= 512
    assert all(ord(character) >= 0x20 and not 0x7F <= ord(character) <= 0x9F for character in transaction_id)
    assert 1 <= len(namespace) <= 63
    assert namespace.isascii()
    assert namespace == namespace.lower()
    assert ":" not in namespace


def _check_expiry(expiry: RequestedExpiry) -> None:
    assert expiry.ttl_ms is None or 1 <= expiry.ttl_ms <= POLICY.max_ttl_ms


def _check_violations(rejection: InvalidRequest) -> None:
    assert rejection.violations, "rejected without a violation"
    for violation in rejection.violations:
        assert violation.field.isprintable(), "the field name has control characters"
        assert violation.description.isprintable(), "the description has control characters"


def _is_token(text: str) -> bool:
    return 16 <= len(text) <= 64 and text.isascii() and text.isprintable()


def _check_oneofs(descriptor: Any, raw: bytes) -> None:
    """Fail if an accepted message has two members of a oneof on the wire."""
    try:
        sent = list(fields(raw))
    except NotAMessage:
        # Groups, which parsers skip.
        return
    for oneof in descriptor.oneofs:
        members = {field.number for field in oneof.fields} & {number for number, _ in sent}
        assert len(members) < 2, f"two members of {oneof.name} were accepted"
    for number, content in sent:
        field = descriptor.fields_by_number.get(number)
        if field is not None and field.message_type is not None:
            _check_oneofs(field.message_type, content)


TARGETS: dict[str, Target] = {
    "stored-value": read_stored_value,
    "policy-file": read_policy_file,
    "request": read_request,
}

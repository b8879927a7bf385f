"""The golden vectors, which every client is tested against, hold for the server, too."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dedup_service.api.errors import (
    ERROR_DOMAIN,
    DeadlinePassed,
    DeadlineTooNear,
    ServerStopping,
    TooManyCalls,
    error_reply,
)
from dedup_service.claims import (
    Applied,
    CallerNotAllowed,
    CallerUnknown,
    ClaimRequest,
    FieldViolation,
    InvalidRequest,
    Policy,
    Reason,
    StoreRefused,
    StoreUnavailable,
    Transaction,
    TransactionNotFound,
    TransactionState,
    UnreadableValue,
)
from dedup_service.claims.limits import claim_violations, identity_violations
from dedup_service.stores.stored_value import UNREADABLE, decode, encode, prefixed_layout, raw_layout

ROOT = Path(__file__).parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "clients" / "golden_vectors.json").read_text())
ERRORS = VECTORS["errors"]["reasons"]

# The exception for each reason; StoreUnavailable for all others.
RAISED: dict[Reason, Exception] = {
    Reason.INVALID_REQUEST: InvalidRequest(FieldViolation("ttl", "is wrong")),
    Reason.CALLER_UNKNOWN: CallerUnknown(),
    Reason.CALLER_NOT_ALLOWED: CallerNotAllowed(),
    Reason.TRANSACTION_NOT_FOUND: TransactionNotFound(),
    Reason.KEY_OF_ANOTHER_TYPE: UnreadableValue(Reason.KEY_OF_ANOTHER_TYPE, "is a list"),
    Reason.STORE_REFUSED: StoreRefused("is too old"),
    Reason.SERVER_STOPPING: ServerStopping(),
    Reason.TOO_MANY_CALLS: TooManyCalls(),
    Reason.DEADLINE_TOO_NEAR: DeadlineTooNear(),
    Reason.DEADLINE_PASSED: DeadlinePassed("too late", Applied.UNKNOWN),
    Reason.INTERNAL: ZeroDivisionError(),
} | {reason: UnreadableValue(reason, text) for reason, text in UNREADABLE.items()}


def token_violations(claim_token: str) -> list[str]:
    """Return the fields that the server rejects in a claim with this token."""
    request = ClaimRequest("x", claim_token=claim_token)
    return [fault.field for fault in claim_violations(request, Policy(1_000, 1_000, 1_000))]


@pytest.mark.parametrize("vector", VECTORS["transaction_ids"]["valid"], ids=lambda vector: repr(vector["id"])[:30])
def test_valid_ids_are_valid_for_the_server(vector: dict[str, Any]) -> None:
    """The server accepts every id that a client builds."""
    assert not list(identity_violations(vector["id"], "default"))


@pytest.mark.parametrize("vector", VECTORS["transaction_ids"]["invalid"], ids=lambda vector: str(vector["why"]))
def test_invalid_ids_are_invalid_for_the_server(vector: dict[str, Any]) -> None:
    """The server would reject the ids that clients refuse to build."""
    escaped = (re.sub("[%:]", lambda found: f"%{ord(found[0]):02X}", part) for part in vector["parts"])
    assert [fault.field for fault in identity_violations(":".join(escaped), "default")] == ["transaction_id"]


def test_tokens_have_the_same_limits() -> None:
    """The server accepts the valid tokens and rejects the invalid ones, except an empty one, which it generates."""
    for token in VECTORS["claim_tokens"]["valid"]:
        assert not token_violations(token)
    for token in VECTORS["claim_tokens"]["invalid"]:
        assert token_violations(token) == (["claim_token"] if token else [])


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=lambda vector: str(vector["key_hex"])[:30])
def test_keys_are_as_written(vector: dict[str, str]) -> None:
    """Every byte, in both layouts."""
    layout = raw_layout if vector["layout"] == "raw" else prefixed_layout(vector["prefix"])
    assert layout(vector["namespace"], vector["transaction_id"]).hex() == vector["key_hex"]


@pytest.mark.parametrize("vector", VECTORS["stored_values"], ids=lambda vector: str(vector["state"]))
def test_stored_values_are_as_written(vector: dict[str, Any]) -> None:
    """Every byte, encoded and decoded."""
    claim = Transaction(
        namespace="default",
        transaction_id="x",
        claim_token=vector["claim_token"],
        claimant=vector["claimant"],
        claim_time_ms=vector["claim_time_ms"],
        expire_time_ms=vector["expire_time_ms"],
        state=TransactionState[vector["state"]],
        payload_fingerprint=bytes.fromhex(vector["payload_fingerprint_hex"]),
        completion_time_ms=vector["completion_time_ms"],
        result=bytes.fromhex(vector["result_hex"]),
    )
    assert encode(claim).hex() == vector["value_hex"]
    assert decode(bytes.fromhex(vector["value_hex"]), "default", "x") == claim


@pytest.mark.parametrize("vector", ERRORS, ids=lambda vector: str(vector["reason"]))
def test_errors_are_as_written(vector: dict[str, Any]) -> None:
    """Code, reason, applied and RetryInfo of each error."""
    applied = Applied(vector["applied"])
    reason = Reason(vector["reason"])
    reply = error_reply(RAISED.get(reason) or StoreUnavailable(reason, "a sentence", applied))
    assert (reply.code.name, reply.failure.reason) == (vector["code"], reason)
    assert reply.failure.applied is applied
    assert (reply.retry_after_ms is not None) is vector["retry_info"]


def test_the_vectors_have_the_domain_and_the_whole_table() -> None:
    """Every exception of the error table is in the vectors."""
    assert VECTORS["errors"]["domain"] == ERROR_DOMAIN
    assert set(RAISED) <= {vector["reason"] for vector in ERRORS}


@pytest.mark.parametrize("vector", ERRORS, ids=lambda vector: str(vector["reason"]))
def test_the_documentation_says_the_same(vector: dict[str, Any]) -> None:
    """The row of each reason has its code, `applied`, and whether there is a RetryInfo."""
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.+\|$", page, re.MULTILINE)]
    documented = {
        reason: (code, applied, retry != "no") for reason, code, applied, retry, _ in (r for r in rows if len(r) == 5)
    }
    assert documented[vector["reason"]] == (vector["code"], vector["applied"], vector["retry_info"])

"""The server agrees with the golden vectors, which every client is tested against too."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dedup_service.api.admission import ServerStopping, TooManyCalls
from dedup_service.api.errors import ERROR_DOMAIN, DeadlinePassed, DeadlineTooNear, failure_of
from dedup_service.claims import (
    Applied,
    CallerNotAllowed,
    CallerUnknown,
    ClaimRequest,
    FieldViolation,
    InvalidRequest,
    Policy,
    StoreRefused,
    StoreUnavailable,
    Transaction,
    TransactionNotFound,
    TransactionState,
    UnreadableValue,
)
from dedup_service.claims.limits import claim_violations, identity_violations
from dedup_service.stores.keys import prefixed_layout, raw_layout
from dedup_service.stores.stored_value import UNREADABLE, decode, encode

ROOT = Path(__file__).parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "clients" / "golden_vectors.json").read_text())
ERRORS = VECTORS["errors"]["reasons"]
SOURCES = "".join(path.read_text() for path in (ROOT / "dedup_service").rglob("*.py"))

# What the server raises for each reason that is not the store's own word.
RAISED: dict[str, Exception] = {
    "INVALID_REQUEST": InvalidRequest(FieldViolation("ttl", "is wrong")),
    "CALLER_UNKNOWN": CallerUnknown(),
    "CALLER_NOT_ALLOWED": CallerNotAllowed(),
    "TRANSACTION_NOT_FOUND": TransactionNotFound(),
    "KEY_OF_ANOTHER_TYPE": UnreadableValue("KEY_OF_ANOTHER_TYPE", "is a list"),
    "STORE_REFUSED": StoreRefused("is too old"),
    "SERVER_STOPPING": ServerStopping(),
    "TOO_MANY_CALLS": TooManyCalls(),
    "DEADLINE_TOO_NEAR": DeadlineTooNear(),
    "DEADLINE_PASSED": DeadlinePassed("too late", Applied.UNKNOWN),
    "INTERNAL": ZeroDivisionError(),
} | {reason: UnreadableValue(reason, text) for reason, text in UNREADABLE.items()}


def violations_of(**fields: str) -> list[str]:
    """Return the fields that the server finds wrong with a claim."""
    request = ClaimRequest(**{"transaction_id": "x"} | fields)  # type: ignore[arg-type]
    return [fault.field for fault in claim_violations(request, "default", Policy(1_000, 1_000, 1_000), 1_000)]


@pytest.mark.parametrize("vector", VECTORS["transaction_ids"]["valid"], ids=lambda vector: repr(vector["id"])[:30])
def test_an_id_of_a_client_is_one_for_the_server(vector: dict[str, Any]) -> None:
    """Whatever parts it was made of."""
    assert not list(identity_violations(vector["id"], "default"))


@pytest.mark.parametrize("vector", VECTORS["transaction_ids"]["invalid"], ids=lambda vector: str(vector["why"]))
def test_what_a_client_refuses_the_server_would_refuse(vector: dict[str, Any]) -> None:
    """Joined by the rule, though never sent."""
    escaped = (re.sub("[%:]", lambda found: f"%{ord(found[0]):02X}", part) for part in vector["parts"])
    assert [fault.field for fault in identity_violations(":".join(escaped), "default")] == ["transaction_id"]


def test_tokens_have_the_same_limits() -> None:
    """A holder's token must be valid; an absent one of a claim is made by the server."""
    for token in VECTORS["claim_tokens"]["valid"]:
        assert not violations_of(claim_token=token)
    for token in VECTORS["claim_tokens"]["invalid"]:
        assert violations_of(claim_token=token) == (["claim_token"] if token else [])


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=lambda vector: str(vector["key_hex"])[:30])
def test_keys_are_as_written(vector: dict[str, str]) -> None:
    """To the byte, in both layouts."""
    layout = raw_layout if vector["layout"] == "raw" else prefixed_layout(vector["prefix"])
    assert layout(vector["namespace"], vector["transaction_id"]).hex() == vector["key_hex"]


@pytest.mark.parametrize("vector", VECTORS["stored_values"], ids=lambda vector: str(vector["state"]))
def test_stored_values_are_as_written(vector: dict[str, Any]) -> None:
    """To the byte, both ways."""
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
def test_errors_are_told_as_written(vector: dict[str, Any]) -> None:
    """The error table makes this code, reason, applied and RetryInfo, and the sources know the reason."""
    applied = Applied(vector["applied"])
    error = RAISED.get(vector["reason"]) or StoreUnavailable(vector["reason"], "a sentence", applied)
    failure = failure_of(error, "incident")
    assert (failure.code.name, failure.reason) == (vector["code"], vector["reason"])
    assert failure.applied is applied
    assert (failure.retry_after_ms is not None) is vector["retry_info"]
    assert f'"{vector["reason"]}"' in SOURCES


def test_the_domain_and_the_whole_table_are_written_down() -> None:
    """No error that the table knows is missing from the vectors."""
    assert VECTORS["errors"]["domain"] == ERROR_DOMAIN
    assert set(RAISED) <= {vector["reason"] for vector in ERRORS}


@pytest.mark.parametrize("vector", ERRORS, ids=lambda vector: str(vector["reason"]))
def test_the_documentation_says_the_same(vector: dict[str, Any]) -> None:
    """The row of this reason has its code, `applied`, and whether there is a RetryInfo."""
    page = (ROOT / "docs" / "errors.md").read_text()
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.+\|$", page, re.MULTILINE)]
    told = {
        reason: (code, applied, retry != "no") for reason, code, applied, retry, _ in (r for r in rows if len(r) == 5)
    }
    assert told[vector["reason"]] == (vector["code"], vector["applied"], vector["retry_info"])

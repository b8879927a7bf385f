"""Golden vectors of the gRPC profile."""

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import ErrorInfo

from dedup import DedupError, DuplicateTransaction, PayloadMismatch, Transaction, TransactionState, Unavailable
from dedup.grpc_guard import GrpcOptions, GrpcRules
from dedup.grpc_profile import (
    ERROR_DOMAIN,
    KEY_METADATA,
    REPLAYED_METADATA,
    decode,
    encode,
    fingerprint,
    identity,
    outcome_of,
    refusal_of,
)
from dedup.http_profile import InvalidKey

GOLDEN = Path(__file__).parents[2] / "golden"
VECTORS = json.loads((GOLDEN / "grpc.json").read_text())
TYPES: dict[str, Any] = {message.DESCRIPTOR.full_name: message for message in (Duration, StringValue)}


def test_defaults() -> None:
    """The options start with the contract's values."""
    defaults = VECTORS["defaults"]
    assert defaults["key_metadata"] == KEY_METADATA
    assert defaults["replayed_metadata"] == REPLAYED_METADATA
    assert defaults["error_domain"] == ERROR_DOMAIN
    assert defaults["max_stored_bytes"] == GrpcRules().max_stored_bytes
    assert set(GrpcOptions.__annotations__) == set(GrpcRules.__slots__)


@pytest.mark.parametrize("case", VECTORS["identities"], ids=lambda case: case["key_metadata"])
def test_an_identity(case: dict[str, Any]) -> None:
    """Caller, method and key."""
    assert identity(case["caller"], case["method"], [case["key_metadata"]]) == case["transaction_id"]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "http.json").read_text())["invalid_keys"], ids=repr)
def test_an_invalid_key(case: dict[str, Any]) -> None:
    """The rules are those of the HTTP key."""
    with pytest.raises(InvalidKey):
        identity("", "/shop.Rewards/Pay", case["headers"])


@pytest.mark.parametrize("case", VECTORS["fingerprints"], ids=lambda case: case["fingerprint"][:8])
def test_a_fingerprint(case: dict[str, Any]) -> None:
    """Method and message."""
    raw = base64.b64decode(case["request"])
    assert fingerprint(case["method"], TYPES[case["type"]].FromString(raw), raw).hex() == case["fingerprint"]


@pytest.mark.parametrize("case", VECTORS["stored"], ids=lambda case: f"{case['type']} {case['limit']}")
def test_a_stored_reply(case: dict[str, Any]) -> None:
    """It has a type, and is left out where it does not fit."""
    raw = base64.b64decode(case["reply"])
    stored = encode(TYPES[case["type"]].FromString(raw), raw, limit=case["limit"])
    assert stored == base64.b64decode(case["stored"])
    assert decode(stored) == (None if b"not-kept" in stored else raw)


@pytest.mark.parametrize("case", VECTORS["readable"], ids=lambda case: case["name"])
def test_a_readable_reply(case: dict[str, Any]) -> None:
    """The older form is read, other results are not."""
    reply = None if case["reply"] is None else base64.b64decode(case["reply"])
    assert decode(base64.b64decode(case["stored"])) == reply


def test_codes() -> None:
    """Each status of a handler completes, releases or keeps its claim."""
    assert {code.name: outcome_of(code) for code in grpc.StatusCode} == VECTORS["codes"]


@pytest.mark.parametrize("case", VECTORS["refusals"], ids=lambda case: case["name"])
def test_a_refusal(case: dict[str, Any]) -> None:
    """The code, and the reason in its details."""
    errors: dict[str, DedupError | InvalidKey] = {
        "in progress": DuplicateTransaction(holder(TransactionState.IN_PROGRESS)),
        "reply not stored": DuplicateTransaction(holder(TransactionState.COMPLETED)),
        "another request": PayloadMismatch(holder(TransactionState.COMPLETED)),
        "unavailable": Unavailable("no answer", code=grpc.StatusCode.UNAVAILABLE),
        "invalid key": InvalidKey("it is empty"),
    }
    status, info = refusal_of(errors[case["name"]]), ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (VECTORS["defaults"]["error_domain"], case["reason"])
    assert status.code == grpc.StatusCode[case["code"]].value[0]
    assert not {"secret id", "claimant"} & set(status.message.split())


def holder(state: TransactionState) -> Transaction:
    """Return a transaction of another caller."""
    now = datetime.now(UTC)
    return Transaction("secret id", "default", state, "claimant", now, now, None, b"paid 5")

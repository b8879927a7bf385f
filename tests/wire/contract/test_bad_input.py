"""Invalid input over real gRPC: the error names the field and the limit, and nothing is written."""

import time
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.errors import RefusedCall, refused
from tests.support.processes import ServiceProcess

pytestmark = pytest.mark.every_engine

Claim = dedup_pb2.ClaimTransactionRequest
METHOD = "/dedup.v1.DedupService/ClaimTransaction"

WEEK_S = 7 * 86_400


def from_now(seconds: float) -> Timestamp:
    """Return the time `seconds` from now, in whole milliseconds."""
    moment = Timestamp()
    moment.FromMilliseconds(int((time.time() + seconds) * 1000))
    return moment


BAD: dict[str, tuple[str, Callable[[str], Claim], str]] = {
    "empty id": ("transaction_id", lambda _: Claim(), "is empty"),
    "long id": ("transaction_id", lambda u: Claim(transaction_id=u + "é" * 241), "514 bytes of UTF-8, at most 512"),
    "control character": ("transaction_id", lambda u: Claim(transaction_id=f"{u}\n"), "U+000A at position 32"),
    "nul": ("transaction_id", lambda u: Claim(transaction_id=f"{u}\0"), "U+0000"),
    "delete": ("transaction_id", lambda u: Claim(transaction_id=f"{u}\x7f"), "U+007F"),
    "c1 control": ("transaction_id", lambda u: Claim(transaction_id=f"{u}\x85"), "U+0085"),
    "zero ttl": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration()), "at least 1 ms"),
    "negative ttl": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(seconds=-1)), "at least 1 ms"),
    "half a millisecond": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(nanos=500_000)), "whole milliseconds"),
    "a bit over": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(seconds=1, nanos=1)), "whole milliseconds"),
    "too long ttl": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(seconds=WEEK_S + 1)), "maximum of 7d"),
    "endless ttl": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(seconds=2**62)), "maximum of 7d"),
    "mixed signs": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(seconds=1, nanos=-1_000_000)), "malformed"),
    "many nanos": ("ttl", lambda u: Claim(transaction_id=u, ttl=Duration(nanos=1_000_000_000)), "malformed"),
    "past": ("expire_time", lambda u: Claim(transaction_id=u, expire_time=from_now(-1)), "in the past"),
    "epoch": ("expire_time", lambda u: Claim(transaction_id=u, expire_time=Timestamp()), "in the past"),
    "fine expire time": (
        *("expire_time", lambda u: Claim(transaction_id=u, expire_time=Timestamp(seconds=2**31, nanos=1))),
        "whole milliseconds",
    ),
    "far expire time": (
        *("expire_time", lambda u: Claim(transaction_id=u, expire_time=from_now(WEEK_S + 60))),
        "maximum ttl of 7d",
    ),
    "short token": ("claim_token", lambda u: Claim(transaction_id=u, claim_token="x" * 15), "16 to 64"),
    "long token": ("claim_token", lambda u: Claim(transaction_id=u, claim_token="x" * 65), "16 to 64"),
    "token with controls": ("claim_token", lambda u: Claim(transaction_id=u, claim_token="x" * 16 + "\n"), "printable"),
    "token beyond ASCII": ("claim_token", lambda u: Claim(transaction_id=u, claim_token="é" * 16), "ASCII"),
    "upper case namespace": ("namespace", lambda u: Claim(transaction_id=u, namespace="Pay"), "a-z, 0-9"),
    "namespace with colon": ("namespace", lambda u: Claim(transaction_id=u, namespace="a:b"), "a-z, 0-9"),
    "namespace with newline": ("namespace", lambda u: Claim(transaction_id=u, namespace="a\n"), "a-z, 0-9"),
    "long namespace": ("namespace", lambda u: Claim(transaction_id=u, namespace="a" * 64), "1 to 63"),
    "long fingerprint": (
        *("payload_fingerprint", lambda u: Claim(transaction_id=u, payload_fingerprint=b"x" * 65)),
        "at most 64",
    ),
    "long claimant": ("claimant", lambda u: Claim(transaction_id=u, claimant="é" * 129), "256 bytes"),
    "claimant with controls": ("claimant", lambda u: Claim(transaction_id=u, claimant="a\tb"), "U+0009"),
    "long wait": ("wait", lambda u: Claim(transaction_id=u, wait=Duration(seconds=301)), "maximum of 300s"),
    "negative wait": ("wait", lambda u: Claim(transaction_id=u, wait=Duration(seconds=-1)), "negative"),
}


def assert_invalid_request(answer: RefusedCall, field: str, words: str) -> None:
    """Assert that the call was rejected for this field, with these words and `applied=no`."""
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (answer.reason, answer.domain, answer.applied) == ("INVALID_REQUEST", "dedup.v1", "no")
    assert answer.retry_after_ms is None
    assert list(answer.violations) == [field]
    assert words in answer.violations[field]
    assert f"{field}: " in answer.message


@pytest.mark.parametrize("case", BAD)
def test_invalid_claims_are_rejected_and_write_nothing(
    stub: dedup_pb2_grpc.DedupServiceStub, unique: str, case: str
) -> None:
    """The error names the field and the limit, and a valid claim of the same id still wins."""
    field, make, words = BAD[case]
    request = make(unique)
    assert_invalid_request(refused(lambda: stub.ClaimTransaction(request)), field, words)
    assert stub.ClaimTransaction(Claim(transaction_id=unique)).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED


def test_all_invalid_fields_are_reported_at_once(stub: dedup_pb2_grpc.DedupServiceStub) -> None:
    """A request with several invalid fields receives all violations in one error."""
    request = Claim(namespace="Pay", claim_token="short", ttl=Duration(), payload_fingerprint=b"x" * 65)
    answer = refused(lambda: stub.ClaimTransaction(request))
    assert set(answer.violations) == {"transaction_id", "namespace", "claim_token", "ttl", "payload_fingerprint"}


def field_of(number: int, payload: bytes) -> bytes:
    """Return the wire encoding of a length-delimited field."""
    return bytes([number << 3 | 2, len(payload)]) + payload


RAW: dict[str, tuple[bytes, str, str]] = {
    "id": (field_of(1, b"abc\xff"), "transaction_id", "not valid UTF-8"),
    "surrogate": (field_of(1, b"\xed\xa0\x80"), "transaction_id", "not valid UTF-8"),
    "overlong": (field_of(1, b"\xc0\x80"), "transaction_id", "not valid UTF-8"),
    "claimant": (field_of(1, b"x") + field_of(6, b"\x80"), "claimant", "not valid UTF-8"),
    "both": (
        field_of(1, b"x") + field_of(3, b"\x08\x05") + field_of(4, b"\x08\x80\x80\x80\x80\x08"),
        *("ttl", "together with expire_time"),
    ),
    "both, reversed": (
        field_of(1, b"x") + field_of(4, b"\x08\x80\x80\x80\x80\x08") + field_of(3, b"\x08\x05"),
        *("ttl", "together with expire_time"),
    ),
    "no message": (b"\xff\xff\xff", "request", "is not a dedup.v1.ClaimTransactionRequest message"),
}


@pytest.mark.parametrize("case", RAW)
def test_invalid_raw_bytes_are_rejected(service: ServiceProcess, case: str) -> None:
    """Requests that no stub can build, such as invalid UTF-8 or both ttl and expire_time, get the same errors."""
    raw, field, words = RAW[case]
    with service.channel() as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        assert_invalid_request(refused(lambda: call(raw)), field, words)


def test_unknown_fields_are_ignored(service: ServiceProcess, unique: str) -> None:
    """A field of a newer contract does not fail the claim."""
    with service.channel() as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        raw = call(field_of(1, unique.encode()) + b"\xfa\x3e\x01x")
    reply = dedup_pb2.ClaimTransactionResponse.FromString(raw)
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED

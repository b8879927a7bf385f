"""Decoding of requests: faults the parser would hide, and what passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.v1 import dedup_pb2
from dedup_service.claims import InvalidRequest
from tests.support.decoding import decoded

# Field numbers of ClaimTransactionRequest, from the contract.
CLAIM = dedup_pb2.ClaimTransactionRequest
NUMBERS = {field.name: field.number for field in CLAIM.DESCRIPTOR.fields}
BAD_UTF8 = b"\xff\xfe"


def encoded(number: int, data: bytes) -> bytes:
    """Return a length-delimited field of fewer than 128 bytes."""
    key, bits = number << 3 | 2, b""
    while key > 0x7F:
        bits, key = bits + bytes((key & 0x7F | 0x80,)), key >> 7
    return bits + bytes((key, len(data))) + data


def violations(raw: bytes, request_type: type = CLAIM) -> dict[str, str]:
    """Return the violations of a message that must be refused, by field."""
    with pytest.raises(InvalidRequest) as caught:
        decoded(request_type, raw)
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize("field", ["transaction_id", "namespace", "claim_token", "claimant"])
def test_bad_utf8_names_its_field(field: str) -> None:
    """A string that is not UTF-8 is refused under its name."""
    assert violations(encoded(NUMBERS[field], BAD_UTF8)) == {field: "is not valid UTF-8: send text encoded as UTF-8"}


def test_every_string_that_is_not_utf8_is_named() -> None:
    """One error names every field at fault, and no valid one."""
    raw = encoded(NUMBERS["transaction_id"], BAD_UTF8) + encoded(NUMBERS["claimant"], BAD_UTF8)
    assert set(violations(raw + encoded(NUMBERS["namespace"], b"pay"))) == {"transaction_id", "claimant"}


def test_bad_utf8_in_a_batch_names_the_entry() -> None:
    """The field of an entry is named with its position."""
    entries = [b"fine", BAD_UTF8]
    raw = b"".join(encoded(1, encoded(NUMBERS["transaction_id"], entry)) for entry in entries)
    assert set(violations(raw, dedup_pb2.BatchClaimTransactionsRequest)) == {"requests[1].transaction_id"}


def test_bytes_fields_may_hold_anything() -> None:
    """A fingerprint is bytes, not text."""
    raw = encoded(NUMBERS["transaction_id"], b"x") + encoded(NUMBERS["payload_fingerprint"], BAD_UTF8)
    assert decoded(CLAIM, raw).payload_fingerprint == BAD_UTF8


@pytest.mark.parametrize("order", [("ttl", "expire_time"), ("expire_time", "ttl")])
def test_both_members_of_a_oneof_are_refused(order: tuple[str, str]) -> None:
    """Ttl and expire time together are refused in either order; the parser would silently keep the last one.

    Protection: the message is compared with its encoding.
    """
    raw = encoded(NUMBERS["transaction_id"], b"x") + b"".join(encoded(NUMBERS[name], b"\x08\x05") for name in order)
    [text] = violations(raw).values()
    assert text.startswith("was sent together with ")


def test_both_members_of_a_oneof_in_a_batch_are_refused() -> None:
    """The entry with two members is named."""
    both = encoded(NUMBERS["ttl"], b"\x08\x05") + encoded(NUMBERS["expire_time"], b"\x08\x05")
    raw = encoded(1, encoded(NUMBERS["transaction_id"], b"x")) + encoded(1, both)
    [field] = violations(raw, dedup_pb2.BatchClaimTransactionsRequest)
    assert field.startswith("requests[1].")


def test_unknown_fields_pass() -> None:
    """A newer client may send fields this server does not know."""
    raw = encoded(NUMBERS["transaction_id"], b"x") + encoded(1_000, BAD_UTF8)
    assert decoded(CLAIM, raw).transaction_id == "x"


def test_a_known_number_with_another_wire_type_passes_as_unknown() -> None:
    """The parser keeps such a field as an unknown one, and so does the check.

    The id is sent twice, so that the message differs from its encoding and is checked.
    """
    number = NUMBERS["claimant"]
    raw = encoded(NUMBERS["transaction_id"], b"x") * 2 + bytes((number << 3, 7))
    assert decoded(CLAIM, raw) == CLAIM.FromString(raw)


def test_a_repeated_single_field_keeps_its_last_value() -> None:
    """A field sent twice is legal protobuf: the last value counts, and messages merge."""
    raw = encoded(NUMBERS["transaction_id"], b"x") + encoded(NUMBERS["transaction_id"], b"y")
    assert decoded(CLAIM, raw).transaction_id == "y"
    twice = encoded(NUMBERS["ttl"], b"\x08\x05") + encoded(NUMBERS["ttl"], b"\x08\x06")
    assert decoded(CLAIM, twice).ttl.seconds == 6


@pytest.mark.parametrize("raw", [b"\x0a", b"\x0a\x05x", b"\xff" * 12, b"\x0b", b"\x07"])
def test_a_malformed_message_is_refused(raw: bytes) -> None:
    """Truncated fields and bad tags are refused with the name of the expected message."""
    assert violations(raw) == {"request": "is not a dedup.v1.ClaimTransactionRequest message"}


@given(st.binary(max_size=40))
def test_any_bytes_decode_or_are_an_invalid_request(raw: bytes) -> None:
    """No input raises anything but InvalidRequest, and what decodes is what the parser reads."""
    try:
        message = decoded(CLAIM, raw)
    except InvalidRequest as error:
        assert error.violations  # noqa: PT017 - either end is a pass
    else:
        assert message == CLAIM.FromString(raw)

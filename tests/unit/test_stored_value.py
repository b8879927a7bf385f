"""The stored value: written claims are read back, and a foreign value is never taken for a free key."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup_service.claims import Transaction, TransactionState, UnreadableValue
from dedup_service.stores.stored_value import decode, encode

TIMES = st.integers(min_value=1, max_value=2**53)
CLAIMS = st.builds(
    Transaction,
    namespace=st.just("pay"),
    transaction_id=st.just("x"),
    claim_token=st.text(max_size=64),
    claimant=st.text(max_size=64),
    claim_time_ms=TIMES,
    expire_time_ms=TIMES,
    state=st.sampled_from(TransactionState),
    payload_fingerprint=st.binary(max_size=64),
    completion_time_ms=st.none() | TIMES,
    result=st.binary(max_size=4096),
)

WRITTEN = bytes.fromhex(
    "9901b0746f6b656e2d6f662d7369787465656ea9776f726b65722dc3a9cf0000018bcfe56800cf0000018bcfe6526001c402cafe00c400"
)
CLAIM = Transaction(
    "default",
    "x",
    "token-of-sixteen",
    "worker-é",
    1_700_000_000_000,
    1_700_000_060_000,
    payload_fingerprint=b"\xca\xfe",
)


def test_the_bytes_are_those_of_version_1() -> None:
    """The bytes of this version are fixed, since other versions and other stores read them."""
    assert encode(CLAIM) == WRITTEN
    assert decode(WRITTEN, "default", "x") == CLAIM


@given(CLAIMS)
def test_a_written_claim_is_read_back(claim: Transaction) -> None:
    """Every claim survives its own encoding."""
    assert decode(encode(claim), "pay", "x") == claim


@given(CLAIMS, st.lists(st.integers().filter(lambda n: abs(n) < 2**63) | st.text() | st.none(), max_size=4))
def test_a_longer_array_of_a_newer_writer_is_read(claim: Transaction, more: list[object]) -> None:
    """Fields that a newer writer added at the end are ignored."""
    longer = msgpack.packb([*msgpack.unpackb(encode(claim)), *more])
    assert decode(longer, "pay", "x") == claim


@given(st.binary(max_size=300))
def test_any_bytes_are_a_holder_or_unreadable(value: bytes) -> None:
    """Arbitrary bytes are a claim by some holder, or UnreadableValue: never another exception."""
    try:
        holder = decode(value, "pay", "x")
    except UnreadableValue:
        return
    assert holder.transaction_id == "x"


@pytest.mark.parametrize("value", [b"\xc3", b"1", b"true", b"OK", b"", b"\xc0", b"\x90", b"\xc1", b"\xff\xfe", b"\x81"])
def test_a_foreign_value_is_a_claim_by_an_unknown_holder(value: bytes) -> None:
    """The original's msgpack `true`, plain text, and bytes that mean nothing are duplicates without a holder's name."""
    holder = decode(value, "pay", "x")
    assert (holder.claim_token, holder.claimant, holder.claim_time_ms) == (None, "", None)
    assert holder.state is TransactionState.IN_PROGRESS


@pytest.mark.parametrize("field", range(1, 9))
def test_a_field_of_another_type_is_unreadable(field: int) -> None:
    """A value of this version with a field of a wrong type is refused, whichever field it is."""
    fields = msgpack.unpackb(WRITTEN)
    fields[field] = [] if field != 5 else 7
    with pytest.raises(UnreadableValue, match="damaged"):
        decode(msgpack.packb(fields), "pay", "x")

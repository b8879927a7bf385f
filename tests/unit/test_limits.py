"""The limits of the contract, over generated values."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup_service.claims import ClaimRequest, Expiry, InvalidRequest, Policy, RequestedExpiry
from dedup_service.claims.limits import claim_violations, end_by_store_clock

POLICY = Policy(default_ttl_ms=60_000, max_ttl_ms=3_600_000, retention_ms=60_000)
NOW_MS = 1_700_000_000_000


def faults(request: ClaimRequest) -> set[str]:
    """Return the names of the fields at fault."""
    return {violation.field for violation in claim_violations(request, POLICY)}


@given(st.text(min_size=1, max_size=600))
def test_an_id_is_valid_exactly_when_it_is_short_and_has_no_control_character(text: str) -> None:
    """An id is valid if it has 1 to 512 bytes of UTF-8 and no character of Unicode's category Cc."""
    good = len(text.encode()) <= 512 and not any(ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F for c in text)
    assert faults(ClaimRequest(text)) == (set() if good else {"transaction_id"})


@given(st.text(max_size=70))
def test_a_namespace_matches_its_pattern_as_a_whole(text: str) -> None:
    """The pattern of the contract must match the whole name, a final line end included."""
    good = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}\Z").match(text) is not None
    assert faults(ClaimRequest("x", text)) == (set() if good else {"namespace"})


@given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
def test_a_ttl_is_valid_within_the_policy(ttl_ms: int) -> None:
    """A ttl is valid from 1 ms to the maximum of the policy."""
    good = 1 <= ttl_ms <= POLICY.max_ttl_ms
    assert faults(ClaimRequest("x", expiry=RequestedExpiry(ttl_ms=ttl_ms))) == (set() if good else {"ttl"})


@given(st.integers(min_value=-(2**40), max_value=2**40))
def test_an_expire_time_is_valid_within_the_policy(ahead_ms: int) -> None:
    """An expire time is valid if it is in the future and at most the maximum ttl away."""
    expiry = Expiry(NOW_MS + ahead_ms, max_ttl_ms=POLICY.max_ttl_ms)
    if 1 <= ahead_ms <= POLICY.max_ttl_ms:
        assert end_by_store_clock(expiry, NOW_MS) == expiry.time_ms
    else:
        with pytest.raises(InvalidRequest, match="expire_time"):
            end_by_store_clock(expiry, NOW_MS)


@given(st.text(min_size=1, max_size=70))
def test_a_token_is_printable_ascii_of_a_bounded_length(token: str) -> None:
    """A token is valid if it has 16 to 64 printable ASCII characters."""
    good = 16 <= len(token) <= 64 and token.isascii() and token.isprintable()
    assert faults(ClaimRequest("x", claim_token=token)) == (set() if good else {"claim_token"})

"""The checker on handwritten histories: broken ones, and the closest legal ones."""

from typing import Any

import pytest

from tests.stress.chaos.check import check
from tests.stress.chaos.history import Call

S = 1_000_000_000
HOUR_MS = 3_600_000
ONE, TWO = "token-one", "token-two"
UNKNOWN = {"outcome": "ERROR", "code": "UNAVAILABLE", "applied": "unknown"}
NOT_APPLIED = {"outcome": "ERROR", "code": "UNAVAILABLE", "applied": "no"}


def call(rpc: str, token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a call on the transaction of these histories."""
    values: dict[str, Any] = {"client": "c", "rpc": rpc, "transaction_id": "t", "token": token, "ttl_ms": HOUR_MS}
    return Call(**values | {"begin_ns": int(begin_s * S), "end_ns": int(end_s * S)} | fields)


def won(token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that received CLAIMED."""
    return call("claim", token, begin_s, end_s, **{"outcome": "CLAIMED", "holder": token} | fields)


def duplicate(token: str, holder: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that received DUPLICATE."""
    return call("claim", token, begin_s, end_s, outcome="DUPLICATE", holder=holder, **fields)


def lost(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a call with unknown effect."""
    return call(rpc, token, begin_s, end_s, **UNKNOWN)


def refused(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a failed call that certainly had no effect."""
    return call(rpc, token, begin_s, end_s, **NOT_APPLIED)


def released(token: str, begin_s: float, end_s: float) -> Call:
    """Return a release that received RELEASED."""
    return call("release", token, begin_s, end_s, outcome="RELEASED")


def not_held(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a call that received NOT_HELD."""
    return call(rpc, token, begin_s, end_s, outcome="NOT_HELD")


def completed(token: str, begin_s: float, end_s: float) -> Call:
    """Return a completion that received COMPLETED."""
    return call("complete", token, begin_s, end_s, outcome="COMPLETED", holder=token, completed=True)


BROKEN: dict[str, tuple[Any, ...]] = {
    "two winners in a row": ({"two-holders"}, won(ONE, 1, 2), won(TWO, 3, 4)),
    "two winners at once": ({"two-holders"}, won(ONE, 1, 2), won(TWO, 1, 2)),
    "a second winner by replay": (
        {"two-holders"},
        *(lost("claim", ONE, 1, 2), won(TWO, 3, 4), won(ONE, 5, 6, replayed=True)),
    ),
    "a winner before the release": ({"two-holders"}, won(ONE, 1, 2), won(TWO, 3, 4), released(ONE, 5, 6)),
    "a winner after a release that was not applied": (
        {"two-holders"},
        *(won(ONE, 1, 2), refused("release", ONE, 3, 4), won(TWO, 5, 6)),
    ),
    "a release after the claim expired": (
        {"two-holders"},
        *(won(ONE, 1, 1.1, ttl_ms=500), won(TWO, 2, 2.1), released(ONE, 3, 4)),
    ),
    "a winner before the first claim can have expired": (
        {"two-holders"},
        *(won(ONE, 1, 1.1, ttl_ms=1_000), won(TWO, 1.2, 1.9, ttl_ms=1_000)),
    ),
    "a token that claims twice": ({"stored-twice"}, won(ONE, 1, 2), won(ONE, 3, 4)),
    "a release by a duplicate": (
        {"held-by-nobody", "two-holders"},
        *(won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4), released(TWO, 5, 6)),
    ),
    "a duplicate that ends before the winner begins": (
        {"held-by-nobody", "stored-twice"},
        *(duplicate(TWO, ONE, 1, 2), won(ONE, 3, 4)),
    ),
    "a duplicate of a claim that was not applied": (
        {"held-by-nobody"},
        *(refused("claim", ONE, 1, 2), duplicate(TWO, ONE, 3, 4)),
    ),
    "a duplicate of a refused claim": (
        {"held-by-nobody", "two-holders"},
        *(won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4), duplicate("token-three", TWO, 5, 6)),
    ),
    "a first attempt that is a replay": ({"replay-of-nothing"}, won(ONE, 1, 2, replayed=True)),
    "a replay after an attempt that was not applied": (
        {"replay-of-nothing"},
        *(refused("claim", ONE, 1, 2), won(ONE, 3, 4, replayed=True)),
    ),
    "a retry that is a duplicate of its own claim": (
        {"retry-refused"},
        *(lost("claim", ONE, 1, 2), duplicate(ONE, ONE, 3, 4)),
    ),
    "a success that names another holder": (
        {"answer-of-another", "replay-of-nothing", "two-holders"},
        *(won(ONE, 1, 2), won(TWO, 3, 4, holder=ONE, replayed=True)),
    ),
    "a claim after completion": (
        {"claimed-again", "two-holders"},
        won(ONE, 1, 2),
        completed(ONE, 3, 4),
        won(TWO, 5, 6),
    ),
    "a claim after completion and a late release": (
        {"claimed-again"},
        *(won(ONE, 1, 2), completed(ONE, 3, 4), lost("release", ONE, 4, 5), won(TWO, 6, 7)),
    ),
    "a replay after completion": (
        {"claimed-again"},
        *(won(ONE, 1, 2), completed(ONE, 3, 4), won(ONE, 5, 6, replayed=True)),
    ),
    "a completion without a complete call": (
        {"completed-by-nobody"},
        *(won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4, completed=True)),
    ),
    "a release by the holder receives NOT_HELD": ({"claim-lost"}, won(ONE, 1, 2), not_held("release", ONE, 3, 4)),
    "a completion by the holder receives NOT_HELD": ({"claim-lost"}, won(ONE, 1, 2), not_held("complete", ONE, 3, 4)),
    "held after its release": (
        {"held-after-release"},
        *(won(ONE, 1, 2), released(ONE, 3, 4), duplicate(TWO, ONE, 5, 6)),
    ),
    "a bug": ({"bug"}, call("claim", ONE, 1, 2, outcome="ERROR", code="INTERNAL", applied="unknown")),
}

LEGAL = {
    "a winner and its duplicates": (won(ONE, 1, 4), duplicate(TWO, ONE, 2, 3), duplicate(TWO, ONE, 5, 6)),
    "a duplicate that ends first, but after the winner began": (won(ONE, 1, 9), duplicate(TWO, ONE, 0, 2)),
    "a winner after the release": (won(ONE, 1, 2), released(ONE, 3, 4), won(TWO, 5, 6)),
    "a winner during the release": (won(ONE, 1, 2), released(ONE, 3, 6), won(TWO, 4, 5)),
    "a winner after a release that may have been applied": (
        won(ONE, 1, 2),
        lost("release", ONE, 3, 4),
        won(TWO, 9, 10),
    ),
    "concurrent winners with a release between": (won(ONE, 1, 9), released(ONE, 2, 9), won(TWO, 1, 9)),
    "a winner when the first claim may have expired": (won(ONE, 1, 1.5, ttl_ms=1_000), won(TWO, 1.6, 2.1)),
    "a replay after a lost reply": (lost("claim", ONE, 1, 2), won(ONE, 3, 4, replayed=True), duplicate(TWO, ONE, 5, 6)),
    "a replay after a received reply": (won(ONE, 1, 2), won(ONE, 3, 4, replayed=True)),
    "a claim with unknown effect that was not applied": (
        lost("claim", ONE, 1, 2),
        won(TWO, 3, 4),
        duplicate(ONE, TWO, 5, 6),
    ),
    "a claim with unknown effect that was applied late": (
        lost("claim", ONE, 1, 2),
        won(ONE, 3, 4),
        released(ONE, 5, 6),
        duplicate(TWO, ONE, 7, 8),
    ),
    "a retry after its own completion is a duplicate": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), duplicate(ONE, ONE, 5, 6, completed=True)),
    ),
    "a completion whose reply was lost": (
        *(won(ONE, 1, 2), lost("complete", ONE, 3, 4), duplicate(TWO, ONE, 5, 6, completed=True)),
    ),
    "a release of a completed transaction": (won(ONE, 1, 2), completed(ONE, 3, 4), not_held("release", ONE, 5, 6)),
    "a repeated release": (won(ONE, 1, 2), lost("release", ONE, 3, 4), not_held("release", ONE, 5, 6)),
    "a release of an expired claim": (won(ONE, 1, 2, ttl_ms=1_000), not_held("release", ONE, 3, 4)),
    "a token that claims again after its release": (won(ONE, 1, 2), released(ONE, 3, 4), won(ONE, 5, 6)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(name: str) -> None:
    """Every broken promise is found, as exactly these kinds."""
    kinds, *history = BROKEN[name]
    assert {finding.kind for finding in check(history)} == kinds


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_history_has_no_findings(name: str) -> None:
    """Unknown effects may or may not have happened, and overlapping calls may take effect in any order."""
    assert check(LEGAL[name]) == []


def test_transactions_do_not_mix() -> None:
    """Each transaction has its own winner."""
    assert check([won(ONE, 1, 2), won(TWO, 1, 2, transaction_id="another")]) == []

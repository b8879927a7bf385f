"""The checker against histories written by hand: what must be found, and the legal history closest to it."""

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
    """Return a call on the one transaction of these histories."""
    values: dict[str, Any] = {"client": "c", "rpc": rpc, "transaction_id": "t", "token": token, "ttl_ms": HOUR_MS}
    return Call(**values | {"begin_ns": int(begin_s * S), "end_ns": int(end_s * S)} | fields)


def won(token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that was told CLAIMED."""
    return call("claim", token, begin_s, end_s, **{"outcome": "CLAIMED", "holder": token} | fields)


def duplicate(token: str, holder: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that was told DUPLICATE."""
    return call("claim", token, begin_s, end_s, outcome="DUPLICATE", holder=holder, **fields)


def lost(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a call that nobody knows the result of."""
    return call(rpc, token, begin_s, end_s, **UNKNOWN)


def refused(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a call that certainly changed nothing."""
    return call(rpc, token, begin_s, end_s, **NOT_APPLIED)


def released(token: str, begin_s: float, end_s: float) -> Call:
    """Return a release that was told RELEASED."""
    return call("release", token, begin_s, end_s, outcome="RELEASED")


def not_held(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a call that was told NOT_HELD."""
    return call(rpc, token, begin_s, end_s, outcome="NOT_HELD")


def completed(token: str, begin_s: float, end_s: float) -> Call:
    """Return a completion that was told COMPLETED."""
    return call("complete", token, begin_s, end_s, outcome="COMPLETED", holder=token, completed=True)


BROKEN: dict[str, tuple[Any, ...]] = {
    "two winners in a row": ({"two-holders"}, won(ONE, 1, 2), won(TWO, 3, 4)),
    "two winners at once": ({"two-holders"}, won(ONE, 1, 2), won(TWO, 1, 2)),
    "a winner by replay beside another": (
        {"two-holders"},
        *(lost("claim", ONE, 1, 2), won(TWO, 3, 4), won(ONE, 5, 6, replayed=True)),
    ),
    "a winner before the release": ({"two-holders"}, won(ONE, 1, 2), won(TWO, 3, 4), released(ONE, 5, 6)),
    "a winner after a release that was not applied": (
        {"two-holders"},
        *(won(ONE, 1, 2), refused("release", ONE, 3, 4), won(TWO, 5, 6)),
    ),
    "a release by one who lost its claim": (
        {"two-holders"},
        *(won(ONE, 1, 1.1, ttl_ms=500), won(TWO, 2, 2.1), released(ONE, 3, 4)),
    ),
    "a winner before the first claim can have expired": (
        {"two-holders"},
        *(won(ONE, 1, 1.1, ttl_ms=1_000), won(TWO, 1.2, 1.9, ttl_ms=1_000)),
    ),
    "a token that stores twice": ({"stored-twice"}, won(ONE, 1, 2), won(ONE, 3, 4)),
    "a release by one who was never let in": (
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
    "a first try that is a replay": ({"replay-of-nothing"}, won(ONE, 1, 2, replayed=True)),
    "a replay after a try that was not applied": (
        {"replay-of-nothing"},
        *(refused("claim", ONE, 1, 2), won(ONE, 3, 4, replayed=True)),
    ),
    "a retry told that it is a duplicate of itself": (
        {"retry-refused"},
        *(lost("claim", ONE, 1, 2), duplicate(ONE, ONE, 3, 4)),
    ),
    "a caller told that it holds another's claim": (
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
    "a completion that nobody asked for": (
        {"completed-by-nobody"},
        *(won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4, completed=True)),
    ),
    "a release of what is held says NOT_HELD": ({"claim-lost"}, won(ONE, 1, 2), not_held("release", ONE, 3, 4)),
    "a completion of what is held says NOT_HELD": ({"claim-lost"}, won(ONE, 1, 2), not_held("complete", ONE, 3, 4)),
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
    "a winner while the release is under way": (won(ONE, 1, 2), released(ONE, 3, 6), won(TWO, 4, 5)),
    "a winner after a release that may have been applied": (
        won(ONE, 1, 2),
        lost("release", ONE, 3, 4),
        won(TWO, 9, 10),
    ),
    "concurrent winners with a release between": (won(ONE, 1, 9), released(ONE, 2, 9), won(TWO, 1, 9)),
    "a winner once the first claim may have expired": (won(ONE, 1, 1.5, ttl_ms=1_000), won(TWO, 1.6, 2.1)),
    "a replay of a lost answer": (lost("claim", ONE, 1, 2), won(ONE, 3, 4, replayed=True), duplicate(TWO, ONE, 5, 6)),
    "a replay of a heard answer": (won(ONE, 1, 2), won(ONE, 3, 4, replayed=True)),
    "a lost claim that came to nothing": (lost("claim", ONE, 1, 2), won(TWO, 3, 4), duplicate(ONE, TWO, 5, 6)),
    "a lost claim that came late": (
        lost("claim", ONE, 1, 2),
        won(ONE, 3, 4),
        released(ONE, 5, 6),
        duplicate(TWO, ONE, 7, 8),
    ),
    "a retry that is a duplicate of what it completed": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), duplicate(ONE, ONE, 5, 6, completed=True)),
    ),
    "a completion whose answer was lost": (
        *(won(ONE, 1, 2), lost("complete", ONE, 3, 4), duplicate(TWO, ONE, 5, 6, completed=True)),
    ),
    "a release of what was completed": (won(ONE, 1, 2), completed(ONE, 3, 4), not_held("release", ONE, 5, 6)),
    "a repeated release": (won(ONE, 1, 2), lost("release", ONE, 3, 4), not_held("release", ONE, 5, 6)),
    "a release of what expired": (won(ONE, 1, 2, ttl_ms=1_000), not_held("release", ONE, 3, 4)),
    "a token that stores again after its release": (won(ONE, 1, 2), released(ONE, 3, 4), won(ONE, 5, 6)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(name: str) -> None:
    """Each way to break a promise is found, under these names and no other."""
    kinds, *history = BROKEN[name]
    assert {finding.kind for finding in check(history)} == kinds


@pytest.mark.parametrize("name", LEGAL)
def test_what_a_correct_service_may_answer_is_not_found(name: str) -> None:
    """Doubt goes either way, and calls that overlap in whichever order makes sense of them."""
    assert check(LEGAL[name]) == []


def test_transactions_do_not_mix() -> None:
    """Each transaction has a winner of its own."""
    assert check([won(ONE, 1, 2), won(TWO, 1, 2, transaction_id="another")]) == []

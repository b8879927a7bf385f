"""The checker on handwritten histories: broken ones, and the closest legal ones."""

import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from tests.stress.chaos.check import BUG, NOT_LINEARIZABLE, UNDECIDED, check
from tests.stress.chaos.history import Answer, Call
from tests.stress.chaos.model import Record, respond

S = 1_000_000_000
HOUR_MS = 3_600_000
ONE, TWO, THREE = "one", "two", "three"


def call(rpc: str, token: str, begin_s: float, end_s: float, outcome: str = "ERROR", **fields: Any) -> Call:
    """Return a call on the transaction of these histories. A claim is named by its token."""
    values: dict[str, Any] = {"client": "c", "rpc": rpc, "transaction_id": "t", "token": token, "ttl_ms": HOUR_MS}
    values |= {"name": token, "begin_ns": int(begin_s * S), "end_ns": int(end_s * S), "outcome": outcome}
    return Call(**values | fields)


def won(token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that received CLAIMED."""
    return call("claim", token, begin_s, end_s, "CLAIMED", **{"holder": token} | fields)


def replayed(token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a later attempt that received CLAIMED as a replay of the first one."""
    return won(token, begin_s, end_s, **{"name": f"{token}/2", "replayed": True} | fields)


def duplicate(token: str, holder: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that received DUPLICATE."""
    return call("claim", token, begin_s, end_s, "DUPLICATE", **{"holder": holder, "name": f"{token}/d"} | fields)


def mismatch(token: str, holder: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a claim that received PAYLOAD_MISMATCH."""
    return replace(duplicate(token, holder, begin_s, end_s, **fields), outcome="PAYLOAD_MISMATCH")


def lost(rpc: str, token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a call with unknown effect."""
    return call(rpc, token, begin_s, end_s, code="UNAVAILABLE", applied="unknown", **fields)


def refused(rpc: str, token: str, begin_s: float, end_s: float) -> Call:
    """Return a failed call that certainly had no effect."""
    return call(rpc, token, begin_s, end_s, code="UNAVAILABLE", applied="no")


def released(token: str, begin_s: float, end_s: float) -> Call:
    """Return a release that received RELEASED."""
    return call("release", token, begin_s, end_s, "RELEASED")


def not_held(rpc: str, token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a call that received NOT_HELD."""
    return call(rpc, token, begin_s, end_s, "NOT_HELD", **fields)


def completed(token: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a completion that received COMPLETED."""
    return call(
        "complete", token, begin_s, end_s, "COMPLETED", **{"holder": token, "result": "r", "held_result": "r"} | fields
    )


def extended(token: str, begin_s: float, end_s: float, ttl_ms: int, **fields: Any) -> Call:
    """Return an extension that received EXTENDED."""
    return call("extend", token, begin_s, end_s, "EXTENDED", **{"holder": token, "ttl_ms": ttl_ms} | fields)


def found(holder: str, begin_s: float, end_s: float, **fields: Any) -> Call:
    """Return a look that found the claim of this holder."""
    return call("get", "", begin_s, end_s, "FOUND", holder=holder, name="look", **fields)


def not_found(begin_s: float, end_s: float) -> Call:
    """Return a look that found nothing."""
    return call("get", "", begin_s, end_s, "NOT_FOUND", name="look")


def in_doubt(known: Call) -> Call:
    """Return the call as if its answer had been lost."""
    return replace(known, outcome="ERROR", applied="unknown", replayed=False, holder="", held_result=None)


def failover(begin_s: float, end_s: float) -> Call:
    """Return a failover, during which a master may lose what no replica acknowledged."""
    return call("failover", "", begin_s, end_s, transaction_id="")


BROKEN: dict[str, tuple[Call, ...]] = {
    "two winners in a row": (won(ONE, 1, 2), won(TWO, 3, 4)),
    "two winners at once": (won(ONE, 1, 2), won(TWO, 1, 2)),
    "a second winner by replay": (lost("claim", ONE, 1, 2), won(TWO, 3, 4), replayed(ONE, 5, 6)),
    "a winner before the release": (won(ONE, 1, 2), won(TWO, 3, 4), released(ONE, 5, 6)),
    "a winner after a release that was not applied": (won(ONE, 1, 2), refused("release", ONE, 3, 4), won(TWO, 5, 6)),
    "a release after the claim expired": (won(ONE, 1, 1.1, ttl_ms=500), won(TWO, 2, 2.1), released(ONE, 3, 4)),
    "a winner before the first claim can have expired": (
        *(won(ONE, 1, 1.1, ttl_ms=1_000), won(TWO, 1.2, 1.9, ttl_ms=1_000)),
    ),
    "a token that claims twice": (won(ONE, 1, 2), won(ONE, 3, 4, name="one/2", holder="one/2")),
    "a release by a duplicate": (won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4), released(TWO, 5, 6)),
    "a duplicate that ends before the winner begins": (duplicate(TWO, ONE, 1, 2), won(ONE, 3, 4)),
    "a duplicate of a claim that was not applied": (refused("claim", ONE, 1, 2), duplicate(TWO, ONE, 3, 4)),
    "a duplicate of a refused claim": (
        *(won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4, name=TWO), duplicate(THREE, TWO, 5, 6)),
    ),
    "a first attempt that is a replay": (won(ONE, 1, 2, replayed=True),),
    "a replay after an attempt that was not applied": (refused("claim", ONE, 1, 2), replayed(ONE, 3, 4)),
    "a retry that is a duplicate of its own claim": (lost("claim", ONE, 1, 2), duplicate(ONE, ONE, 3, 4)),
    "a success that names another holder": (won(ONE, 1, 2), won(TWO, 3, 4, holder=ONE, replayed=True)),
    "a claim after completion": (won(ONE, 1, 2), completed(ONE, 3, 4), won(TWO, 5, 6)),
    "a claim after completion and a late release": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), lost("release", ONE, 4, 5), won(TWO, 6, 7)),
    ),
    "a replay after completion": (won(ONE, 1, 2), completed(ONE, 3, 4), replayed(ONE, 5, 6)),
    "a completion without a complete call": (won(ONE, 1, 2), duplicate(TWO, ONE, 3, 4, held_result="r")),
    "the result of another completion": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), duplicate(TWO, ONE, 5, 6, held_result="s")),
    ),
    "a second completion with another result": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), completed(ONE, 5, 6, result="s", held_result="s")),
    ),
    "a release by the holder receives NOT_HELD": (won(ONE, 1, 2), not_held("release", ONE, 3, 4)),
    "a completion by the holder receives NOT_HELD": (won(ONE, 1, 2), not_held("complete", ONE, 3, 4, result="r")),
    "held after its release": (won(ONE, 1, 2), released(ONE, 3, 4), duplicate(TWO, ONE, 5, 6)),
    "found after its release": (won(ONE, 1, 2), released(ONE, 3, 4), found(ONE, 5, 6)),
    "not found although held": (won(ONE, 1, 2), not_found(3, 4)),
    "held after its end": (won(ONE, 1, 2, ttl_ms=500), duplicate(TWO, ONE, 3, 4)),
    "completed after its retention": (
        *(won(ONE, 1, 2), completed(ONE, 3, 3.1, ttl_ms=500), duplicate(TWO, ONE, 4, 5, held_result="r")),
    ),
    "free before the end of the retention": (
        *(won(ONE, 1, 1.1, ttl_ms=500), completed(ONE, 1.2, 1.3), not_found(3, 4)),
    ),
    "extended, but not longer": (won(ONE, 1, 1.1, ttl_ms=500), extended(ONE, 1.2, 1.3, HOUR_MS), not_found(3, 4)),
    "shortened without permission": (won(ONE, 1, 2), extended(ONE, 3, 3.1, 500), not_found(5, 6)),
    "extended by a duplicate": (won(ONE, 1, 2), extended(TWO, 3, 4, HOUR_MS, holder=ONE)),
    "extended after its release": (won(ONE, 1, 2), released(ONE, 3, 4), extended(ONE, 5, 6, HOUR_MS)),
    "extended after its completion": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), extended(ONE, 5, 6, HOUR_MS, held_result="r")),
    ),
    "seen early, so it ends early": (won(ONE, 0, 2, ttl_ms=1_000), found(ONE, 0, 0.5), found(ONE, 1.9, 2)),
    "another payload is a duplicate": (won(ONE, 1, 2, fingerprint="f"), duplicate(TWO, ONE, 3, 4, fingerprint="g")),
    "a replay with another payload": (won(ONE, 1, 2, fingerprint="f"), replayed(ONE, 3, 4, fingerprint="g")),
    "the same payload is a mismatch": (won(ONE, 1, 2, fingerprint="f"), mismatch(TWO, ONE, 3, 4, fingerprint="f")),
    "a missing payload is a mismatch": (won(ONE, 1, 2, fingerprint="f"), mismatch(TWO, ONE, 3, 4)),
    "a failover loses an acknowledged claim": (won(ONE, 1, 2), failover(3, 4), won(TWO, 5, 6)),
    "a failover loses a claim whose replay was acknowledged": (
        *(lost("claim", ONE, 1, 2), replayed(ONE, 1, 4), failover(5, 6), won(TWO, 7, 8)),
    ),
    "a claim is lost before the failover": (
        *(lost("claim", ONE, 1, 2), duplicate(TWO, ONE, 3, 4), won(THREE, 5, 6), failover(7, 8)),
    ),
}

# Any two answers of these can be explained, if nothing is known of the other calls.
NO_PAIR_IS_WRONG: dict[str, tuple[Call, ...]] = {
    "one release in doubt lets a token claim twice, but not three times": (
        won(ONE, 1, 2),
        lost("release", ONE, 1, 2),
        won(ONE, 3, 4, name="one/2", holder="one/2"),
        won(ONE, 5, 6, name="one/3", holder="one/3"),
    ),
    "one claim in doubt is seen held, not held, and held again": (
        *(lost("claim", ONE, 1, 2), lost("release", ONE, 1, 2)),
        *(found(ONE, 3, 4), not_found(5, 6), found(ONE, 7, 8)),
    ),
    "two claims in doubt hold it in turn": (
        *(lost("claim", ONE, 1, 2), lost("release", ONE, 1, 2), lost("claim", TWO, 1, 2), lost("release", TWO, 1, 2)),
        *(found(ONE, 3, 4), found(TWO, 5, 6), found(ONE, 7, 8)),
    ),
    "a claim is too late for one look and too early for another": (
        *(won(ONE, 0, 2, ttl_ms=3_000), not_found(0.2, 0.3), not_found(3, 3.1)),
    ),
    "a completion in doubt explains a refused release, but not the extension after it": (
        *(won(ONE, 1, 2), lost("complete", ONE, 1, 2, result="r")),
        *(not_held("release", ONE, 3, 4), extended(ONE, 5, 6, HOUR_MS)),
    ),
}

LEGAL: dict[str, tuple[Call, ...]] = {
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
    "a replay after a lost reply": (lost("claim", ONE, 1, 2), replayed(ONE, 3, 4), duplicate(TWO, ONE, 5, 6)),
    "a replay after a received reply": (won(ONE, 1, 2), replayed(ONE, 3, 4)),
    "a claim with unknown effect that was not applied": (
        *(lost("claim", ONE, 1, 2), won(TWO, 3, 4), duplicate(ONE, TWO, 5, 6)),
    ),
    "a claim with unknown effect that was applied late": (
        *(lost("claim", ONE, 1, 2), won(ONE, 3, 4, name="one/2", holder="one/2"), released(ONE, 5, 6)),
        duplicate(TWO, ONE, 7, 8),
    ),
    "a retry after its own completion is a duplicate": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), duplicate(ONE, ONE, 5, 6, held_result="r")),
    ),
    "a completion whose reply was lost": (
        won(ONE, 1, 2),
        lost("complete", ONE, 3, 4, result="r"),
        duplicate(TWO, ONE, 5, 6, held_result="r"),
        completed(ONE, 7, 8),
    ),
    "a second completion with another result is refused": (
        *(won(ONE, 1, 2), completed(ONE, 3, 4), not_held("complete", ONE, 5, 6, result="s")),
    ),
    "a release of a completed transaction": (won(ONE, 1, 2), completed(ONE, 3, 4), not_held("release", ONE, 5, 6)),
    "a repeated release": (won(ONE, 1, 2), lost("release", ONE, 3, 4), not_held("release", ONE, 5, 6)),
    "a release of an expired claim": (won(ONE, 1, 2, ttl_ms=1_000), not_held("release", ONE, 3, 4)),
    "a token that claims again after its release": (
        *(won(ONE, 1, 2), released(ONE, 3, 4), won(ONE, 5, 6, name="one/2", holder="one/2")),
    ),
    "an extended claim outlives its first end": (
        *(won(ONE, 1, 1.1, ttl_ms=500), extended(ONE, 1.2, 1.3, HOUR_MS), found(ONE, 3, 4)),
    ),
    "an extension in doubt may have been applied": (
        *(won(ONE, 1, 1.1, ttl_ms=500), lost("extend", ONE, 1.2, 1.3), found(ONE, 3, 4)),
    ),
    "an extension does not shorten": (won(ONE, 1, 2), extended(ONE, 3, 4, 500), found(ONE, 5, 6)),
    "an extension shortens where it may": (
        *(won(ONE, 1, 2), extended(ONE, 3, 4, 500, may_shorten=True), not_found(5, 6)),
    ),
    "a short retention frees a long claim": (won(ONE, 1, 2), completed(ONE, 3, 4, ttl_ms=500), won(TWO, 5, 6)),
    "a waiting duplicate claims after the release": (
        *(won(ONE, 1, 2), won(TWO, 3, 10, wait_ms=9_000), released(ONE, 8, 9)),
    ),
    "another payload is a mismatch, a missing one a duplicate": (
        won(ONE, 1, 2, fingerprint="f"),
        mismatch(TWO, ONE, 3, 4, fingerprint="g"),
        duplicate(THREE, ONE, 3, 4),
    ),
    "a failover loses a claim in doubt": (
        *(lost("claim", ONE, 1, 2), duplicate(TWO, ONE, 3, 4), failover(5, 6), won(THREE, 7, 8)),
    ),
    "a failover loses a release": (won(ONE, 1, 2), released(ONE, 3, 4), failover(5, 6), found(ONE, 7, 8)),
    "a failover loses a completion, which is made again": (
        *(won(ONE, 1, 2), lost("complete", ONE, 3, 4, result="r"), found(ONE, 5, 5.5, held_result="r")),
        *(completed(ONE, 5, 20), failover(6, 7), extended(ONE, 8, 9, HOUR_MS)),
    ),
    "a deposed master releases what its successor keeps": (
        *(won(ONE, 1, 2), failover(3, 9), released(ONE, 4, 5), extended(ONE, 5.1, 5.2, HOUR_MS)),
        *(released(ONE, 6, 7), found(ONE, 10, 11)),
    ),
    "a deposed master answers from the past": (
        *(won(ONE, 1, 2), failover(3, 9), released(ONE, 4, 5), won(TWO, 6, 7), duplicate(THREE, ONE, 7.5, 8)),
    ),
}


@pytest.mark.parametrize("name", BROKEN | NO_PAIR_IS_WRONG)
def test_a_broken_promise_is_found(name: str) -> None:
    """Every broken history is found."""
    assert [finding.kind for finding in check((BROKEN | NO_PAIR_IS_WRONG)[name]).findings] == [NOT_LINEARIZABLE]


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_history_has_no_findings(name: str) -> None:
    """Unknown effects may or may not have happened, and overlapping calls may take effect in any order."""
    assert check(LEGAL[name]).findings == []


@pytest.mark.parametrize("name", NO_PAIR_IS_WRONG)
def test_no_rule_about_pairs_would_find_these(name: str) -> None:
    """Any two answers are legal if the other calls are in doubt."""
    history = NO_PAIR_IS_WRONG[name]
    for pair in combinations((call for call in history if call.answer), 2):
        assert check(call if call in pair else in_doubt(call) for call in history).findings == []


def test_an_internal_error_is_a_bug() -> None:
    """INTERNAL is a finding, whatever its effect."""
    (finding,) = check([call("claim", ONE, 1, 2, code="INTERNAL", applied="unknown")]).findings
    assert finding.kind == BUG


def test_transactions_do_not_mix() -> None:
    """Each transaction has its own winner."""
    assert check([won(ONE, 1, 2), won(TWO, 1, 2, transaction_id="another")]).findings == []


def test_an_undecided_id_is_a_finding() -> None:
    """A history too long to search is not taken for a good one."""
    (finding,) = check([won(ONE, 1, 2), released(ONE, 3, 4), won(TWO, 5, 6)], max_steps=1).findings
    assert finding.kind == UNDECIDED


def test_a_violation_is_explained() -> None:
    """The finding names the first answer that contradicts those before it, and how these can be explained."""
    history = (won(ONE, 1, 2), lost("release", ONE, 3, 4), won(TWO, 5, 6), won(THREE, 7, 8), not_found(9, 10))
    (finding,) = check(history).findings
    assert str(finding).splitlines() == [
        "not-linearizable: t: answer 3 of 4 contradicts those before it, in every order",
        "  calls by begin:",
        "        0.0000 to    1.0000 s  claim one ttl_ms=3600000: CLAIMED, held by one",
        "        2.0000 to    3.0000 s  release one token=one ttl_ms=3600000: UNAVAILABLE  applied=unknown",
        "        4.0000 to    5.0000 s  claim two ttl_ms=3600000: CLAIMED, held by two",
        "  >>    6.0000 to    7.0000 s  claim three ttl_ms=3600000: CLAIMED, held by three",
        "  the 2 answers before it can be explained in this order:",
        "        0.0000 to    1.0000 s  claim one ttl_ms=3600000: CLAIMED, held by one",
        "        2.0000 to    3.0000 s  release one token=one ttl_ms=3600000: UNAVAILABLE  applied=unknown",
        "        4.0000 to    5.0000 s  claim two ttl_ms=3600000: CLAIMED, held by two",
    ]


def recorded(rng: random.Random, size: int) -> list[Call]:
    """Return what overlapping callers of a correct store would record; some of them lose the answer."""
    calls: list[Call] = []
    record: Record | None = None
    now_s = end_s = 1.0
    for number in range(size):
        now_s += rng.uniform(0, 0.5)
        token, rpc = (
            rng.choice((ONE, TWO, THREE)),
            rng.choice(("claim", "claim", "complete", "release", "extend", "get")),
        )
        asked = call(
            rpc,
            token,
            max(0, now_s - rng.uniform(0, 1)),
            now_s + rng.uniform(0, 1),
            name=f"{token}/{number}",
            ttl_ms=rng.choice((300, 900, HOUR_MS)),
            fingerprint=rng.choice(("", "f", "g")),
            result=rng.choice(("r", "s")),
            may_shorten=rng.random() < 0.5,
        )
        if rng.random() < 0.1:
            calls.append(replace(asked, applied=rng.choice(("no", "unknown"))))
            continue
        if now_s >= end_s:
            record = None
        step = respond(record, asked)
        record = step.record
        if step.ttl_ms is not None and not (
            rpc == "extend" and not asked.may_shorten and now_s + asked.ttl_ms / 1_000 <= end_s
        ):
            end_s = now_s + asked.ttl_ms / 1_000
        outcome, was_replay, holder, result = step.answer
        answered = replace(asked, outcome=outcome, replayed=was_replay, holder=holder, held_result=result)
        calls.append(in_doubt(answered) if rng.random() < 0.15 else answered)
    return calls


def test_a_correct_store_is_never_accused() -> None:
    """No history of a correct store has a finding, however its calls overlap and whatever answers are lost."""
    for seed in range(300):
        findings = check(recorded(random.Random(seed), 25)).findings
        assert not findings, f"seed {seed}: {findings[0]}"


def test_one_wrong_answer_is_mostly_found() -> None:
    """An answer from another moment of the same history rarely fits by chance."""
    found_in = tried = 0
    for seed in range(300):
        rng = random.Random(seed)
        calls = recorded(rng, 25)
        at, other = rng.sample([number for number, call in enumerate(calls) if call.answer], 2)
        if calls[at].rpc == calls[other].rpc and calls[at].answer != calls[other].answer:
            outcome, was_replay, holder, result = calls[other].answer or Answer("")
            calls[at] = replace(calls[at], outcome=outcome, replayed=was_replay, holder=holder, held_result=result)
            tried += 1
            found_in += bool(check(calls).findings)
    assert found_in > 0.8 * tried > 20

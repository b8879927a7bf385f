"""The checker on handwritten histories: broken ones, and the closest legal ones."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.stress.fleet.check import (
    ANSWERED_TWICE,
    DIFFERENT,
    DIVIDED,
    FORGOTTEN,
    KEPT_DONE,
    KEPT_NOT_DONE,
    NO_CAUSE,
    NO_EFFECT,
    ONCE,
    TWICE,
    UNEXPECTED,
    UNEXPLAINED,
    check,
)
from tests.stress.fleet.history import (
    ANSWERED,
    BROKEN,
    CUT,
    FAILING,
    LONG,
    REFUSED,
    SHORT,
    Attempt,
    Disturbance,
    History,
    Row,
)

S = 1_000_000_000
A, B = "flask", "go"
HEADERS = (("content-type", "application/json"), ("location", "/rewards/1"))
BUSY = json.dumps({"type": "https://example.org/contract#in-progress"})
UNAVAILABLE = BUSY.replace("in-progress", "unavailable")


def attempt(service: str, second: float, ending: str = ANSWERED, status: int = 0, body: str = "") -> Attempt:
    """Return an attempt that lasts for a second."""
    begin_ns = int(second * S)
    return Attempt(
        key="k", service=service, begin_ns=begin_ns, end_ns=begin_ns + S, ending=ending, status=status, body=body
    )


def handled(service: str, second: float) -> Attempt:
    """Return an attempt that the handler answered."""
    return replace(attempt(service, second, status=201, body="{}"), headers=(*HEADERS, ("set-cookie", "a=b")))


def replayed(service: str, second: float) -> Attempt:
    """Return an attempt that the guard answered with the stored response."""
    return replace(
        attempt(service, second, status=201, body="{}"), headers=(*HEADERS, ("idempotency-replayed", "true"))
    )


def busy(service: str, second: float) -> Attempt:
    """Return an attempt that the guard refused with 409."""
    return replace(attempt(service, second, status=409, body=BUSY), headers=(("retry-after", "1"),))


def unavailable(service: str, second: float) -> Attempt:
    """Return an attempt that the guard refused with 503."""
    return replace(attempt(service, second, status=503, body=UNAVAILABLE), headers=(("retry-after", "1"),))


def fault(subject: str, second: float) -> Disturbance:
    """Return a disturbance of half a second."""
    return Disturbance(kind="kill", subject=subject, begin_ns=int(second * S), end_ns=int((second + 0.5) * S))


def row(service: str = A, number: int = 1) -> Row:
    """Return a row of the key."""
    return Row(row_id=number, key="k", paid_by=service)


def audited(*attempts: Attempt) -> tuple[Attempt, ...]:
    """Return the attempts as those of the audit."""
    return tuple(replace(one, audit=True) for one in attempts)


REPLAYED_BY_ALL = audited(replayed(A, 100), replayed(B, 101))
KEPT_BY_ALL = audited(busy(A, 100), busy(B, 101))


def verdict(
    *attempts: Attempt, rows: Sequence[Row] = (row(),), faults: Sequence[Disturbance] = (), work: str = SHORT
) -> tuple[set[str], str]:
    """Return the kinds of the findings, and the fate of the key."""
    found = check(History((A, B), list(attempts), list(faults), list(rows), {"k": work}))
    return {finding.kind for finding in found.findings}, found.fates["k"]


def test_a_key_done_once_and_replayed_by_all_is_legal() -> None:
    """Also with refusals while the work runs, and with a lost reply."""
    lost = replace(handled(A, 1), lost=True)
    attempts = (lost, busy(B, 1.5), unavailable(B, 1.6), replayed(B, 3), attempt(B, 4, CUT), attempt(B, 5, REFUSED))
    assert verdict(*attempts, *REPLAYED_BY_ALL) == (set(), ONCE)


@pytest.mark.parametrize(
    "cause", [attempt(A, 1, CUT), attempt(A, 1, BROKEN), unavailable(A, 1), attempt(A, 1, status=500)]
)
def test_doubt_explains_a_key_that_stays_kept(cause: Attempt) -> None:
    """It has a row or none, and never two."""
    faults = [fault(A, 1), fault("database", 0)]
    for rows, fate in (((), KEPT_NOT_DONE), ((row(),), KEPT_DONE)):
        assert verdict(cause, *KEPT_BY_ALL, rows=rows, faults=faults) == (set(), fate)
    kinds, _ = verdict(cause, *KEPT_BY_ALL, rows=[row(), row(B, 2)], faults=faults)
    assert kinds == {TWICE}


def test_a_success_that_could_not_be_recorded_explains_a_key_that_stays_kept() -> None:
    """A fault between the service and the claims excuses it, and nothing else does."""
    attempts = (handled(A, 1), busy(B, 3), *KEPT_BY_ALL)
    assert verdict(*attempts, faults=[fault("claims", 1.2)]) == (set(), KEPT_DONE)
    assert verdict(*attempts, faults=[fault("claims", 5)])[0] == {FORGOTTEN, NO_CAUSE}
    assert verdict(*attempts)[0] == {FORGOTTEN, NO_CAUSE}


def test_a_key_kept_without_a_cause_is_found() -> None:
    """Doubt after the success is recorded is no cause either."""
    assert verdict(*KEPT_BY_ALL, rows=()) == ({NO_CAUSE}, KEPT_NOT_DONE)
    assert NO_CAUSE in verdict(handled(A, 1), attempt(B, 5, CUT), *KEPT_BY_ALL)[0]


def test_long_work_has_no_excuse() -> None:
    """Nothing disturbs it for as long as its lease, so it must end with a success."""
    assert verdict(attempt(A, 1, CUT), *KEPT_BY_ALL, work=LONG)[0] == {NO_CAUSE}
    assert verdict(handled(A, 1), *REPLAYED_BY_ALL, work=LONG) == (set(), ONCE)


def test_two_rows_and_two_handlers_are_found() -> None:
    """As when the languages do not see each other's claims."""
    attempts = (handled(A, 1), handled(B, 1), *REPLAYED_BY_ALL)
    assert verdict(*attempts, rows=[row(A), row(B, 2)])[0] == {TWICE, ANSWERED_TWICE}
    assert ANSWERED_TWICE in verdict(*attempts)[0]


def test_a_success_needs_its_row() -> None:
    """It is the row of the service that answered."""
    attempts = (handled(A, 1), *REPLAYED_BY_ALL)
    assert verdict(*attempts, rows=())[0] == {NO_EFFECT}
    assert verdict(*attempts, rows=[row(B)])[0] == {NO_EFFECT}


@pytest.mark.parametrize(
    "change",
    [
        {"body": "{ }"},
        {"status": 200},
        {"headers": (HEADERS[0], ("idempotency-replayed", "true"))},
        {"headers": (*HEADERS, ("etag", '"1"'), ("idempotency-replayed", "true"))},
    ],
)
def test_a_replay_repeats_every_byte(change: dict[str, object]) -> None:
    """Of status, stored headers and body."""
    other = replace(replayed(B, 3), **change)  # type: ignore[arg-type]
    assert verdict(handled(A, 1), other, *REPLAYED_BY_ALL)[0] == {DIFFERENT}


def test_a_recorded_success_is_replayed_from_then_on() -> None:
    """Neither refused nor handled again. An attempt that began before may be refused."""
    assert verdict(handled(A, 1), busy(B, 1.9), *REPLAYED_BY_ALL)[0] == set()
    assert verdict(handled(A, 1), busy(B, 2.1), *REPLAYED_BY_ALL)[0] == {FORGOTTEN}
    assert verdict(replayed(A, 1), handled(B, 2.1), *REPLAYED_BY_ALL, rows=[row(B)])[0] == {FORGOTTEN}


def test_services_must_agree_at_the_end() -> None:
    """All of them, and each is asked."""
    assert verdict(handled(A, 1), *audited(replayed(A, 9), unavailable(B, 9)))[0] == {DIVIDED}
    assert verdict(handled(A, 1), *audited(replayed(A, 9)))[0] == {DIVIDED}


def test_answers_that_no_guard_gives_are_found() -> None:
    """A mismatch, and refusals without their problem or Retry-After."""
    for answer in (attempt(B, 3, status=422), attempt(B, 1, status=409, body=BUSY), replace(busy(B, 1), body="{}")):
        assert UNEXPECTED in verdict(handled(A, 1), answer, *REPLAYED_BY_ALL)[0]


def test_failures_without_a_fault_are_found() -> None:
    """A service that closes connections, or answers 500, by itself."""
    assert verdict(attempt(A, 1, BROKEN), *KEPT_BY_ALL, faults=[fault(B, 1)])[0] == {UNEXPLAINED}
    assert verdict(attempt(A, 1, status=500), *KEPT_BY_ALL)[0] == {UNEXPLAINED}


def test_work_that_fails_after_its_effect_stays_kept() -> None:
    """Its row exists, and no caller receives a success."""
    attempts = (attempt(A, 1, status=500), busy(B, 3))
    assert verdict(*attempts, *KEPT_BY_ALL, work=FAILING) == (set(), KEPT_DONE)
    assert UNEXPECTED in verdict(*attempts, handled(B, 4), *REPLAYED_BY_ALL, rows=[row(B)], work=FAILING)[0]

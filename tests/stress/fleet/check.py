"""The checker: what may have happened to a key, given its attempts, the faults and the rows. Pure.

The model of one key:

- The handler runs at most once. More than one row, or more than one answer of a handler that succeeded, is a finding.
- A success means exactly one row, made by the service that answered. Every success has the same status, body and
  stored headers (the allow-list of the client contract), whichever service replays it.
- Once a success is recorded, every later attempt is a replay. It is recorded when it has been replayed, or when the
  handler's service answered without a fault between it and the claims.
- At the end every service replays the success, or every service refuses the key with 409. The second needs a cause:
  an attempt whose effect is in doubt. The key then has no row or one, and the client contract keeps it so until the
  lease ends, which these keys do not reach.

Doubt has four causes: the service was killed before it answered, the route closed the connection before the answer, the
service answered 5xx, or its success could not be recorded. Work longer than its lease runs without these faults, so its
keys have no excuse.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.fleet.history import ANSWERED, BROKEN, CUT, FAILING, LONG, Attempt, Disturbance, History, Row

TWICE = "done-twice"
ANSWERED_TWICE = "handled-twice"
NO_EFFECT = "success-without-effect"
DIFFERENT = "replays-differ"
FORGOTTEN = "success-forgotten"
NO_CAUSE = "kept-without-cause"
DIVIDED = "services-disagree"
UNEXPECTED = "unexpected-answer"
UNEXPLAINED = "unexplained-failure"

ONCE = "done once, replayed by all"
KEPT_DONE = "kept: unknown, 1 row"
KEPT_NOT_DONE = "kept: unknown, no row"

# The problems that a caller may meet without having made a mistake.
_REFUSALS = {409: "in-progress", 503: "unavailable"}
_GOLDEN = Path(__file__).parents[3] / "clients/golden/http.json"
STORED_HEADERS = frozenset(json.loads(_GOLDEN.read_text())["defaults"]["stored_headers"])


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise: its kind, the key, and a text that shows it."""

    kind: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.key}: {self.text}"


@dataclass(slots=True)
class Verdict:
    """The findings, and the fate of each key."""

    findings: list[Finding] = field(default_factory=list)
    fates: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, bool] = field(default_factory=dict)
    """Whether some attempt of the key was in doubt."""


def check(history: History) -> Verdict:
    """Return every finding, and the fate of every key."""
    attempts: dict[str, list[Attempt]] = defaultdict(list)
    rows: dict[str, list[Row]] = defaultdict(list)
    for attempt in sorted(history.attempts, key=lambda one: one.begin_ns):
        attempts[attempt.key].append(attempt)
    for row in history.rows:
        rows[row.key].append(row)
    verdict = Verdict()
    for name in history.keys.keys() | rows.keys():
        key = _Key(name, attempts[name], rows[name], history)
        verdict.findings += key.findings()
        verdict.fates[name] = key.fate
        verdict.doubts[name] = any(map(key.in_doubt, key.attempts))
    return verdict


class _Key:
    """One key, its attempts in the order of their begin, and its rows."""

    def __init__(self, name: str, attempts: Sequence[Attempt], rows: Sequence[Row], history: History) -> None:
        self.attempts = attempts
        self._name = name
        self._rows = rows
        self._services = history.services
        self._disturbances = history.disturbances
        self._work = history.keys.get(name)
        self._successes = [one for one in attempts if one.succeeded]
        self._handled = [one for one in self._successes if not one.replayed]
        self._known_ns = min(
            (one.end_ns for one in self._successes if one.replayed or self._recorded(one)), default=math.inf
        )
        # The last word of each service.
        self._final = {one.service: one for one in attempts if one.audit}

    @property
    def fate(self) -> str:
        """How the key ended."""
        if any(one.succeeded for one in self._final.values()):
            return ONCE
        return KEPT_DONE if self._rows else KEPT_NOT_DONE

    def findings(self) -> list[Finding]:
        """Return what contradicts the model."""
        found = [
            *self._effects(),
            *self._replays(),
            *(finding for one in self.attempts for finding in self._answer(one)),
            *self._order(),
            *self._end(),
        ]
        return [Finding(kind, self._name, f"{text}\n{self._story()}") for kind, text in found]

    def in_doubt(self, attempt: Attempt) -> bool:
        """Return whether the attempt may have left the key claimed, with or without a row."""
        if attempt.begin_ns > self._known_ns:
            return False
        if attempt.ending == ANSWERED:
            return attempt.status >= 500 or (attempt in self._handled and not self._recorded(attempt))
        return attempt.ending in (CUT, BROKEN)

    def _effects(self) -> Iterable[tuple[str, str]]:
        if len(self._rows) > 1:
            yield TWICE, f"{len(self._rows)} rows, by {', '.join(row.paid_by for row in self._rows)}"
        if len(self._handled) > 1:
            yield ANSWERED_TWICE, f"handled by {', '.join(one.service for one in self._handled)}"
        payers = {row.paid_by for row in self._rows}
        if self._successes and not self._rows:
            yield NO_EFFECT, "answered with a success, and no row"
        for one in self._handled:
            if self._rows and one.service not in payers:
                yield NO_EFFECT, f"{one.service} handled it; the row is by {', '.join(payers)}"

    def _replays(self) -> Iterable[tuple[str, str]]:
        forms = {_form(one): one for one in reversed(self._successes)}
        if len(forms) > 1:
            yield DIFFERENT, "; ".join(f"{one.service} answered {form}" for form, one in forms.items())

    def _answer(self, attempt: Attempt) -> Iterable[tuple[str, str]]:
        if attempt.ending == BROKEN and not self._meets(attempt, attempt.service):
            yield UNEXPLAINED, f"{attempt.service} closed the connection, and was not killed"
        if attempt.ending != ANSWERED or attempt.succeeded:
            return
        if attempt.status in _REFUSALS:
            problem = _REFUSALS[attempt.status]
            headers = dict(attempt.headers)
            if f"#{problem}" not in attempt.body or headers.get("retry-after") != "1":
                yield UNEXPECTED, f"{attempt.service} answered {attempt.status} without {problem} or Retry-After"
        elif attempt.status < 500:
            yield UNEXPECTED, f"{attempt.service} answered {attempt.status} {attempt.body}"
        elif self._work != FAILING and not self._database_failed(attempt):
            yield UNEXPLAINED, f"{attempt.service} answered {attempt.status} before any fault of the database"

    def _order(self) -> Iterable[tuple[str, str]]:
        for one in self.attempts:
            late = one.ending == ANSWERED and one.begin_ns > self._known_ns
            if late and not one.replayed and one.status != 503:
                yield FORGOTTEN, f"{one.service} answered {one.status} after the success was recorded"

    def _end(self) -> Iterable[tuple[str, str]]:
        if self._work == FAILING and self._successes:
            yield UNEXPECTED, "answered with a success, and the work always fails"
        missing = [name for name in self._services if name not in self._final]
        refusing = [name for name, one in self._final.items() if not one.succeeded]
        if missing:
            yield DIVIDED, f"never asked at the end: {', '.join(missing)}"
        elif refusing and len(refusing) < len(self._services):
            yield DIVIDED, f"not replayed by {', '.join(refusing)}"
        elif refusing and not (self._work != LONG and any(map(self.in_doubt, self.attempts))):
            yield NO_CAUSE, "refused by all at the end, and no attempt was in doubt"

    def _recorded(self, handled: Attempt) -> bool:
        return not self._meets(handled, "claims", "machine")

    def _database_failed(self, attempt: Attempt) -> bool:
        # A connection that the fault broke may fail its next user, much later.
        return any(one.subject == "database" and one.begin_ns <= attempt.end_ns for one in self._disturbances)

    def _meets(self, attempt: Attempt, *subjects: str) -> bool:
        return any(one.subject in subjects and one.meets(attempt) for one in self._disturbances)

    def _story(self) -> str:
        if not self.attempts:
            return "  no attempts"
        origin = self.attempts[0].begin_ns
        until = self.attempts[-1].end_ns
        rows = (f"  row {row.row_id} by {row.paid_by}" for row in self._rows)
        faults = (
            f"  {(one.begin_ns - origin) / 1e9:7.3f} … {(one.end_ns - origin) / 1e9:7.3f}  ({one.kind})"
            for one in self._disturbances
            if one.begin_ns <= until and origin <= one.end_ns
        )
        return "\n".join([*(f"  {one.since(origin)}" for one in self.attempts), *faults, *rows])


def _form(success: Attempt) -> tuple[int, tuple[tuple[str, str], ...], str]:
    """Return what a replay must repeat to the byte."""
    stored = tuple((name, value) for name, value in success.headers if name in STORED_HEADERS)
    return success.status, stored, success.body


def stalls(disturbances: Iterable[Disturbance], begin_ns: int) -> float:
    """Return the longest stall of the machine since `begin_ns`, in seconds."""
    return max(
        ((one.end_ns - one.begin_ns) / 1e9 for one in disturbances if one.kind == "stall" and one.begin_ns >= begin_ns),
        default=0.0,
    )

"""The checker: finds answers that no correct service can have given. Pure; independent of how a history was recorded.

Every answer is an observation of a holder: at some moment between the begin and the end of the call the store held the
transaction for one token. Two observations are consistent if, in either order, everything required between them (the
end of a claim, a new claim) may have happened. The checker compares pairs only, and assumes that a call with unknown
effect may take effect at any time after it began. A finding is therefore always a broken promise, but a broken promise
that only shows in more than two calls may be missed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from tests.stress.chaos.history import Call

# The store measures a ttl by the wall clock, which may drift from the monotonic clock of the histories.
CLOCK_SLACK_NS = 50_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise: its kind, a sentence, and the calls that show it."""

    kind: str
    sentence: str
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return "\n".join((f"{self.kind}: {self.sentence}", *(f"    {call}" for call in self.calls)))


@dataclass(frozen=True, slots=True)
class Observation:
    """A call whose answer shows that `token` held the transaction at some moment of the call."""

    call: Call
    token: str
    fresh: bool
    """Whether this call made the claim, so that nobody held the transaction just before."""
    completed: bool


def check(calls: Iterable[Call]) -> list[Finding]:
    """Return the first finding of each kind for each transaction."""
    by_transaction: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_transaction[call.transaction_id].append(call)
    found: list[Finding] = []
    for ordered in by_transaction.values():
        ordered.sort(key=lambda call: call.begin_ns)
        first: dict[str, Finding] = {}
        for finding in _Transaction(ordered).findings():
            first.setdefault(finding.kind, finding)
        found += first.values()
    return found


class _Transaction:
    """The calls on one transaction, ordered by begin."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        # Calls that changed something, or may have, by rpc and token.
        self._changes: dict[tuple[str, str], list[Call]] = defaultdict(list)
        for call in calls:
            if call.may_have_changed:
                self._changes[call.rpc, call.token].append(call)
        self._observations = [observation for call in calls if (observation := _observation(call)) is not None]

    def findings(self) -> Iterator[Finding]:
        """Yield every finding."""
        for call in self._calls:
            yield from _answered_wrongly(call)
        for observation in self._observations:
            yield from self._without_grounds(observation)
        for one, other in combinations(self._observations, 2):
            if not (self._may_follow(one, other) or self._may_follow(other, one)):
                yield _conflict(one, other)
        for call in self._calls:
            if call.outcome in {"NOT_HELD", "RELEASED"}:
                yield from self._lost(call)

    def _without_grounds(self, observation: Observation) -> Iterator[Finding]:
        call = observation.call
        if not self._began("claim", observation.token, call):
            if call.replayed:
                kind, what = "replay-of-nothing", "is a replay, but no earlier attempt with its token can have claimed"
            else:
                kind, what = (
                    "held-by-nobody",
                    f"shows {observation.token}, but none of its claims can have succeeded by then",
                )
            tries = (other for other in self._calls if other.token == observation.token and other.rpc == "claim")
            yield Finding(kind, f"an answer {what}", (call, *(other for other in tries if other is not call)))
        if observation.completed and not self._began("complete", observation.token, call):
            yield Finding("completed-by-nobody", "shown as completed, but its holder cannot have completed it", (call,))

    def _began(self, rpc: str, token: str, by: Call) -> bool:
        return any(change.begin_ns <= by.end_ns for change in self._changes[rpc, token])

    def _may_follow(self, first: Observation, second: Observation) -> bool:
        if first.call.begin_ns > second.call.end_ns:
            return False
        same_claim = first.token == second.token and not second.fresh and not (first.completed and not second.completed)
        return same_claim or self._may_end(first, second.call)

    def _may_end(self, observation: Observation, by: Call) -> bool:
        """Return whether the observed claim may have ended before the end of a call."""
        if not observation.completed and any(
            release.begin_ns <= by.end_ns and release.latest_ns >= observation.call.begin_ns
            for release in self._changes["release", observation.token]
        ):
            return True
        begun = self._changes["complete", observation.token]
        if observation.fresh:
            begun = [observation.call, *begun]
        elif not observation.completed:
            begun = [*self._changes["claim", observation.token], *begun]
        return any(call.begin_ns + call.ttl_ms * 1_000_000 - CLOCK_SLACK_NS <= by.end_ns for call in begun)

    def _lost(self, absence: Call) -> Iterator[Finding]:
        """Yield observations of a token that fit neither before nor after the answer that it holds nothing."""
        if (
            absence.rpc == "release"
            and absence.outcome == "NOT_HELD"
            and self._began("complete", absence.token, absence)
        ):
            # A completed transaction cannot be released, but is still held.
            return
        for observation in self._observations:
            if observation.token != absence.token or observation.call is absence:
                continue
            before = observation.call.begin_ns <= absence.end_ns and self._may_end(observation, absence)
            after = absence.begin_ns <= observation.call.end_ns and any(
                claim.latest_ns >= absence.begin_ns and claim.begin_ns <= observation.call.end_ns
                for claim in self._changes["claim", observation.token]
            )
            if not (before or after):
                if absence.outcome == "NOT_HELD":
                    yield Finding(
                        "claim-lost",
                        "a holder receives NOT_HELD, but nothing can have ended its claim",
                        (observation.call, absence),
                    )
                else:
                    yield Finding("held-after-release", "a released claim is still held", (absence, observation.call))


def _observation(call: Call) -> Observation | None:
    if call.outcome == "CLAIMED":
        return Observation(call, call.token, fresh=not call.replayed, completed=False)
    if call.outcome == "DUPLICATE":
        return Observation(call, call.holder, fresh=False, completed=call.completed)
    if call.outcome in {"COMPLETED", "RELEASED"}:
        return Observation(call, call.token, fresh=False, completed=call.outcome == "COMPLETED")
    return None


def _answered_wrongly(call: Call) -> Iterator[Finding]:
    own = call.holder == call.token
    if call.outcome == "DUPLICATE" and own and not call.completed:
        yield Finding("retry-refused", "a retry receives DUPLICATE of its own claim", (call,))
    if call.outcome in {"CLAIMED", "COMPLETED"} and not own:
        yield Finding("answer-of-another", "a caller receives success, but the answer names another holder", (call,))
    if call.outcome == "CLAIMED" and call.completed:
        yield Finding("claimed-again", "a completed transaction is answered CLAIMED", (call,))
    if call.code == "INTERNAL":
        yield Finding("bug", "the service failed with INTERNAL", (call,))


def _conflict(one: Observation, other: Observation) -> Finding:
    calls = (one.call, other.call)
    if one.completed != other.completed:
        return Finding("claimed-again", "a completed transaction was claimed again before it expired", calls)
    if one.token == other.token:
        return Finding("stored-twice", "one token claimed twice, but nothing can have ended its first claim", calls)
    return Finding("two-holders", "two tokens held it, but nothing can have ended either claim in between", calls)

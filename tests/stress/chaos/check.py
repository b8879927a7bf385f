"""The checker: finds what no correct service can have answered. Pure, and knows nothing of how a history was made.

Every answer is a sight of a holder: at some moment between its begin and its end the store held the transaction for one
token. Two sights fit together when, in one order or the other, everything that had to happen between them (the end of a
life, a new claim) may have happened. Only pairs are looked at, and a doubtful call may take effect at any time after it
began, so a finding is always a broken promise; a broken promise that many calls hide together may go unseen.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from tests.stress.chaos.history import Call

# The store measures a ttl by the wall clock, which may be slewed against the monotonic one of the histories.
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
class Sight:
    """A call whose answer shows that `token` held the transaction at some moment while it ran."""

    call: Call
    token: str
    fresh: bool
    """The call itself made the claim, so that nobody held it just before."""
    completed: bool


def check(calls: Iterable[Call]) -> list[Finding]:
    """Return what is wrong with a history: of each transaction the first finding of each kind."""
    stories: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        stories[call.transaction_id].append(call)
    found: list[Finding] = []
    for story in stories.values():
        story.sort(key=lambda call: call.begin_ns)
        first: dict[str, Finding] = {}
        for finding in _Story(story).findings():
            first.setdefault(finding.kind, finding)
        found += first.values()
    return found


class _Story:
    """All calls of one transaction, by begin."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        # The calls that changed something, or may have, by rpc and token.
        self._changes: dict[tuple[str, str], list[Call]] = defaultdict(list)
        for call in calls:
            if call.may_have_changed:
                self._changes[call.rpc, call.token].append(call)
        self._sights = [sight for call in calls if (sight := _sight(call)) is not None]

    def findings(self) -> Iterator[Finding]:
        """Yield everything that is wrong."""
        for call in self._calls:
            yield from _answered_wrongly(call)
        for sight in self._sights:
            yield from self._without_grounds(sight)
        for one, other in combinations(self._sights, 2):
            if not (self._may_follow(one, other) or self._may_follow(other, one)):
                yield _conflict(one, other)
        for call in self._calls:
            if call.outcome in {"NOT_HELD", "RELEASED"}:
                yield from self._lost(call)

    def _without_grounds(self, sight: Sight) -> Iterator[Finding]:
        call = sight.call
        if not self._began("claim", sight.token, call):
            if call.replayed:
                kind, what = "replay-of-nothing", "is told a replay, and no earlier try of its token can have claimed"
            else:
                kind, what = "held-by-nobody", f"shows {sight.token}, none of whose claims can have succeeded by then"
            tries = (other for other in self._calls if other.token == sight.token and other.rpc == "claim")
            yield Finding(kind, f"an answer {what}", (call, *(other for other in tries if other is not call)))
        if sight.completed and not self._began("complete", sight.token, call):
            yield Finding("completed-by-nobody", "shown as completed, which its holder cannot have asked for", (call,))

    def _began(self, rpc: str, token: str, by: Call) -> bool:
        return any(change.begin_ns <= by.end_ns for change in self._changes[rpc, token])

    def _may_follow(self, first: Sight, second: Sight) -> bool:
        if first.call.begin_ns > second.call.end_ns:
            return False
        one_life = first.token == second.token and not second.fresh and not (first.completed and not second.completed)
        return one_life or self._may_end(first, second.call)

    def _may_end(self, sight: Sight, by: Call) -> bool:
        """Return whether the life that a sight shows may have ended before the end of a call."""
        if not sight.completed and any(
            release.begin_ns <= by.end_ns and release.latest_ns >= sight.call.begin_ns
            for release in self._changes["release", sight.token]
        ):
            return True
        begun = self._changes["complete", sight.token]
        if sight.fresh:
            begun = [sight.call, *begun]
        elif not sight.completed:
            begun = [*self._changes["claim", sight.token], *begun]
        return any(call.begin_ns + call.ttl_ms * 1_000_000 - CLOCK_SLACK_NS <= by.end_ns for call in begun)

    def _lost(self, absence: Call) -> Iterator[Finding]:
        """Find sights of a token that fit neither before nor after it was told that it holds nothing any more."""
        if (
            absence.rpc == "release"
            and absence.outcome == "NOT_HELD"
            and self._began("complete", absence.token, absence)
        ):
            # What is completed can no longer be released, and is held all the same.
            return
        for sight in self._sights:
            if sight.token != absence.token or sight.call is absence:
                continue
            before = sight.call.begin_ns <= absence.end_ns and self._may_end(sight, absence)
            after = absence.begin_ns <= sight.call.end_ns and any(
                claim.latest_ns >= absence.begin_ns and claim.begin_ns <= sight.call.end_ns
                for claim in self._changes["claim", sight.token]
            )
            if not (before or after):
                if absence.outcome == "NOT_HELD":
                    yield Finding(
                        "claim-lost",
                        "a holder is told NOT_HELD, and nothing can have ended its claim",
                        (sight.call, absence),
                    )
                else:
                    yield Finding("held-after-release", "a released claim is still held", (absence, sight.call))


def _sight(call: Call) -> Sight | None:
    if call.outcome == "CLAIMED":
        return Sight(call, call.token, fresh=not call.replayed, completed=False)
    if call.outcome == "DUPLICATE":
        return Sight(call, call.holder, fresh=False, completed=call.completed)
    if call.outcome in {"COMPLETED", "RELEASED"}:
        return Sight(call, call.token, fresh=False, completed=call.outcome == "COMPLETED")
    return None


def _answered_wrongly(call: Call) -> Iterator[Finding]:
    own = call.holder == call.token
    if call.outcome == "DUPLICATE" and own and not call.completed:
        yield Finding("retry-refused", "a retry is told that it is a duplicate of itself", (call,))
    if call.outcome in {"CLAIMED", "COMPLETED"} and not own:
        yield Finding("answer-of-another", "a caller is told that it holds what the answer says is another's", (call,))
    if call.outcome == "CLAIMED" and call.completed:
        yield Finding("claimed-again", "a completed transaction is told CLAIMED", (call,))
    if call.code == "INTERNAL":
        yield Finding("bug", "the service failed in a way that it has no name for", (call,))


def _conflict(one: Sight, other: Sight) -> Finding:
    calls = (one.call, other.call)
    if one.completed != other.completed:
        return Finding("claimed-again", "completed, and yet claimed while that was still to be remembered", calls)
    if one.token == other.token:
        return Finding("stored-twice", "one token made its claim anew, and nothing can have ended the first", calls)
    return Finding("two-holders", "two tokens held it, and nothing can have ended the life of either between", calls)

"""The checker: is there an order in which the calls on each id make sense? Pure.

A history is linearizable if every call can take effect at one moment between its begin and its end, such that the
sequential model gives exactly the recorded answers (Wing and Gong; memoised as Lowe does). Calls with unknown effect
may take effect at any time after their begin, or never. Calls that were certainly not applied never do.

The search is bounded. An id it cannot decide is a finding.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tests.stress.chaos.history import Call
from tests.stress.chaos.model import Record, State, Unreplicated, Zone

MAX_STEPS = 200_000

NOT_LINEARIZABLE = "not-linearizable"
UNDECIDED = "undecided"
BUG = "bug"

# Answers that no replica has to acknowledge, so that a deposed master may still give them.
_UNCONFIRMED = {"DUPLICATE", "PAYLOAD_MISMATCH", "NOT_HELD", "FOUND", "NOT_FOUND"}


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken promise: its kind, and a text that shows it."""

    kind: str
    transaction_id: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.transaction_id}: {self.text}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The findings, and what was checked."""

    findings: list[Finding]
    steps: int = 0
    most_steps: int = 0
    excused: int = 0
    """Answers during a failover that prove nothing."""


def check(calls: Iterable[Call], max_steps: int = MAX_STEPS) -> Verdict:
    """Return at most one finding for each id, and one for each INTERNAL error."""
    by_id: dict[str, list[Call]] = defaultdict(list)
    failovers: list[Call] = []
    for call in calls:
        if call.rpc == "failover":
            failovers.append(call)
        else:
            by_id[call.transaction_id].append(call)
    findings: list[Finding] = []
    counts = [0]
    excused = 0
    for transaction_id, its_calls in by_id.items():
        findings += (Finding(BUG, transaction_id, str(call)) for call in its_calls if call.code == "INTERNAL")
        kept = _excuse(its_calls, failovers)
        excused += len(its_calls) - len(kept)
        explanation = explain(kept, failovers, max_steps)
        counts.append(explanation.steps)
        if explanation.order is None:
            findings.append(_finding(transaction_id, kept, failovers, explanation, max_steps))
    return Verdict(findings, sum(counts), max(counts), excused)


def _excuse(calls: Sequence[Call], failovers: Sequence[Call]) -> list[Call]:
    """Leave out what a deposed master may have answered; what it was told to release may stay held."""
    kept = []
    for call in calls:
        if any(call.begin_ns <= failover.end_ns and failover.begin_ns <= call.end_ns for failover in failovers):
            if call.outcome in _UNCONFIRMED:
                continue
            if call.outcome == "RELEASED":
                call = _in_doubt(call)  # noqa: PLW2901 - the same call, with less known
        kept.append(call)
    return kept


def _in_doubt(call: Call) -> Call:
    return replace(
        call, outcome="ERROR", code="(pending)", applied="unknown", replayed=False, holder="", held_result=None
    )


class Explanation(NamedTuple):
    """The order in which calls took effect; None if there is none, or if the search was given up."""

    order: tuple[Call, ...] | None
    steps: int
    undecided: bool = False


class _Node(NamedTuple):
    """A state the search reached, by the calls in `done` (a set of bits)."""

    done: int
    state: State
    path: "tuple[Call, object] | None"


def explain(calls: Sequence[Call], failovers: Sequence[Call] = (), max_steps: int = MAX_STEPS) -> Explanation:
    """Search an order of the calls on one id that explains every answer."""
    return _Search(calls, failovers).run(max_steps)


class _Search:
    def __init__(self, calls: Sequence[Call], failovers: Sequence[Call]) -> None:
        relevant = [call for call in calls if call.applied != "no" and _can_matter(call, calls)]
        if relevant:
            first = min(call.begin_ns for call in relevant)
            # A failover before the first call changes nothing.
            relevant += (failover for failover in failovers if failover.end_ns >= first)
        self._calls = sorted(relevant, key=lambda call: (call.latest_ns, call.begin_ns))
        self._answered = sum(1 << number for number, call in enumerate(self._calls) if call.answer is not None)
        self._failovers = any(call.rpc == "failover" for call in relevant)
        self._seen: dict[tuple[int, Record | None, tuple[Unreplicated, ...]], list[Zone]] = defaultdict(list)

    def run(self, max_steps: int) -> Explanation:
        stack = [_Node(0, State(None, Zone(-math.inf, math.inf)), None)]
        steps = 0
        while stack:
            node = stack.pop()
            if not self._answered & ~node.done:
                return Explanation(_order(node), steps)
            if not self._is_new(node):
                continue
            steps += 1
            if steps > max_steps:
                return Explanation(None, steps, undecided=True)
            stack += reversed(list(self._next(node)))
        return Explanation(None, steps)

    def _is_new(self, node: _Node) -> bool:
        zones = self._seen[node.done, node.state.record, node.state.earlier]
        if any(zone.covers(node.state.zone) for zone in zones):
            return False
        zones[:] = [zone for zone in zones if not node.state.zone.covers(zone)]
        zones.append(node.state.zone)
        return True

    def _next(self, node: _Node) -> Iterator[_Node]:
        left = [(1 << number, call) for number, call in enumerate(self._calls) if not node.done & 1 << number]
        # The list is in the order of ends, so the first answered call is the most urgent.
        urgent = next(call for _, call in left if call.answer is not None)
        for bit, call in left:
            if (state := node.state.allows_now(call)) is not None:
                yield _Node(node.done | bit, state, (call, node.path))
                return
        tried: set[tuple[str | int, ...]] = set()
        for bit, call in left:
            if call.begin_ns > urgent.end_ns:
                continue
            if call.answer is None and call.rpc not in {"claim", "failover"}:
                # Attempts that ask the same are interchangeable, and the one that began first can do most.
                asked = (call.rpc, call.token, call.ttl_ms, call.may_shorten, call.result)
                if asked in tried:
                    continue
                tried.add(asked)
            for state in node.state.after(call, failovers=self._failovers):
                yield _Node(node.done | bit, state, (call, node.path))


def _can_matter(call: Call, calls: Sequence[Call]) -> bool:
    """Return whether the call was answered, or may be what explains an answer.

    A claim in doubt that no answer shows explains only that its token could release: without it everything else
    fits as well.
    """
    return (
        call.answer is not None
        or call.rpc != "claim"
        or any(
            other.holder == call.name or (other.outcome == "RELEASED" and other.token == call.token) for other in calls
        )
    )


def _order(node: _Node) -> tuple[Call, ...]:
    order: list[Call] = []
    path: object = node.path
    while isinstance(path, tuple):
        call, path = path
        order.append(call)
    return tuple(reversed(order))


def _finding(
    transaction_id: str, calls: Sequence[Call], failovers: Sequence[Call], whole: Explanation, max_steps: int
) -> Finding:
    """Report the shortest history that cannot be explained: each answer in turn is added to those before it."""
    if whole.undecided:
        return Finding(UNDECIDED, transaction_id, f"no decision about {len(calls)} calls after {whole.steps} steps")
    answered = sorted((call for call in calls if call.answer is not None), key=lambda call: call.end_ns)
    best: tuple[Call, ...] = ()
    for last in answered:
        until = [
            call if call.answer is None or call.end_ns <= last.end_ns else _in_doubt(call)
            for call in (*calls, *failovers)
            if call.begin_ns <= last.end_ns
        ]
        explanation = explain([call for call in until if call.rpc != "failover"], failovers, max_steps)
        if explanation.order is None:
            break
        best = explanation.order
    origin, before = min(call.begin_ns for call in calls), answered.index(last)
    shown = sorted((call for call in until if call.end_ns >= origin), key=lambda call: call.begin_ns)
    lines = [
        f"answer {before + 1} of {len(answered)} contradicts those before it, in every order",
        "  calls by begin:",
        *(f"  {'>>' if call is last else '  '} {call.since(origin)}" for call in shown),
        f"  the {before} answers before it can be explained in this order:",
        *(f"     {call.since(origin)}" for call in best),
    ]
    return Finding(NOT_LINEARIZABLE, transaction_id, "\n".join(lines))

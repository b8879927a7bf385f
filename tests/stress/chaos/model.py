"""The sequential model of one transaction id. Pure; shares no code with the service.

`respond` is the contract: the answer to a call, and what the call makes of the record. `State.after` adds time: calls
take effect at some moment between their begin and their end, and a record ends at a moment that is known only within
bounds.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from tests.stress.chaos.history import Answer, Call

# The store measures a ttl by the wall clock, which may drift from the monotonic clock of the histories.
TOLERANCE_NS = 50_000_000


class Record(NamedTuple):
    """What a store holds for an id. `result` is None while the work is in progress."""

    holder: str
    token: str
    fingerprint: str
    result: str | None = None


class Step(NamedTuple):
    """The answer to a call, the record after it, and the ttl the call set, if any."""

    answer: Answer
    record: Record | None
    ttl_ms: int | None = None


def respond(record: Record | None, call: Call) -> Step:
    """Return what a store that holds `record` does with a call."""
    if call.rpc == "claim":
        return _claim(record, call)
    if call.rpc == "get":
        return Step(Answer("NOT_FOUND") if record is None else _shown("FOUND", record), record)
    if record is not None and record.token == call.token:
        if call.rpc == "complete" and record.result in {None, call.result}:
            done = record._replace(result=call.result)
            return Step(_shown("COMPLETED", done), done, None if record.result == call.result else call.ttl_ms)
        if call.rpc == "release" and record.result is None:
            return Step(Answer("RELEASED"), None)
        if call.rpc == "extend" and record.result is None:
            return Step(_shown("EXTENDED", record), record, call.ttl_ms)
    return Step(Answer("NOT_HELD"), record)


def _claim(record: Record | None, call: Call) -> Step:
    if record is None:
        claimed = Record(call.name, call.token, call.fingerprint)
        return Step(_shown("CLAIMED", claimed), claimed, call.ttl_ms)
    if call.fingerprint and record.fingerprint and call.fingerprint != record.fingerprint:
        return Step(_shown("PAYLOAD_MISMATCH", record), record)
    if record.token == call.token and record.result is None:
        return Step(_shown("CLAIMED", record)._replace(replayed=True), record)
    return Step(_shown("DUPLICATE", record), record)


def _shown(outcome: str, record: Record) -> Answer:
    return Answer(outcome, holder=record.holder, result=record.result)


class Zone(NamedTuple):
    """The possible pairs of the present moment and the end of the record: bounds on both and on the time left.

    The three pairs of bounds are kept tight, so that equal sets of pairs are equal zones.
    """

    now_from: float
    now_to: float
    end_from: float = -math.inf
    end_to: float = math.inf
    left_from: float = -math.inf
    left_to: float = math.inf

    def later(self, begin_ns: float, latest_ns: float) -> "Zone | None":
        """Let time pass until some moment between these two."""
        later = self._replace(now_from=max(self.now_from, begin_ns), now_to=latest_ns, left_from=-math.inf)
        return later._tight()

    def before(self, latest_ns: float) -> "Zone | None":
        """Keep the pairs in which the present is not later than this."""
        return self._replace(now_to=min(self.now_to, latest_ns))._tight()

    def left(self, at_least: float = -math.inf, at_most: float = math.inf) -> "Zone | None":
        """Keep the pairs with such a time left."""
        return self._replace(left_from=max(self.left_from, at_least), left_to=min(self.left_to, at_most))._tight()

    def ending(self, end_from: float = -math.inf, end_to: float = math.inf) -> "Zone":
        """Forget the end of the record, and bound the new one."""
        zone = Zone(self.now_from, self.now_to, end_from, end_to)._tight()
        assert zone is not None
        return zone

    def lasting(self, ttl_ns: int) -> "Zone":
        """Let the record end this long after the present moment."""
        ends = Zone(self.now_from, self.now_to).left(ttl_ns - TOLERANCE_NS, ttl_ns + TOLERANCE_NS)
        assert ends is not None
        return ends

    def covers(self, other: "Zone") -> bool:
        """Return whether every pair of `other` is one of these."""
        return (
            self.now_from <= other.now_from
            and self.now_to >= other.now_to
            and self.end_from <= other.end_from
            and self.end_to >= other.end_to
            and self.left_from <= other.left_from
            and self.left_to >= other.left_to
        )

    def _tight(self) -> "Zone | None":
        now_from, now_to, end_from, end_to, left_from, left_to = self
        now_from, now_to = max(now_from, end_from - left_to), min(now_to, end_to - left_from)
        end_from, end_to = max(end_from, now_from + left_from), min(end_to, now_to + left_to)
        left_from, left_to = max(left_from, end_from - now_to), min(left_to, end_to - now_from)
        if now_from > now_to or end_from > end_to or left_from > left_to:
            return None
        return Zone(now_from, now_to, end_from, end_to, left_from, left_to)


class Unreplicated(NamedTuple):
    """A record that a failover may bring back, and the bounds of its end."""

    record: Record | None
    end_from: float
    end_to: float


class State(NamedTuple):
    """The record, when it ends, and the earlier ones since the last change that replicas are known to have."""

    record: Record | None
    zone: Zone
    earlier: tuple[Unreplicated, ...] = ()

    def after(self, call: Call, *, failovers: bool = False) -> "Iterator[State]":
        """Yield the states in which the call has taken effect at some moment of its own with its own answer.

        A call with unknown effect takes effect only where it changes something. With `failovers`, changes that no
        replica is known to have are remembered as such.
        """
        zone = self.zone.later(call.begin_ns, call.latest_ns)
        if zone is None:
            return
        if call.rpc == "failover":
            for number, lost in enumerate(self.earlier):
                back = zone.ending(lost.end_from, lost.end_to)
                for record, then in _held_or_free(lost.record, back):
                    yield State(record, then, self.earlier[:number])
            return
        for record, then in _held_or_free(self.record, zone):
            step = respond(record, call)
            changes = step.record != record or step.ttl_ms is not None
            if not changes if call.answer is None else step.answer != call.answer:
                continue
            earlier = self.earlier
            if call.outcome in _REPLICATED:
                earlier = ()
            elif failovers and changes:
                earlier = (*earlier, Unreplicated(record, then.end_from, then.end_to))
            for ending in _endings(step, call, then):
                yield State(step.record, ending, earlier)

    def allows_now(self, call: Call) -> "State | None":
        """Return the state after a call that changes nothing and may be taken to happen at once, or None.

        Exact: the call has begun whatever the present moment is, so no other order explains more.
        """
        if call.answer is None or call.begin_ns > self.zone.now_from or (self.earlier and call.outcome in _REPLICATED):
            return None
        step = respond(self.record, call)
        if step.answer != call.answer or step.record != self.record or step.ttl_ms is not None:
            return None
        zone = self.zone.before(call.latest_ns)
        return None if zone is None else self._replace(zone=zone)


def _endings(step: Step, call: Call, zone: Zone) -> Iterator[Zone]:
    """Yield the zones after a step: when its record ends."""
    if step.record is None:
        yield zone.ending()
        return
    if step.ttl_ms is None:
        yield zone
        return
    ttl_ns = step.ttl_ms * 1_000_000
    shorter: Zone | None = zone
    if call.rpc == "extend" and not call.may_shorten:
        # Both ends are uncertain, so near each other either may be the later one.
        if call.answer is not None and (kept := zone.left(at_least=ttl_ns - TOLERANCE_NS)) is not None:
            yield kept
        shorter = zone.left(at_most=ttl_ns + TOLERANCE_NS)
    if shorter is not None:
        yield shorter.lasting(ttl_ns)


def _held_or_free(record: Record | None, zone: Zone) -> Iterator[tuple[Record | None, Zone]]:
    """Yield what the store holds where the record has not ended, and where it has."""
    if record is None:
        yield None, zone
        return
    if (held := zone.left(at_least=0)) is not None:
        yield record, held
    if (ended := zone.left(at_most=0)) is not None:
        yield None, ended.ending()


# With DEDUP_MIN_REPLICAS these outcomes mean that a replica has everything up to this call.
_REPLICATED = frozenset({"CLAIMED", "COMPLETED", "EXTENDED"})

"""The record of an attempt, and the files that keep it."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    """What a reply says of a transaction."""

    outcome: str
    """The outcome without its prefix; FOUND or NOT_FOUND for a look."""
    replayed: bool = False
    holder: str = ""
    """The claimant shown, which is the name of the attempt that claimed."""
    result: str | None = None
    """The result shown; None unless completed."""


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt as its client saw it; an entry of a batch is one too.

    Times are CLOCK_MONOTONIC, which all processes of a host share. A failover is recorded as a call without an id.
    """

    client: str
    rpc: str
    """claim, complete, release, extend, get or failover."""
    transaction_id: str
    token: str
    """Shared by the attempts of one logical call."""
    begin_ns: int
    end_ns: int
    outcome: str
    """As in Answer, or ERROR."""
    name: str = ""
    """Unique to the attempt. Claims send it as the claimant, so that replies show which attempt made a claim."""
    ttl_ms: int = 0
    """The requested ttl of the claim, the extension or the completed transaction."""
    fingerprint: str = ""
    wait_ms: int = 0
    batch: int = 0
    """The number of entries of the batch; 0 for a single claim."""
    result: str = ""
    """The result a completion sends."""
    may_shorten: bool = False
    replayed: bool = False
    holder: str = ""
    held_result: str | None = None
    code: str = ""
    reason: str = ""
    applied: str = ""
    """The `applied` of an error, "unknown" if it has none; empty for a reply."""

    @property
    def answer(self) -> Answer | None:
        """The answer, or None for an error."""
        if self.outcome == "ERROR":
            return None
        return Answer(self.outcome, self.replayed, self.holder, self.held_result)

    @property
    def latest_ns(self) -> float:
        """The latest time at which the attempt took effect; without limit if its effect is unknown."""
        return math.inf if self.applied == "unknown" else self.end_ns

    def __str__(self) -> str:
        return self.since(0)

    def since(self, origin_ns: int) -> str:
        """Return the call in one line, with times in seconds since `origin_ns`."""
        span = f"{(self.begin_ns - origin_ns) / 1e9:9.4f} to {(self.end_ns - origin_ns) / 1e9:9.4f} s"
        asked = {
            "token": "" if self.rpc == "claim" else self.token,
            "ttl_ms": self.ttl_ms,
            "fingerprint": self.fingerprint,
            "wait_ms": self.wait_ms,
            "batch": self.batch,
            "result": self.result,
            "may_shorten": self.may_shorten,
        }
        request = " ".join((f"{self.rpc} {self.name}", *(f"{key}={value}" for key, value in asked.items() if value)))
        shown = f", held by {self.holder}" if self.holder else ""
        if self.held_result is not None:
            shown += f" and completed with {self.held_result!r}"
        answer = self.outcome if not self.code else f"{self.code} {self.reason} applied={self.applied}"
        return f"{span}  {request}: {answer}{' replayed' if self.replayed else ''}{shown}"


def to_line(call: Call) -> str:
    """Return a call as one line of JSON."""
    return json.dumps(asdict(call)) + "\n"


def read(paths: Iterable[Path]) -> Iterator[Call]:
    """Yield the calls of history files."""
    for path in paths:
        with path.open() as lines:
            for line in lines:
                yield Call(**json.loads(line))

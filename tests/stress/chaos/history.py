"""The record of an attempt, and the files that keep it."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt as its client saw it. Times are CLOCK_MONOTONIC, which all processes of a host share."""

    client: str
    rpc: str
    """claim, complete or release."""
    transaction_id: str
    token: str
    """Shared by the attempts of one logical call. Also sent as the claimant, so that duplicates show it."""
    begin_ns: int
    end_ns: int
    outcome: str
    """The outcome without its prefix, or ERROR."""
    ttl_ms: int = 0
    """The requested ttl of the claim, or of the completed transaction."""
    replayed: bool = False
    holder: str = ""
    """The claimant in the reply, which is the token of the holder."""
    completed: bool = False
    """Whether the transaction in the reply is completed."""
    code: str = ""
    reason: str = ""
    applied: str = ""
    """The `applied` of an error, "unknown" if it has none; empty for a reply."""

    @property
    def may_have_changed(self) -> bool:
        """Whether this attempt itself took effect, or may have."""
        if self.outcome == "CLAIMED":
            return not self.replayed
        return self.outcome in {"COMPLETED", "RELEASED"} or self.applied == "unknown"

    @property
    def latest_ns(self) -> float:
        """The latest time at which the attempt took effect; without limit if its effect is unknown."""
        return math.inf if self.applied == "unknown" else self.end_ns

    def __str__(self) -> str:
        answer = self.outcome if not self.code else f"{self.code} {self.reason} applied={self.applied}"
        shown = f", held by {self.holder}{' and completed' if self.completed else ''}" if self.holder else ""
        replayed = " replayed" if self.replayed else ""
        span = f"{self.begin_ns / 1e9:.4f} to {self.end_ns / 1e9:.4f} s"
        return f"{self.rpc} {self.transaction_id} by {self.token}: {answer}{replayed}{shown} ({span})"


def to_line(call: Call) -> str:
    """Return a call as one line of JSON."""
    return json.dumps(asdict(call)) + "\n"


def read(paths: Iterable[Path]) -> Iterator[Call]:
    """Yield the calls of history files."""
    for path in paths:
        with path.open() as lines:
            for line in lines:
                yield Call(**json.loads(line))

"""What clients record of every attempt, and the files that it is kept in."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt as its client saw it. Times are of CLOCK_MONOTONIC, which all processes of a host share."""

    client: str
    rpc: str
    """claim, complete or release."""
    transaction_id: str
    token: str
    """Names the logical call, whose attempts share it; it is also sent as the claimant, so that duplicates show it."""
    begin_ns: int
    end_ns: int
    outcome: str
    """The outcome of the reply without its prefix, or ERROR."""
    ttl_ms: int = 0
    """How long the claim lives, or a completed transaction is remembered; by the request."""
    replayed: bool = False
    holder: str = ""
    """The claimant that the reply shows, and so the token of whoever holds the transaction."""
    completed: bool = False
    """Whether the reply shows the transaction as completed."""
    code: str = ""
    reason: str = ""
    applied: str = ""
    """What an error says, "unknown" where it says nothing; empty for a reply."""

    @property
    def may_have_changed(self) -> bool:
        """Whether this very attempt did, or may have done, what it asked for."""
        if self.outcome == "CLAIMED":
            return not self.replayed
        return self.outcome in {"COMPLETED", "RELEASED"} or self.applied == "unknown"

    @property
    def latest_ns(self) -> float:
        """When the attempt took effect at the latest: a command whose caller has left may still be on its way."""
        return math.inf if self.applied == "unknown" else self.end_ns

    def __str__(self) -> str:
        said = self.outcome if not self.code else f"{self.code} {self.reason} applied={self.applied}"
        shown = f", held by {self.holder}{' and completed' if self.completed else ''}" if self.holder else ""
        replayed = " replayed" if self.replayed else ""
        span = f"{self.begin_ns / 1e9:.4f} to {self.end_ns / 1e9:.4f} s"
        return f"{self.rpc} {self.transaction_id} by {self.token}: {said}{replayed}{shown} ({span})"


def to_line(call: Call) -> str:
    """Return a call as one line of JSON."""
    return json.dumps(asdict(call)) + "\n"


def read(paths: Iterable[Path]) -> Iterator[Call]:
    """Yield the calls of history files."""
    for path in paths:
        with path.open() as lines:
            for line in lines:
                yield Call(**json.loads(line))

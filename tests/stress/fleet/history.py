"""The record of a run: attempts, disturbances and the rows of the database, and the file that keeps them."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

ANSWERED, REFUSED, CUT, BROKEN = "answered", "refused", "cut", "broken"
REPLAYED = "idempotency-replayed"

SHORT, FAILING, LONG = "short work", "work that fails after its effect", "work of 2.5 leases"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request that the route forwarded to a service."""

    key: str
    service: str
    begin_ns: int
    end_ns: int
    ending: str
    """`answered`; `refused`: nothing was sent; `cut`: the route closed the connection before the answer; `broken`: the
    service did."""
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    """Sorted, with names in lower case."""
    body: str = ""
    """As Latin-1, which loses no byte."""
    lost: bool = False
    """The caller did not receive the answer."""
    audit: bool = False
    """Sent after the faults."""

    @property
    def succeeded(self) -> bool:
        """Whether the work was done, by this answer."""
        return self.ending == ANSWERED and 200 <= self.status < 300

    @property
    def replayed(self) -> bool:
        """Whether a guard answered instead of the handler."""
        return dict(self.headers).get(REPLAYED) == "true"

    def since(self, origin_ns: int) -> str:
        """Return a line about this attempt, with times since `origin_ns`."""
        times = f"{(self.begin_ns - origin_ns) / 1e9:7.3f} … {(self.end_ns - origin_ns) / 1e9:7.3f}"
        said = f"{self.status}{' replayed' if self.replayed else ''}" if self.ending == ANSWERED else self.ending
        marks = f"{', lost on the way' if self.lost else ''}{', audit' if self.audit else ''}"
        return f"{times}  {self.service:8} {said}{marks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """A fault, and how long it can explain what happened."""

    kind: str
    subject: str
    """The service; `claims` or `database` for the paths behind all services; `machine` for a stall."""
    begin_ns: int
    end_ns: int

    def meets(self, attempt: Attempt) -> bool:
        """Return whether the fault and the attempt overlap."""
        return self.begin_ns <= attempt.end_ns and attempt.begin_ns <= self.end_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The effect of one run of a handler."""

    row_id: int
    key: str
    paid_by: str


@dataclass(slots=True)
class History:
    """Everything that the checker sees."""

    services: tuple[str, ...]
    attempts: list[Attempt] = field(default_factory=list)
    disturbances: list[Disturbance] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    """What the work of each key is like."""

    discarded: list[str] = field(default_factory=list)
    """Keys of long work during which the machine stalled, so that they prove nothing."""

    def discard(self, keys: Collection[str]) -> None:
        """Forget these keys."""
        self.discarded += keys
        self.attempts = [one for one in self.attempts if one.key not in keys]
        for key in keys:
            del self.keys[key]

    def write(self, path: Path) -> None:
        """Write the history as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

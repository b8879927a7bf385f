"""The port to the stores, and the findings of their examination. Every store passes the same contract suite."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from dedup_service.claims.errors import StoreUnavailable
from dedup_service.claims.transaction import Completion, Expiry, Extension, Release, Transaction


class Severity(IntEnum):
    """Weight of a finding. WARNING: claims may be lost in an incident. CRITICAL: they will be lost, or are refused."""

    OK = 0
    INFO = 1
    WARNING = 2
    CRITICAL = 3

    @property
    def word(self) -> str:
        """The stable word for machines."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: a stable `check` name, a `message`, and a `remedy` where there is something to do.

    Neither text contains a secret.
    """

    check: str
    severity: Severity
    message: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the fields of the log line and of the JSON output."""
        return {"check": self.check, "severity": self.severity.word, "message": self.message, "remedy": self.remedy}


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the highest severity; OK without findings."""
    return max((finding.severity for finding in findings), default=Severity.OK)


@dataclass(frozen=True, slots=True)
class StoreNotice:
    """An event of the store that an operator should know of.

    `event` is a log event, `message` a sentence without secrets. `forgot`: claims were certainly lost. `restarted`:
    another server process answers, which may have lost some.
    """

    event: str
    message: str
    forgot: bool = False
    restarted: bool = False


class CheckFailed(StoreUnavailable):
    """A failed check, with the notices since the check before."""

    def __init__(self, failure: StoreUnavailable, notices: Sequence[StoreNotice]) -> None:
        super().__init__(failure.reason, str(failure), failure.applied)
        self.notices = notices


class ConnectionObserver(Protocol):
    """Notified of the connections a store makes. Its methods return at once and raise nothing."""

    def connected(self, *, again: bool) -> None:
        """Called on connect; `again` is true for a reconnect."""

    def disconnected(self) -> None:
        """Called when a connection has ended."""


class ClaimStore(Protocol):
    """Keeps claims. Every method may raise StoreUnavailable, and none repeats a command by itself.

    A cancelled call leaves the store intact: its command may or may not have been carried out, and no later call
    receives its answer.
    """

    @property
    def description(self) -> str:
        """The place of the claims, for people, without user name and password."""

    async def open(self) -> None:
        """Start. An unreachable store is not an error: the store keeps trying until `close`.

        Raises StoreRefused when the store answered and cannot work as it is configured.
        """

    async def close(self) -> None:
        """Stop; commands in flight finish or fail. May be called twice."""

    async def check(self) -> Sequence[StoreNotice]:
        """Write as a claim does, and return what happened since the last check.

        Raises StoreUnavailable (CheckFailed if there are notices) while claims would fail, and StoreRefused as `open`
        does.
        """

    async def claim(self, claim: Transaction, expiry: Expiry) -> Transaction | None:
        """Store `claim` unless its transaction is held, in one atomic step. Return the holder, or None if stored.

        Raises UnreadableValue, and InvalidRequest when the claim would be stored and its expiry is in the past by the
        clock of the store. A store may also raise InvalidRequest for such a claim of a held transaction.
        """

    async def claim_all(self, claims: Sequence[tuple[Transaction, Expiry]]) -> Sequence[Transaction | Exception | None]:
        """Make many claims in order, each independent of the others.

        Returns for each what `claim` would have returned, or the exception it would have raised.
        """

    async def complete(self, completion: Completion) -> Transaction | None:
        """Apply `completion.of` to the live holder in one atomic step and return its result; None without a holder."""

    async def release(self, release: Release) -> bool:
        """Delete the live holder if `release.releases` it, in one atomic step, and return whether it did."""

    async def extend(self, extension: Extension) -> Transaction | None:
        """Apply `extension.of` to the live holder in one atomic step and return its result; None without a holder.

        The clock of the store decides whether the claim would become shorter.
        """

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Return the holder of a transaction, or None. Raises UnreadableValue."""

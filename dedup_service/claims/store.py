"""The one small port through which claims are kept; every store passes the same contract suite."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dedup_service.claims.transaction import Transaction
from dedup_service.claims.transitions import Completion, Extension, Release


@dataclass(frozen=True, slots=True)
class StoreNotice:
    """Something that happened to the store between two checks and that somebody should know.

    `event` is a stable word for machines, `message` a sentence for people without any secret; `forgot` when claims were
    certainly lost, `restarted` when another process answers than before, which may have lost some.
    """

    event: str
    message: str
    forgot: bool = False
    restarted: bool = False


class StoreObserver(Protocol):
    """Is told what becomes of a store's connections. Its methods return at once and raise nothing."""

    def connected(self, *, again: bool) -> None:
        """Hear of a new connection, made `again` where an earlier one was lost."""

    def disconnected(self) -> None:
        """Hear that a connection has ended."""


class ClaimStore(Protocol):
    """Keeps claims. Every method may raise StoreUnavailable, and none repeats a command by itself.

    A cancelled call leaves the store in order: its command may or may not have been carried out, and no later call
    sees its answer.
    """

    @property
    def description(self) -> str:
        """Where the claims are, for people: without user name and password."""

    async def open(self) -> None:
        """Begin to serve. An unreachable store is not an error here: it is tried again until `close`.

        Raises StoreRefused when the store answered and can never work as it is configured.
        """

    async def close(self) -> None:
        """End; commands still under way are finished or fail. May be called twice."""

    async def check(self) -> Sequence[StoreNotice]:
        """Return when the store answers, with what was noticed since the last check.

        Raises StoreUnavailable when it does not, and StoreRefused as `open` does.
        """

    async def claim(self, claim: Transaction, ttl_ms: int | None) -> Transaction | None:
        """Store `claim` unless its transaction is held, in one atomic step, and return the holder or None.

        The stored claim expires `ttl_ms` from now by the clock of the store, or at `claim.expire_time_ms` when `ttl_ms`
        is None. Raises InvalidRequest when that moment is in the past by the clock of the store, and UnreadableValue.
        """

    async def claim_all(
        self, claims: Sequence[tuple[Transaction, int | None]]
    ) -> Sequence[Transaction | Exception | None]:
        """Carry out many claims in their order, each as `claim` would and each alone.

        Returns for each what `claim` would have returned, or the exception that it would have raised.
        """

    async def complete(self, completion: Completion) -> Transaction | None:
        """Carry out `completion.of` the live holder in one atomic step, and return what it returned; None without one.

        Raises as `claim` does.
        """

    async def release(self, release: Release) -> bool:
        """Forget the live holder if `release.releases` it, in one atomic step, and say whether. Raises as `claim`."""

    async def extend(self, extension: Extension) -> Transaction | None:
        """Carry out `extension.of` the live holder in one atomic step, and return what it returned; None without one.

        Whether it would shorten the claim is judged by the clock of the store. Raises as `claim` does.
        """

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Return the holder of a transaction, or None. Raises UnreadableValue."""

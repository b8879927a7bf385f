"""A store in a dict, for unit tests without a database."""

from collections.abc import Awaitable, Callable, Sequence

from dedup_service.claims import (
    Completion,
    Expiry,
    Extension,
    Release,
    StoreNotice,
    Transaction,
)


class DictStore:
    """Keeps claims for ever.

    `faults` are raised for the claims of a transaction id, and `failure` for each claim and each `get`. `before_answer`
    runs before each claim is decided. `expiries` are those of the claims so far.
    """

    description = "a dict"

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], Transaction] = {}
        self.expiries: list[Expiry] = []
        self.faults: dict[str, Exception] = {}
        self.failure: Exception | None = None
        self.before_answer: Callable[[], Awaitable[None]] | None = None

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def check(self) -> Sequence[StoreNotice]:
        """Report nothing."""
        return ()

    async def claim(self, claim: Transaction, expiry: Expiry) -> Transaction | None:
        """Store a claim, or return the holder."""
        if self.before_answer is not None:
            await self.before_answer()
        self.expiries.append(expiry)
        if fault := self.failure or self.faults.get(claim.transaction_id):
            raise fault
        identity = (claim.namespace, claim.transaction_id)
        if (holder := self.held.get(identity)) is not None:
            return holder
        self.held[identity] = claim
        return None

    async def claim_all(self, claims: Sequence[tuple[Transaction, Expiry]]) -> Sequence[Transaction | Exception | None]:
        """Make each claim, in order."""
        answers: list[Transaction | Exception | None] = []
        for claim, expiry in claims:
            try:
                answers.append(await self.claim(claim, expiry))
            except Exception as error:  # noqa: BLE001 - as the port says
                answers.append(error)
        return answers

    async def complete(self, completion: Completion) -> Transaction | None:
        """Complete a held transaction."""
        return self._replace(completion.namespace, completion.transaction_id, completion.of)

    async def release(self, release: Release) -> bool:
        """Release a held transaction."""
        identity = (release.namespace, release.transaction_id)
        if (holder := self.held.get(identity)) is None or not release.releases(holder):
            return False
        del self.held[identity]
        return True

    async def extend(self, extension: Extension) -> Transaction | None:
        """Extend a held transaction."""
        return self._replace(extension.namespace, extension.transaction_id, extension.of)

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Return a held transaction."""
        if self.failure is not None:
            raise self.failure
        return self.held.get((namespace, transaction_id))

    def _replace(
        self, namespace: str, transaction_id: str, change: Callable[[Transaction], Transaction | None]
    ) -> Transaction | None:
        holder = self.held.get((namespace, transaction_id))
        changed = None if holder is None else change(holder)
        if changed is not None:
            self.held[namespace, transaction_id] = changed
        return changed

"""The embedded store: claims in one SQLite file, for trials, tests and single hosts."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from dedup_service.claims import (
    Applied,
    ClaimError,
    Completion,
    Expiry,
    Extension,
    FieldViolation,
    InvalidRequest,
    Reason,
    Release,
    StoreNotice,
    StoreRefused,
    StoreUnavailable,
    Transaction,
    system_clock_ms,
)
from dedup_service.stores.sqlite.file import ClaimFile
from dedup_service.stores.sqlite.thread import FORGET, BatchThread, Row, Step
from dedup_service.stores.stored_value import KeyLayout, decode, encode

# The largest SQLite integer.
_MAX_TIME_MS = 2**63 - 1


class SqliteStore:
    """Keeps claims in one SQLite file that several processes of a host may share.

    An acknowledged claim is on the disk. Every call ends within about `timeout_ms` milliseconds with its answer or
    StoreUnavailable; calls beyond `queue_limit` waiting ones are refused at once. Later claims delete expired ones, as
    does an idle store every `idle_ms` milliseconds.
    """

    def __init__(
        self,
        path: Path,
        key_layout: KeyLayout,
        *,
        clock_ms: Callable[[], int] = system_clock_ms,
        timeout_ms: int = 1_000,
        queue_limit: int = 10_000,
        idle_ms: int = 1_000,
    ) -> None:
        self._path = path.absolute()
        self._key_layout = key_layout
        self._clock_ms = clock_ms
        self._timeout_s = timeout_ms / 1_000
        self._queue_limit = queue_limit
        self._idle_s = idle_ms / 1_000
        self._thread: BatchThread | None = None

    @property
    def description(self) -> str:
        """Implement ClaimStore."""
        return f"sqlite file {self._path} (only this host sees its claims)"

    async def open(self) -> None:
        """Create the file if needed, and begin to serve. Calls retry a file that cannot be used yet.

        Raises StoreRefused for a file that can never be used: no permission, not a database, damaged, or of another
        application or a newer version. Such a file is left unchanged.
        """
        if self._thread is None:
            file = ClaimFile(self._path, self._clock_ms)
            self._thread = BatchThread(file, file.name, self._timeout_s, self._queue_limit, self._idle_s)
            self._thread.start()
        try:
            await self.check()
        except StoreUnavailable:
            pass
        except StoreRefused:
            await self.close()
            raise

    async def close(self) -> None:
        """Answer queued calls within the timeout, and close the file; may be called twice."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.close()

    async def check(self) -> Sequence[StoreNotice]:
        """Implement ClaimStore. Writes and syncs the file; returns no notices."""
        try:
            await self._running().submit()
        except ClaimError:
            raise
        except Exception as error:
            message = f"checking the sqlite file {self._path} failed unexpectedly ({type(error).__name__})"
            raise StoreUnavailable(
                Reason.STORE_ERROR, f"{message}: this is a bug, please report it", Applied.NO
            ) from error
        return ()

    async def claim(self, claim: Transaction, expiry: Expiry) -> Transaction | None:
        """Implement ClaimStore. Raises InvalidRequest for an expiry beyond 64 bits, too."""
        value = encode(claim)

        def step(held: bytes | None, now_ms: int) -> tuple[bytes | None, Row | None]:
            return (held, None) if held is not None else (None, (value, _end(expiry, now_ms)))

        holder = await self._ask(claim.namespace, claim.transaction_id, step)
        return None if holder is None else decode(holder, claim.namespace, claim.transaction_id)

    async def claim_all(self, claims: Sequence[tuple[Transaction, Expiry]]) -> Sequence[Transaction | Exception | None]:
        """Implement ClaimStore. The claims share transactions."""

        async def one(claim: Transaction, expiry: Expiry) -> Transaction | Exception | None:
            try:
                return await self.claim(claim, expiry)
            except Exception as error:  # noqa: BLE001 - a fault of one claim must not fail the others
                return error

        return await asyncio.gather(*(one(*asked) for asked in claims))

    async def complete(self, completion: Completion) -> Transaction | None:
        """Implement ClaimStore."""
        return await self._change(completion)

    async def extend(self, extension: Extension) -> Transaction | None:
        """Implement ClaimStore."""
        return await self._change(extension)

    async def release(self, release: Release) -> bool:
        """Implement ClaimStore."""

        def step(held: bytes | None, _: int) -> tuple[bytes | None, Row | None]:
            if held is None or not release.releases(decode(held, release.namespace, release.transaction_id)):
                return None, None
            return held, FORGET

        return await self._ask(release.namespace, release.transaction_id, step) is not None

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Implement ClaimStore."""
        held = await self._ask(namespace, transaction_id, _look, may_change=False)
        return None if held is None else decode(held, namespace, transaction_id)

    async def _change(self, change: Completion | Extension) -> Transaction | None:
        def step(held: bytes | None, now_ms: int) -> tuple[bytes | None, Row | None]:
            if held is None:
                return None, None
            holder = decode(held, change.namespace, change.transaction_id)
            changed = change.of(holder)
            if changed is None or changed is holder:
                return (None if changed is None else held), None
            value = encode(changed, over=held)
            return value, (value, _end(change.expiry, now_ms))

        value = await self._ask(change.namespace, change.transaction_id, step)
        return None if value is None else decode(value, change.namespace, change.transaction_id)

    async def _ask(self, namespace: str, transaction_id: str, step: Step, *, may_change: bool = True) -> bytes | None:
        key = self._key_layout(namespace, transaction_id)
        try:
            return await self._running().submit(key, step, may_change=may_change)
        except StoreRefused as refusal:
            raise StoreUnavailable(Reason.STORE_REFUSED, str(refusal), Applied.NO) from refusal

    def _running(self) -> BatchThread:
        if self._thread is None:
            raise StoreUnavailable(Reason.STORE_CLOSED, f"the sqlite file {self._path} is not open", Applied.NO)
        return self._thread


def _look(held: bytes | None, _: int) -> tuple[bytes | None, Row | None]:
    return held, None


def _end(expiry: Expiry, now_ms: int) -> int:
    expire_time_ms = expiry.time_ms if expiry.ttl_ms is None else now_ms + expiry.ttl_ms
    if not now_ms < expire_time_ms <= _MAX_TIME_MS:
        raise InvalidRequest(FieldViolation("expire_time", "is not in the future: send a later time, or a ttl"))
    return expire_time_ms

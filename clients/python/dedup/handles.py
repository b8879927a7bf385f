"""What a claim leaves in the caller's hand, before it is known whether the caller blocks or awaits."""

import logging
from datetime import datetime
from typing import Literal

from dedup.calls import Calls, Grant
from dedup.errors import DedupError, NotHeld
from dedup.ids import logged_id
from dedup.requests import Span
from dedup.steps import Steps
from dedup.transactions import Transaction

OnError = Literal["release", "keep"]
"""What becomes of a claim whose work raised: it is given back, or kept until it expires."""

_LOG = logging.getLogger("dedup")


class Handle:
    """A claim that was granted, as the caller sees it.

    `result` is what leaving the block completes with, and `retention` how long it is then remembered (the default of
    the namespace when None). `on_error` may be changed at any time: set it to "keep" once the work may have had its
    effect. `fail_open` is True when there is no claim, because the service was away and the client allows work then;
    `shadow_duplicate` when there is none because the namespace only watches. Without a claim, completing, releasing
    and extending do nothing.
    """

    def __init__(self, calls: Calls, grant: Grant, on_error: OnError) -> None:
        self._calls = calls
        self._grant = grant
        self._ended = not grant.holds
        self.on_error = on_error
        self.result = b""
        self.retention: Span | None = None

    @property
    def transaction_id(self) -> str:
        """The id that was claimed."""
        return self._grant.transaction_id

    @property
    def namespace(self) -> str:
        """The namespace that it was claimed in; empty for the default one."""
        return self._grant.namespace

    @property
    def claim_token(self) -> str:
        """The secret that authorises completing, releasing and extending."""
        return self._grant.claim_token

    @property
    def replayed(self) -> bool:
        """Whether an earlier attempt or call with the same token had made the claim."""
        return self._grant.replayed

    @property
    def shadow_duplicate(self) -> bool:
        """Whether this would have been a duplicate, were the namespace not in shadow mode."""
        return self._grant.shadow_duplicate

    @property
    def fail_open(self) -> bool:
        """Whether the work goes ahead unguarded, since the service could not be asked."""
        return self._grant.fail_open

    @property
    def transaction(self) -> Transaction | None:
        """The transaction as it was claimed; None when `fail_open`."""
        return self._grant.transaction

    def _complete(
        self, result: bytes | None, ttl: Span | None, expire_time: datetime | None, timeout: float | None
    ) -> Steps[Transaction | None]:
        if not self._grant.holds:
            return None
        # Whatever comes of it, leaving the block must not release work that its caller calls done.
        self._ended = True
        return (
            yield from self._calls.complete(
                self._grant,
                self.result if result is None else result,
                ttl=self.retention if ttl is None and expire_time is None else ttl,
                expire_time=expire_time,
                budget_s=timeout,
            )
        )

    def _release(self, timeout: float | None) -> Steps[None]:
        if self._grant.holds:
            self._ended = True
            yield from self._calls.release(self._grant, budget_s=timeout)

    def _extend(
        self, ttl: Span | None, expire_time: datetime | None, timeout: float | None, *, allow_shortening: bool
    ) -> Steps[Transaction | None]:
        if not self._grant.holds:
            return None
        return (
            yield from self._calls.extend(
                self._grant, ttl=ttl, expire_time=expire_time, allow_shortening=allow_shortening, budget_s=timeout
            )
        )

    def _leave(self, error: BaseException | None) -> Steps[None]:
        """End the claim as its block ended: completed, released, or left alone.

        Cancellation, KeyboardInterrupt and the like stop work at any point, so they keep the claim until it expires.
        A release that fails is logged: the caller should see what went wrong with the work, and the claim expires.
        """
        if self._ended:
            return
        if error is None:
            yield from self._complete(None, None, None, None)
        elif isinstance(error, Exception) and self.on_error == "release":
            try:
                yield from self._release(None)
            except DedupError as failure:
                log_failed_ending(self, failure)


def log_failed_ending(claim: Handle, error: DedupError) -> None:
    """Log that completing or releasing a claim failed, without its id."""
    cause = "the claim is no longer held" if isinstance(error, NotHeld) else error
    _LOG.warning("could not end the claim of transaction %s: %s", logged_id(claim.transaction_id), cause)

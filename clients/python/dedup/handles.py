"""What the blocking and the asynchronous `Claim` have in common."""

import logging
from datetime import datetime
from typing import Literal

from dedup.calls import Calls, Grant, Span
from dedup.errors import DedupError, NotHeld
from dedup.ids import logged_id
from dedup.retries import Steps
from dedup.transactions import Transaction

OnError = Literal["release", "keep"]
"""Whether the claim of failed work is released, or kept until it expires."""

_LOG = logging.getLogger("dedup")


class Handle:
    """A granted claim.

    Leaving the block completes the claim with `result`, and the service remembers it for `retention` (None: the
    namespace's default). Set `on_error` to "keep" once the work may have taken effect.

    `fail_open`: the service was unavailable and the client allows work then. `shadow_duplicate`: another caller holds
    the transaction in a namespace in shadow mode. In both cases there is no claim, and completing, releasing and
    extending do nothing.
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
        """The claimed id."""
        return self._grant.transaction_id

    @property
    def namespace(self) -> str:
        """The claim's namespace; empty for the default."""
        return self._grant.namespace

    @property
    def claim_token(self) -> str:
        """The secret that authorises changes to the claim."""
        return self._grant.claim_token

    @property
    def replayed(self) -> bool:
        """Whether an earlier attempt or call with this token made the claim."""
        return self._grant.replayed

    @property
    def shadow_duplicate(self) -> bool:
        """Whether only shadow mode let this duplicate through."""
        return self._grant.shadow_duplicate

    @property
    def fail_open(self) -> bool:
        """Whether the work runs unguarded because the service was unavailable."""
        return self._grant.fail_open

    @property
    def transaction(self) -> Transaction | None:
        """The transaction at the time of the claim; None if `fail_open`."""
        return self._grant.transaction

    def _complete(
        self, result: bytes | None, ttl: Span | None, expire_time: datetime | None, timeout: float | None
    ) -> Steps[Transaction | None]:
        if not self._grant.holds:
            return None
        # Set first: even after a failed call, leaving the block must not release finished work.
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
        """Complete, release or keep the claim at the end of its block.

        Cancellation, KeyboardInterrupt and the like can stop the work anywhere, so they keep the claim until it
        expires. A failed release is only logged: the caller must see the work's error, and the claim expires.
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
    """Log a failed completion or release, without the transaction id."""
    cause = "the claim is no longer held" if isinstance(error, NotHeld) else error
    _LOG.warning("could not end the claim of transaction %s: %s", logged_id(claim.transaction_id), cause)

"""The shared part of the blocking and the asynchronous `Claim`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.message import Message

from dedup.calls import Calls, Grant, Span, extension, extension_outcome, result_fault, seconds
from dedup.channels import MetadataEntry, current_metadata
from dedup.errors import CallFailed, DedupError, NotHeld
from dedup.ids import logged_id
from dedup.keep_alive import DEFAULT_MAX_HOLD_S, Extension, KeepAlive, KeptClaim, Lease
from dedup.retries import Send, Steps
from dedup.transactions import Transaction

ReleaseOn = tuple[type[Exception], ...]
"""The exceptions which say that nothing was done."""

Start = Callable[[Send, tuple[MetadataEntry, ...], Callable[[Message | CallFailed], None]], None]
"""Starts one attempt without blocking, and later calls back with its answer."""

_LOG = logging.getLogger("dedup")


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """The options of a claim that concern its work."""

    release_on: ReleaseOn
    keep_alive: bool
    max_hold: Span | None
    on_lost: Callable[[Any], None] | None
    cancel_on_lost: bool = False

    def __post_init__(self) -> None:
        for kind in self.release_on:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise TypeError(f"release_on has {kind!r}; it must have subclasses of Exception")
        if self.max_hold is not None and not seconds(self.max_hold) > 0:
            raise ValueError(f"max_hold is {self.max_hold}; it must be more than 0 seconds")


class Handle:
    """A granted claim.

    Leaving the block completes the claim with `result`, and the service remembers it for `retention` (None: the
    namespace's default). An exception keeps the claim until it expires, unless it is listed in `release_on`.

    `fail_open`: the service was unavailable and the client allows work then. `shadow_duplicate`: another caller holds
    the transaction in a namespace in shadow mode. In both cases there is no claim, and completing, releasing and
    extending do nothing.
    """

    def __init__(self, calls: Calls, grant: Grant, options: BlockOptions) -> None:
        self._calls = calls
        self._grant = grant
        self._options = options
        self._ended = not grant.holds
        self._result = b""
        self._result_rejected = False
        self._keep_alive: KeepAlive | None = None
        self._kept: KeptClaim | None = None
        self.release_on = options.release_on
        self.retention: Span | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of transaction {logged_id(self.transaction_id)}>"

    @property
    def result(self) -> bytes:
        """The result later duplicates receive. Setting it says that the work is done.

        Raises TypeError for anything but bytes, and ValueError for more than any service keeps. Leaving the block then
        completes the transaction without a result.
        """
        return self._result

    @result.setter
    def result(self, value: bytes) -> None:
        fault = result_fault(value)
        self._result_rejected = fault is not None
        if fault is not None:
            self._result = b""
            raise fault
        self._result = value

    @property
    def lost(self) -> bool:
        """Whether keep-alive lost the claim: another caller may repeat the work. `complete` may still succeed."""
        return self._kept is not None and self._kept.lease.lost

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

    def keep(self) -> None:
        """Leave the claim until it expires: nobody extends it, and leaving the block does nothing."""
        self._end()

    def _complete(
        self, result: bytes | None, ttl: Span | None, expire_time: datetime | None, timeout: float | None
    ) -> Steps[Transaction | None]:
        if not self._grant.holds:
            return None
        # First: even after a failed call, leaving the block must not release finished work.
        self._end()
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
            self._end()
            yield from self._calls.release(self._grant, budget_s=timeout)

    def _extend(
        self, ttl: Span | None, expire_time: datetime | None, timeout: float | None, *, allow_shortening: bool
    ) -> Steps[Transaction | None]:
        if not self._grant.holds:
            return None
        if allow_shortening:
            # Keep-alive does not know the new lease.
            self._end_keep_alive()
        return (
            yield from self._calls.extend(
                self._grant, ttl=ttl, expire_time=expire_time, allow_shortening=allow_shortening, budget_s=timeout
            )
        )

    def _watch(self, keep_alive: KeepAlive, start: Start) -> None:
        """Keep the claim alive, if its options say so."""
        grant, options = self._grant, self._options
        if not (options.keep_alive and grant.holds and grant.lease_s is not None):
            return
        metadata = current_metadata()

        def extend(ttl_s: float, timeout_s: float, done: Callable[[Extension], None]) -> None:
            start(extension(grant, ttl_s, timeout_s), metadata, lambda answer: done(extension_outcome(answer)))

        max_hold_s = DEFAULT_MAX_HOLD_S if options.max_hold is None else seconds(options.max_hold)
        lease = Lease(
            grant.lease_s,
            sent_s=grant.sent_s,
            now_s=keep_alive.clock(),
            replayed=grant.replayed,
            max_hold_s=max_hold_s,
        )
        self._keep_alive, self._kept = keep_alive, KeptClaim(lease, extend, self._tell_loss)
        keep_alive.watch(self._kept)

    def _tell_loss(self) -> None:
        _LOG.warning("the claim of transaction %s was lost while its work ran", logged_id(self.transaction_id))
        if self._options.on_lost is not None:
            try:
                self._options.on_lost(self)
            except Exception:  # noqa: BLE001 - The claims of others must not suffer.
                _LOG.exception("on_lost failed for transaction %s", logged_id(self.transaction_id))

    def _end_keep_alive(self) -> None:
        if self._keep_alive is not None and self._kept is not None:
            self._keep_alive.end(self._kept)

    def _end(self) -> None:
        self._ended = True
        self._end_keep_alive()

    def _leave(self, error: BaseException | None, *, ended: bool) -> Steps[None]:
        """Complete, release or keep the claim at the end of its block.

        The work may have `ended` the claim itself. A failed release is only logged: the caller must see the work's
        error, and the claim expires.
        """
        self._end_keep_alive()
        if ended:
            return
        if error is None:
            yield from self._complete(None, None, None, None)
            return
        try:
            if self._result_rejected:
                # The work is done, and `error` says that its result cannot be stored.
                yield from self._complete(b"", None, None, None)
            elif self._releases(error):
                yield from self._release(None)
        except DedupError as failure:
            log_failed_ending(self, failure)

    def _releases(self, error: BaseException) -> bool:
        """Return whether `error` is listed. A timeout is listed only by itself, not as an OSError or Exception."""
        kinds = self.release_on
        if isinstance(error, TimeoutError):
            kinds = tuple(kind for kind in kinds if issubclass(kind, TimeoutError))
        return isinstance(error, Exception) and isinstance(error, kinds)


def log_failed_ending(claim: Handle, error: DedupError) -> None:
    """Log a failed completion or release, without the transaction id."""
    cause = "the claim is no longer held" if isinstance(error, NotHeld) else error
    _LOG.warning("could not end the claim of transaction %s: %s", logged_id(claim.transaction_id), cause)

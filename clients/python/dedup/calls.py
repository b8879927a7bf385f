"""The calls of the service: builds requests and interprets replies. Knows no threads or event loops."""

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.errors import (
    CallFailed,
    ClientClosed,
    DuplicateTransaction,
    InvalidRequest,
    NotHeld,
    PayloadMismatch,
    Unavailable,
    is_unsent,
)
from dedup.ids import logged_id, new_claim_token
from dedup.keep_alive import Extension
from dedup.retries import Retrier, RetryPolicy, Send, Steps
from dedup.transactions import Transaction
from dedup.v1 import dedup_pb2

Span = timedelta | float
"""A timedelta, or seconds."""

OnUnavailable = Literal["deny", "allow"]
"""While the service is unavailable, a claim raises Unavailable, or the work runs unguarded."""

MAX_RESULT_BYTES = 1_048_576
"""The largest result that any service keeps. The usual limit is 4,096 bytes, which only the service knows."""

_COMPLETED_WITHOUT = "the transaction is completed without it"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_LOG = logging.getLogger("dedup")


@dataclass(frozen=True, slots=True)
class Grant:
    """The permission to do the work, and the data to complete or release its claim.

    `transaction` is the caller's own; the holder's for a `shadow_duplicate`, None for `fail_open`. The lease of
    `lease_s` seconds counts from `sent_s`; it is None for a claim with an `expire_time`.
    """

    transaction_id: str
    namespace: str
    claim_token: str = field(repr=False)
    replayed: bool = False
    shadow_duplicate: bool = False
    fail_open: bool = False
    transaction: Transaction | None = None
    sent_s: float = 0.0
    lease_s: float | None = None

    @property
    def holds(self) -> bool:
        """Whether this caller has a claim to complete, release or extend."""
        return not (self.fail_open or self.shadow_duplicate)


class Calls:
    """The calls of one client, as steps for `run` or `run_async`."""

    def __init__(self, retrier: Retrier, on_unavailable: OnUnavailable) -> None:
        if on_unavailable not in ("deny", "allow"):
            raise ValueError(f'on_unavailable is {on_unavailable!r}; it must be "deny" or "allow"')
        self._retrier = retrier
        self._on_unavailable = on_unavailable

    def claim(
        self, request: dedup_pb2.ClaimTransactionRequest, *, wait: Span | None, budget_s: float | None
    ) -> Steps[Grant]:
        """Claim a transaction.

        Raises DuplicateTransaction, PayloadMismatch, InvalidRequest, Unavailable (unless the client allows work then)
        or another CallFailed, also for an unknown outcome.
        """
        wait_s = seconds(wait) if wait is not None else 0.0
        try:
            answer = yield from self._retrier.call("ClaimTransaction", request, budget_s=budget_s, wait_s=wait_s)
        except Unavailable as failure:
            if self._on_unavailable == "deny":
                raise
            _LOG.warning("transaction %s allowed without a claim: %s", logged_id(request.transaction_id), failure)
            return Grant(request.transaction_id, request.namespace, request.claim_token, fail_open=True)
        reply = cast("dedup_pb2.ClaimTransactionResponse", answer.reply)
        transaction = Transaction.of(reply.transaction)
        if reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED:
            return Grant(
                request.transaction_id,
                request.namespace,
                reply.claim_token,
                replayed=reply.replayed,
                shadow_duplicate=reply.shadow_duplicate,
                transaction=transaction,
                sent_s=answer.sent_s,
                lease_s=_lease_s(request, transaction),
            )
        if reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE:
            raise DuplicateTransaction(transaction)
        if reply.outcome == dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH:
            raise PayloadMismatch(transaction)
        raise unknown_outcome(reply.outcome)

    def complete(
        self,
        grant: Grant,
        result: bytes,
        *,
        ttl: Span | None,
        expire_time: datetime | None,
        budget_s: float | None,
    ) -> Steps[Transaction]:
        """Complete a claim. Raises NotHeld, InvalidRequest, Unavailable or another CallFailed.

        If the result or the retention is invalid, the transaction is completed without it before TypeError, ValueError
        or InvalidRequest is raised: finished work must not look unfinished.
        """
        refuse_both(ttl, expire_time)
        fault: Exception | None = result_fault(result)
        request = dedup_pb2.CompleteTransactionRequest(
            transaction_id=grant.transaction_id,
            namespace=grant.namespace,
            claim_token=grant.claim_token,
            result=b"" if fault is not None else result,
            ttl=duration(ttl),
            expire_time=timestamp(expire_time),
        )
        try:
            answer = yield from self._retrier.call("CompleteTransaction", request, budget_s=budget_s)
        except InvalidRequest as refused:
            # Without the values that the service rejected.
            if not refused.violations.keys() <= {"result", "ttl", "expire_time"}:
                raise
            for name in refused.violations:
                request.ClearField(cast("Literal['result', 'ttl', 'expire_time']", name))
            answer = yield from self._retrier.call("CompleteTransaction", request, budget_s=budget_s)
            fault = InvalidRequest(
                f"{refused.message}; {_COMPLETED_WITHOUT}", violations=refused.violations, reason=refused.reason
            )
        reply = cast("dedup_pb2.CompleteTransactionResponse", answer.reply)
        if reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED:
            if fault is not None:
                raise fault
            return Transaction.of(reply.transaction)
        if reply.outcome == dedup_pb2.COMPLETE_OUTCOME_NOT_HELD:
            raise NotHeld(grant.transaction_id)
        raise unknown_outcome(reply.outcome)

    def release(self, grant: Grant, *, budget_s: float | None) -> Steps[None]:
        """Release a claim. Raises NotHeld, Unavailable or another CallFailed.

        NOT_HELD counts as success if an earlier attempt may have released the claim.
        """
        request = dedup_pb2.ReleaseTransactionRequest(
            transaction_id=grant.transaction_id, namespace=grant.namespace, claim_token=grant.claim_token
        )
        answer = yield from self._retrier.call("ReleaseTransaction", request, budget_s=budget_s)
        reply = cast("dedup_pb2.ReleaseTransactionResponse", answer.reply)
        if reply.outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED:
            return
        if reply.outcome == dedup_pb2.RELEASE_OUTCOME_NOT_HELD:
            if answer.doubtful:
                return
            raise NotHeld(grant.transaction_id)
        raise unknown_outcome(reply.outcome)

    def extend(
        self,
        grant: Grant,
        *,
        ttl: Span | None,
        expire_time: datetime | None,
        allow_shortening: bool,
        budget_s: float | None,
    ) -> Steps[Transaction]:
        """Extend a claim. Raises NotHeld, InvalidRequest, Unavailable or another CallFailed."""
        refuse_both(ttl, expire_time)
        request = dedup_pb2.ExtendTransactionRequest(
            transaction_id=grant.transaction_id,
            namespace=grant.namespace,
            claim_token=grant.claim_token,
            ttl=duration(ttl),
            expire_time=timestamp(expire_time),
            allow_shortening=allow_shortening,
        )
        answer = yield from self._retrier.call("ExtendTransaction", request, budget_s=budget_s)
        reply = cast("dedup_pb2.ExtendTransactionResponse", answer.reply)
        if reply.outcome == dedup_pb2.EXTEND_OUTCOME_EXTENDED:
            return Transaction.of(reply.transaction)
        if reply.outcome == dedup_pb2.EXTEND_OUTCOME_NOT_HELD:
            raise NotHeld(grant.transaction_id)
        raise unknown_outcome(reply.outcome)

    def undo(self, claim: dedup_pb2.ClaimTransactionRequest) -> Steps[bool]:
        """Release a claim that may have been made. Return whether it was released.

        NOT_HELD is repeated within one budget, because the claim may still be on its way.
        """
        request = dedup_pb2.ReleaseTransactionRequest(
            transaction_id=claim.transaction_id, namespace=claim.namespace, claim_token=claim.claim_token
        )

        def release(budget_s: float) -> Steps[bool]:
            answer = yield from self._retrier.call("ReleaseTransaction", request, budget_s=budget_s)
            reply = cast("dedup_pb2.ReleaseTransactionResponse", answer.reply)
            return reply.outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED

        return self._retrier.repeat(release)

    @property
    def policy(self) -> RetryPolicy:
        """The limits of each call."""
        return self._retrier.policy

    def get(self, transaction_id: str, *, namespace: str, budget_s: float | None) -> Steps[Transaction | None]:
        """Look up a transaction. The outcome is None if nobody holds it."""
        request = dedup_pb2.GetTransactionRequest(transaction_id=transaction_id, namespace=namespace)
        try:
            answer = yield from self._retrier.call("GetTransaction", request, budget_s=budget_s)
        except CallFailed as failure:
            if failure.code is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        return Transaction.of(cast("dedup_pb2.GetTransactionResponse", answer.reply).transaction)


def claim_request(
    transaction_id: str,
    *,
    ttl: Span | None,
    expire_time: datetime | None,
    namespace: str,
    claimant: str,
    fingerprint: bytes,
    token: str | None,
) -> dedup_pb2.ClaimTransactionRequest:
    """Return the request of one logical claim, shared by its attempts.

    It always has a token: the service would generate one per attempt, and a retry would be a duplicate of the attempt
    whose answer was lost.
    """
    refuse_both(ttl, expire_time)
    return dedup_pb2.ClaimTransactionRequest(
        transaction_id=transaction_id,
        namespace=namespace,
        ttl=duration(ttl),
        expire_time=timestamp(expire_time),
        claim_token=token or new_claim_token(),
        claimant=claimant,
        payload_fingerprint=fingerprint,
    )


def extension(grant: Grant, ttl_s: float, timeout_s: float) -> Send:
    """Return one attempt to extend a claim, without repetitions."""
    request = dedup_pb2.ExtendTransactionRequest(
        transaction_id=grant.transaction_id,
        namespace=grant.namespace,
        claim_token=grant.claim_token,
        ttl=duration(ttl_s),
    )
    return Send("ExtendTransaction", request, timeout_s)


def extension_outcome(answer: Message | CallFailed) -> Extension:
    """Return what the answer to `extension` says."""
    if not isinstance(answer, dedup_pb2.ExtendTransactionResponse):
        return "failed"
    if answer.outcome == dedup_pb2.EXTEND_OUTCOME_EXTENDED:
        return "extended"
    return "not_held" if answer.outcome == dedup_pb2.EXTEND_OUTCOME_NOT_HELD else "failed"


def may_have_claimed(error: BaseException) -> bool:
    """Return whether a claim that ended with `error` may have been made."""
    if isinstance(error, CallFailed):
        return error.applied == "unknown" and not isinstance(error, ClientClosed)
    return not isinstance(error, Exception | GeneratorExit) and not is_unsent(error)


def result_fault(result: object) -> TypeError | ValueError | None:
    """Return what is wrong with a result, as far as the client knows."""
    if not isinstance(result, bytes):
        return TypeError(f"the result is {type(result).__name__}; it must be bytes: encode it; {_COMPLETED_WITHOUT}")
    if len(result) > MAX_RESULT_BYTES:
        return ValueError(
            f"the result has {len(result)} bytes; the service keeps at most {MAX_RESULT_BYTES}: store it elsewhere "
            f"and keep a key; {_COMPLETED_WITHOUT}"
        )
    return None


def unknown_outcome(outcome: int) -> CallFailed:
    """Return the exception for a reply with an unknown outcome."""
    return CallFailed(
        f"the service answered with outcome {outcome}, which this client does not know: do not do the work",
        code=grpc.StatusCode.UNKNOWN,
        reason="OUTCOME_UNKNOWN",
    )


def seconds(span: Span) -> float:
    """Return a span in seconds."""
    return span.total_seconds() if isinstance(span, timedelta) else float(span)


def duration(span: Span | None) -> Duration | None:
    """Return a span rounded to milliseconds, the service's resolution."""
    if span is None:
        return None
    message = Duration()
    message.FromMilliseconds(round(seconds(span) * 1000))
    return message


def timestamp(moment: datetime | None) -> Timestamp | None:
    """Return a time truncated to milliseconds. Raises ValueError without a time zone."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise ValueError("expire_time has no time zone: use an aware datetime, such as datetime.now(UTC)")
    message = Timestamp()
    message.FromMilliseconds((moment - _EPOCH) // timedelta(milliseconds=1))
    return message


def _lease_s(request: dedup_pb2.ClaimTransactionRequest, own: Transaction) -> float | None:
    if request.HasField("expire_time"):
        return None
    if request.HasField("ttl"):
        return request.ttl.ToMilliseconds() / 1000
    if own.claim_time is None or own.expire_time is None:
        return None
    return (own.expire_time - own.claim_time).total_seconds()


def refuse_both(ttl: Span | None, expire_time: datetime | None) -> None:
    """Raise ValueError if both kinds of expiry are given."""
    if ttl is not None and expire_time is not None:
        raise ValueError("give a ttl or an expire_time, not both")

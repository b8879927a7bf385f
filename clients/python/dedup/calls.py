"""What each call of the service means: which reply is "go", and what is raised instead. No threads, no event loop."""

import logging
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, cast

import grpc

from dedup.errors import CallFailed, DuplicateTransaction, InvalidRequest, NotHeld, PayloadMismatch, Unavailable
from dedup.ids import logged_id
from dedup.requests import Span, duration, refuse_both, seconds, timestamp
from dedup.retries import Retrier
from dedup.steps import Steps
from dedup.transactions import Transaction
from dedup.v1 import dedup_pb2

OnUnavailable = Literal["deny", "allow"]
"""What a claim that cannot be asked for comes to: Unavailable is raised, or the work goes ahead unguarded."""

_LOG = logging.getLogger("dedup")


@dataclass(frozen=True, slots=True)
class Grant:
    """The permission to work, and what is needed to end it.

    `transaction` is the caller's own, that of the holder for a `shadow_duplicate`, and None when `fail_open`.
    """

    transaction_id: str
    namespace: str
    claim_token: str = field(repr=False)
    replayed: bool = False
    shadow_duplicate: bool = False
    fail_open: bool = False
    transaction: Transaction | None = None

    @property
    def holds(self) -> bool:
        """Whether there is a claim of this caller's to complete, release or extend."""
        return not (self.fail_open or self.shadow_duplicate)


class Calls:
    """The calls of one client, as steps for a driver to take."""

    def __init__(self, retrier: Retrier, on_unavailable: OnUnavailable) -> None:
        if on_unavailable not in ("deny", "allow"):
            raise ValueError(f'on_unavailable is "deny" or "allow", not {on_unavailable!r}')
        self._retrier = retrier
        self._on_unavailable = on_unavailable

    def claim(
        self, request: dedup_pb2.ClaimTransactionRequest, *, wait: Span | None, budget_s: float | None
    ) -> Steps[Grant]:
        """Yield the steps of a claim; its outcome is a grant, or else it raises.

        Raises DuplicateTransaction, PayloadMismatch, InvalidRequest, Unavailable (unless the client allows work while
        the service is away) or another CallFailed. An outcome that this version does not know is never "go".
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
            )
        if reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE:
            raise DuplicateTransaction(transaction)
        if reply.outcome == dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH:
            raise PayloadMismatch(transaction)
        raise _unknown_outcome(reply.outcome)

    def complete(
        self,
        grant: Grant,
        result: bytes,
        *,
        ttl: Span | None,
        expire_time: datetime | None,
        budget_s: float | None,
    ) -> Steps[Transaction]:
        """Yield the steps of a completion; raises NotHeld, InvalidRequest, Unavailable or another CallFailed.

        A result that is refused (too large) must not leave work that is done looking undone: it is completed without
        the result, and InvalidRequest is raised all the same.
        """
        refuse_both(ttl, expire_time)
        request = dedup_pb2.CompleteTransactionRequest(
            transaction_id=grant.transaction_id,
            namespace=grant.namespace,
            claim_token=grant.claim_token,
            result=result,
            ttl=duration(ttl),
            expire_time=timestamp(expire_time),
        )
        try:
            answer = yield from self._retrier.call("CompleteTransaction", request, budget_s=budget_s)
        except InvalidRequest as refused:
            if "result" in refused.violations:
                request.result = b""
                yield from self._retrier.call("CompleteTransaction", request, budget_s=budget_s)
            raise
        reply = cast("dedup_pb2.CompleteTransactionResponse", answer.reply)
        if reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED:
            return Transaction.of(reply.transaction)
        if reply.outcome == dedup_pb2.COMPLETE_OUTCOME_NOT_HELD:
            raise NotHeld(grant.transaction_id)
        raise _unknown_outcome(reply.outcome)

    def release(self, grant: Grant, *, budget_s: float | None) -> Steps[None]:
        """Yield the steps of giving a claim back; raises NotHeld, Unavailable or another CallFailed.

        When an earlier attempt may have released it, NOT_HELD is what success looks like, and is none to complain of.
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
        raise _unknown_outcome(reply.outcome)

    def extend(
        self,
        grant: Grant,
        *,
        ttl: Span | None,
        expire_time: datetime | None,
        allow_shortening: bool,
        budget_s: float | None,
    ) -> Steps[Transaction]:
        """Yield the steps of an extension; raises NotHeld, InvalidRequest, Unavailable or another CallFailed."""
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
        raise _unknown_outcome(reply.outcome)

    def get(self, transaction_id: str, *, namespace: str, budget_s: float | None) -> Steps[Transaction | None]:
        """Yield the steps of a look-up; its outcome is None when nobody holds the transaction."""
        request = dedup_pb2.GetTransactionRequest(transaction_id=transaction_id, namespace=namespace)
        try:
            answer = yield from self._retrier.call("GetTransaction", request, budget_s=budget_s)
        except CallFailed as failure:
            if failure.code is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        return Transaction.of(cast("dedup_pb2.GetTransactionResponse", answer.reply).transaction)


def _unknown_outcome(outcome: int) -> CallFailed:
    return CallFailed(
        f"the service answered with the outcome {outcome}, which means nothing to this client: do not do the work",
        code=grpc.StatusCode.UNKNOWN,
        reason="OUTCOME_UNKNOWN",
    )

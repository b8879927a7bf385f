"""The claim semantics: what is asked of the store, and what its answer means. It knows no protocol and no database."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dedup_service.claims.errors import Applied, InvalidRequest, StoreUnavailable, TransactionNotFound
from dedup_service.claims.limits import DEFAULT_NAMESPACE, claim_violations, holder_violations, identity_violations
from dedup_service.claims.policy import Policies, Policy
from dedup_service.claims.store import ClaimStore
from dedup_service.claims.tokens import claim_tokens
from dedup_service.claims.transaction import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    HolderRequest,
    Transaction,
    TransactionState,
)
from dedup_service.claims.transitions import Completion, Extension, Release
from dedup_service.claims.waiting import WaitingRoom

DEFAULT_MAX_RESULT_BYTES = 4_096


def system_clock_ms() -> int:
    """Return the Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class _Admitted(NamedTuple):
    """A claim that the store may be asked for, and the rules that it began with."""

    claim: Transaction
    ttl_ms: int | None
    token: str
    policy: Policy


class ClaimService:
    """Admits each transaction at most once, over any store.

    Every method raises InvalidRequest before anything is written, StoreUnavailable and UnreadableValue.
    """

    def __init__(
        self,
        store: ClaimStore,
        policies: Policies,
        *,
        max_result_bytes: int = DEFAULT_MAX_RESULT_BYTES,
        clock_ms: Callable[[], int] = system_clock_ms,
    ) -> None:
        self._store = store
        self._max_result_bytes = max_result_bytes
        self._clock_ms = clock_ms
        self._waiting = WaitingRoom(store)
        self._tokens = claim_tokens()
        self.policies = policies
        """The rules in force; may be replaced at any time, and calls under way keep those that they began with."""
        self.shadow_duplicates: Counter[str] = Counter()
        """How many claims of each namespace were let through by shadow mode alone."""

    async def close(self) -> None:
        """Let everybody who waits go on to their answer, and let nobody wait any more."""
        await self._waiting.close()

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim a transaction with one atomic command of the store.

        CLAIMED only when the store took this very claim, or holds one in progress with the caller's own token (then
        `replayed`), or when the namespace is in shadow mode (then `shadow_duplicate` says what it would have been).
        """
        admitted = self._admit(request)
        answer = self._answer(admitted, await self._store.claim(admitted.claim, admitted.ttl_ms))
        if request.wait_ms and _is_in_progress(answer):
            return await self._wait_and_claim(request, admitted, answer)
        return answer

    async def claim_all(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | Exception]:
        """Claim many transactions in their order, each as `claim` would and each alone, except that none waits.

        Returns the answer to each, or the exception that `claim` would have raised.
        """
        admitted = [self._admit_one_of_many(request) for request in requests]
        asked = [(one.claim, one.ttl_ms) for one in admitted if isinstance(one, _Admitted)]
        holders = iter(await self._store.claim_all(asked))
        answers: list[ClaimAnswer | Exception] = []
        for one in admitted:
            if isinstance(one, Exception):
                answers.append(one)
                continue
            holder = next(holders)
            answers.append(holder if isinstance(holder, Exception) else self._answer(one, holder))
        return answers

    async def complete(self, request: HolderRequest) -> Transaction | None:
        """Complete a transaction and return it, or None when the token does not hold it.

        Repeating a completion with its token and result returns the transaction as it was completed.
        """
        namespace, policy = self._check_holder(request)
        ttl_ms, expire_time_ms, now_ms = self._lifetime(request.ttl_ms, request.expire_time_ms, policy.retention_ms)
        completed = await self._store.complete(
            Completion(
                namespace,
                request.transaction_id,
                request.claim_token,
                result=request.result,
                completion_time_ms=now_ms,
                expire_time_ms=expire_time_ms,
                ttl_ms=ttl_ms,
            )
        )
        if completed is not None:
            self._waiting.tell(namespace, request.transaction_id)
        return completed

    async def release(self, request: HolderRequest) -> bool:
        """Give a claim in progress back, and return whether the token held it."""
        namespace, _ = self._check_holder(request)
        released = await self._store.release(Release(namespace, request.transaction_id, request.claim_token))
        if released:
            self._waiting.tell(namespace, request.transaction_id)
        return released

    async def extend(self, request: HolderRequest) -> Transaction | None:
        """Move the end of a claim in progress and return it, or None when the token does not hold it."""
        namespace, policy = self._check_holder(request)
        ttl_ms, expire_time_ms, _ = self._lifetime(request.ttl_ms, request.expire_time_ms, policy.default_ttl_ms)
        return await self._store.extend(
            Extension(
                namespace,
                request.transaction_id,
                request.claim_token,
                expire_time_ms=expire_time_ms,
                ttl_ms=ttl_ms,
                allow_shortening=request.allow_shortening,
            )
        )

    async def get(self, namespace: str, transaction_id: str) -> Transaction:
        """Return a transaction and change nothing. Raises TransactionNotFound when nobody holds it."""
        namespace = namespace or DEFAULT_NAMESPACE
        self.policies.of(namespace)
        if violations := tuple(identity_violations(transaction_id, namespace)):
            raise InvalidRequest(*violations)
        try:
            transaction = await self._store.get(namespace, transaction_id)
        except StoreUnavailable as error:
            # Whatever became of the question, it changed nothing.
            raise StoreUnavailable(error.reason, str(error), Applied.NO) from error
        if transaction is None:
            raise TransactionNotFound(f"no transaction with this id is claimed in the namespace {namespace!r}")
        return transaction

    def _admit(self, request: ClaimRequest) -> _Admitted:
        namespace = request.namespace or DEFAULT_NAMESPACE
        policy = self.policies.of(namespace)
        if violations := tuple(claim_violations(request, namespace, policy, self._clock_ms())):
            raise InvalidRequest(*violations)
        token = request.claim_token or next(self._tokens)
        ttl_ms, expire_time_ms, now_ms = self._lifetime(request.ttl_ms, request.expire_time_ms, policy.default_ttl_ms)
        claim = Transaction(
            namespace=namespace,
            transaction_id=request.transaction_id,
            claim_token=token,
            claimant=request.claimant,
            claim_time_ms=now_ms,
            expire_time_ms=expire_time_ms,
            payload_fingerprint=request.payload_fingerprint,
        )
        return _Admitted(claim, ttl_ms, token, policy)

    def _admit_one_of_many(self, request: ClaimRequest) -> _Admitted | Exception:
        try:
            return self._admit(request)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one claim, the others are made
            return error

    def _answer(self, admitted: _Admitted, holder: Transaction | None) -> ClaimAnswer:
        answer = decide(admitted.claim, admitted.token, holder)
        if admitted.policy.shadow and answer.outcome is not ClaimOutcome.CLAIMED:
            self.shadow_duplicates[admitted.claim.namespace] += 1
            return answer._replace(outcome=ClaimOutcome.CLAIMED, shadow_duplicate=True)
        return answer

    async def _wait_and_claim(self, request: ClaimRequest, admitted: _Admitted, answer: ClaimAnswer) -> ClaimAnswer:
        claim, _, _, policy = admitted
        until = time.monotonic() + request.wait_ms / 1_000
        while _is_in_progress(answer) and (left_s := until - time.monotonic()) > 0:
            await self._waiting.ended(claim.namespace, claim.transaction_id, left_s)
            # Asked anew also at the end of the wait: what was known before may have changed since.
            ttl_ms, end_ms, now_ms = self._lifetime(request.ttl_ms, request.expire_time_ms, policy.default_ttl_ms)
            claim = claim._replace(claim_time_ms=now_ms, expire_time_ms=end_ms)
            answer = self._answer(admitted._replace(claim=claim), await self._store.claim(claim, ttl_ms))
            if self._waiting.closed:
                break
        return answer

    def _check_holder(self, request: HolderRequest) -> tuple[str, Policy]:
        namespace = request.namespace or DEFAULT_NAMESPACE
        policy = self.policies.of(namespace)
        found = holder_violations(request, namespace, policy, self._clock_ms(), self._max_result_bytes)
        if violations := tuple(found):
            raise InvalidRequest(*violations)
        return namespace, policy

    def _lifetime(self, ttl_ms: int | None, expire_time_ms: int | None, default_ms: int) -> tuple[int | None, int, int]:
        """Return the ttl (None when the end was given as a time), the end, and the present."""
        now_ms = self._clock_ms()
        if expire_time_ms is not None:
            return None, expire_time_ms, now_ms
        ttl_ms = default_ms if ttl_ms is None else ttl_ms
        return ttl_ms, now_ms + ttl_ms, now_ms


def decide(claim: Transaction, token: str, holder: Transaction | None) -> ClaimAnswer:
    """Return what it means that a store met `holder` when it was asked to keep `claim`, made with `token`."""
    if holder is None:
        return ClaimAnswer(ClaimOutcome.CLAIMED, claim, token)
    asked, held = claim.payload_fingerprint, holder.payload_fingerprint
    if asked and held and asked != held:
        return ClaimAnswer(ClaimOutcome.PAYLOAD_MISMATCH, holder, token)
    # A completed transaction is a duplicate even to its own token: CLAIMED always means that there is work to do.
    if holder.claim_token == token and holder.state is TransactionState.IN_PROGRESS:
        return ClaimAnswer(ClaimOutcome.CLAIMED, holder, token, replayed=True)
    return ClaimAnswer(ClaimOutcome.DUPLICATE, holder, token)


def _is_in_progress(answer: ClaimAnswer) -> bool:
    return answer.outcome is ClaimOutcome.DUPLICATE and answer.transaction.state is TransactionState.IN_PROGRESS

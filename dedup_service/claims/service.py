"""The claim semantics: what is asked of the store, and what its answer means. Knows no protocol and no database."""

import os
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from dedup_service.claims.batches import Batches
from dedup_service.claims.errors import (
    Applied,
    FieldViolation,
    InvalidRequest,
    StoreUnavailable,
    TransactionNotFound,
)
from dedup_service.claims.limits import claim_violations, holder_violations, identity_violations
from dedup_service.claims.policies import Caller, Policies, Policy
from dedup_service.claims.store import ClaimStore
from dedup_service.claims.transaction import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    Completion,
    Expiry,
    Extension,
    HolderRequest,
    Release,
    Transaction,
    TransactionState,
)
from dedup_service.claims.waiting import Waiters

DEFAULT_MAX_RESULT_BYTES = 4_096
DEFAULT_MAX_WAITS = 2_000

_TOKEN_BYTES = 16
# Many tokens for one system call: asked one by one, the call would cost more than all else about a token.
_TOKENS_AT_A_TIME = 256


def system_clock_ms() -> int:
    """Return the Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class _Admitted(NamedTuple):
    """A checked claim, and the policy it began with."""

    claim: Transaction
    expiry: Expiry
    token: str
    policy: Policy


class ClaimService:
    """Admits each transaction at most once, over any store.

    Every method raises CallerNotAllowed and InvalidRequest before anything is written, StoreUnavailable and
    UnreadableValue. `caller` is None where callers are not identified.
    """

    def __init__(
        self,
        store: ClaimStore,
        policies: Policies,
        *,
        max_result_bytes: int = DEFAULT_MAX_RESULT_BYTES,
        max_waits: int = DEFAULT_MAX_WAITS,
        clock_ms: Callable[[], int] = system_clock_ms,
    ) -> None:
        self._store = store
        self.max_result_bytes = max_result_bytes
        self._clock_ms = clock_ms
        self._waiters = Waiters(store, max_waits)
        self._batches = Batches()
        self._tokens = claim_tokens()
        self.policies = policies
        """The rules in force. May be replaced at any time; calls in flight keep those they began with."""
        self.shadow_duplicates: Counter[str] = Counter()
        """Claims that only shadow mode let through, by namespace."""

    @property
    def waiting(self) -> int:
        """The number of claims that wait for work in progress."""
        return self._waiters.count

    async def close(self) -> None:
        """Send every waiting call to its answer, and let none wait any more."""
        await self._waiters.close()

    async def claim(self, request: ClaimRequest, caller: Caller | None = None) -> ClaimAnswer:
        """Claim a transaction with one atomic command of the store.

        CLAIMED only if the store took this claim, or holds one in progress with the caller's own token (`replayed`), or
        if the namespace is in shadow mode (`shadow_duplicate`).
        """
        admitted = self._admit(request, caller, self.policies)
        answer = self._answer(admitted, await self._store.claim(admitted.claim, admitted.expiry))
        if request.wait_ms and _is_in_progress(answer):
            return await self._wait_and_claim(request, admitted, answer)
        return answer

    async def claim_all(
        self, requests: Sequence[ClaimRequest], caller: Caller | None = None, wait_s: float | None = None
    ) -> list[ClaimAnswer | Exception]:
        """Claim many transactions in order, each independent of the others; none waits for the end of work.

        Returns for each the answer of `claim`, or the exception `claim` would have raised: STORE_QUEUE_FULL if other
        batches keep it from the store for `wait_s` seconds.
        """
        work = partial(self._claim_slice, caller=caller, policies=self.policies)
        return [*await self._batches.carry_out(requests, work, wait_s)]

    async def complete(self, request: HolderRequest, caller: Caller | None = None) -> Transaction | None:
        """Complete a transaction and return it, or None if the token does not hold it.

        Repeating a completion with its token and result returns the transaction as it was completed.
        """
        policy, now_ms = self._check_holder(request, caller)
        completed = await self._store.complete(
            Completion(
                request.namespace,
                request.transaction_id,
                request.claim_token,
                result=request.result,
                completion_time_ms=now_ms,
                expiry=request.expiry.resolve(policy.retention_ms, policy.max_ttl_ms, now_ms),
            )
        )
        if completed is not None:
            self._waiters.wake(request.namespace, request.transaction_id)
        return completed

    async def release(self, request: HolderRequest, caller: Caller | None = None) -> bool:
        """Release a claim in progress, and return whether the token held it."""
        self._check_holder(request, caller)
        released = await self._store.release(Release(request.namespace, request.transaction_id, request.claim_token))
        if released:
            self._waiters.wake(request.namespace, request.transaction_id)
        return released

    async def extend(self, request: HolderRequest, caller: Caller | None = None) -> Transaction | None:
        """Extend a claim in progress and return it, or None if the token does not hold it."""
        policy, now_ms = self._check_holder(request, caller)
        return await self._store.extend(
            Extension(
                request.namespace,
                request.transaction_id,
                request.claim_token,
                expiry=request.expiry.resolve(policy.default_ttl_ms, policy.max_ttl_ms, now_ms),
                allow_shortening=request.allow_shortening,
            )
        )

    async def get(self, namespace: str, transaction_id: str, caller: Caller | None = None) -> Transaction:
        """Return a transaction. Raises TransactionNotFound if it is not claimed."""
        self.policies.of(namespace, caller)
        if violations := tuple(identity_violations(transaction_id, namespace)):
            raise InvalidRequest(*violations)
        transaction = await self._held(namespace, transaction_id)
        if transaction is None:
            raise TransactionNotFound(f"no transaction with this id is claimed in the namespace {namespace!r}")
        return transaction

    async def _held(self, namespace: str, transaction_id: str) -> Transaction | None:
        try:
            return await self._store.get(namespace, transaction_id)
        except StoreUnavailable as error:
            # A read changes nothing, whether or not it was carried out.
            raise error.with_applied(Applied.NO) from error

    async def _claim_slice(
        self, requests: Sequence[ClaimRequest], *, caller: Caller | None, policies: Policies
    ) -> list[ClaimAnswer | Exception]:
        admitted = [self._admit_one_of_many(request, caller, policies) for request in requests]
        asked = [(one.claim, one.expiry) for one in admitted if isinstance(one, _Admitted)]
        holders = iter(await self._store.claim_all(asked))
        answers: list[ClaimAnswer | Exception] = []
        for one in admitted:
            if isinstance(one, Exception):
                answers.append(one)
                continue
            holder = next(holders)
            answers.append(holder if isinstance(holder, Exception) else self._answer(one, holder))
        return answers

    def _admit(self, request: ClaimRequest, caller: Caller | None, policies: Policies) -> _Admitted:
        policy = policies.of(request.namespace, caller)
        now_ms = self._clock_ms()
        if violations := tuple(claim_violations(request, policy)):
            raise InvalidRequest(*violations)
        token = request.claim_token or next(self._tokens)
        expiry = request.expiry.resolve(policy.default_ttl_ms, policy.max_ttl_ms, now_ms)
        claim = Transaction(
            namespace=request.namespace,
            transaction_id=request.transaction_id,
            claim_token=token,
            claimant=request.claimant,
            claim_time_ms=now_ms,
            expire_time_ms=expiry.time_ms,
            payload_fingerprint=request.payload_fingerprint,
        )
        return _Admitted(claim, expiry, token, policy)

    def _admit_one_of_many(
        self, request: ClaimRequest, caller: Caller | None, policies: Policies
    ) -> _Admitted | Exception:
        try:
            return self._admit(request, caller, policies)
        except Exception as error:  # noqa: BLE001 - a fault of one claim must not fail the others
            return error

    def _answer(self, admitted: _Admitted, holder: Transaction | None) -> ClaimAnswer:
        answer = decide(admitted.claim, admitted.token, holder)
        if admitted.policy.shadow and answer.outcome is not ClaimOutcome.CLAIMED:
            self.shadow_duplicates[admitted.claim.namespace] += 1
            return answer._replace(outcome=ClaimOutcome.CLAIMED, shadow_duplicate=True)
        return answer

    async def _wait_and_claim(self, request: ClaimRequest, admitted: _Admitted, answer: ClaimAnswer) -> ClaimAnswer:
        wait_ms = request.wait_ms
        if request.expiry.time_ms is not None:
            # Longer, there would be nothing left to claim.
            wait_ms = min(wait_ms, request.expiry.time_ms - self._clock_ms())
        until = time.monotonic() + wait_ms / 1_000
        with self._waiters.admitted():
            while _is_in_progress(answer) and (left_s := until - time.monotonic()) > 0:
                await self._waiters.wait(request.namespace, request.transaction_id, left_s)
                # At the end of the wait, too: the last answer may be stale.
                answer = await self._claim_again(request, admitted)
                if self._waiters.closed:
                    break
        return answer

    async def _claim_again(self, request: ClaimRequest, admitted: _Admitted) -> ClaimAnswer:
        """Claim with the lease of this moment; once the expire time has passed, only look the transaction up."""
        now_ms = self._clock_ms()
        expiry = request.expiry.resolve(admitted.policy.default_ttl_ms, admitted.policy.max_ttl_ms, now_ms)
        claim = admitted.claim._replace(claim_time_ms=now_ms, expire_time_ms=expiry.time_ms)
        admitted = admitted._replace(claim=claim)
        if expiry.time_ms > now_ms:
            # It may have passed by the clock of the store.
            with suppress(InvalidRequest):
                return self._answer(admitted, await self._store.claim(claim, expiry))
        holder = await self._held(claim.namespace, claim.transaction_id)
        # Only a claim can confirm that the caller's own token holds the transaction.
        if holder is None or holder.claim_token == admitted.token:
            raise InvalidRequest(
                FieldViolation("expire_time", "passed while the claim waited: send a later time, or a shorter wait")
            )
        return self._answer(admitted, holder)

    def _check_holder(self, request: HolderRequest, caller: Caller | None) -> tuple[Policy, int]:
        policy, now_ms = self.policies.of(request.namespace, caller), self._clock_ms()
        if violations := tuple(holder_violations(request, policy, self.max_result_bytes)):
            raise InvalidRequest(*violations)
        return policy, now_ms


def decide(claim: Transaction, token: str, holder: Transaction | None) -> ClaimAnswer:
    """Return the answer to `claim`, made with `token`, where the store reported `holder`."""
    if holder is None:
        return ClaimAnswer(ClaimOutcome.CLAIMED, claim, token)
    asked, held = claim.payload_fingerprint, holder.payload_fingerprint
    if asked and held and asked != held:
        return ClaimAnswer(ClaimOutcome.PAYLOAD_MISMATCH, holder, token)
    # A completed transaction is a duplicate even to its own token: CLAIMED always means that there is work to do.
    if holder.claim_token == token and holder.state is TransactionState.IN_PROGRESS:
        return ClaimAnswer(ClaimOutcome.CLAIMED, holder, token, replayed=True)
    return ClaimAnswer(ClaimOutcome.DUPLICATE, holder, token)


def claim_tokens() -> Iterator[str]:
    """Yield random tokens without end: 128 bits each, as 22 characters of URL-safe base64."""
    while True:
        block = os.urandom(_TOKEN_BYTES * _TOKENS_AT_A_TIME)
        for start in range(0, len(block), _TOKEN_BYTES):
            yield urlsafe_b64encode(block[start : start + _TOKEN_BYTES])[:22].decode()


def _is_in_progress(answer: ClaimAnswer) -> bool:
    return answer.outcome is ClaimOutcome.DUPLICATE and answer.transaction.state is TransactionState.IN_PROGRESS

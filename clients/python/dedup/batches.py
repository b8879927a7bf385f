"""Batches of claims: the answers in a reply, and `claim_batch`, which repeats failed entries."""

import itertools
import time
from collections.abc import Iterator, Sequence

import grpc

from dedup.calls import unknown_outcome
from dedup.error_details import failure_of_call, failure_of_status
from dedup.errors import Applied, CallFailed
from dedup.retries import Retrier, RetryPolicy, worth_repeating
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

MAX_BATCH = 1_000
"""The limit of one call."""

ClaimAnswer = dedup_pb2.ClaimTransactionResponse | CallFailed

_DEFAULT_POLICY = RetryPolicy()
_OUTCOMES = frozenset(dedup_pb2.ClaimOutcome.values()) - {dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED}


def claim_batch(
    stub: dedup_pb2_grpc.DedupServiceStub,
    requests: Sequence[dedup_pb2.ClaimTransactionRequest],
    *,
    policy: RetryPolicy = _DEFAULT_POLICY,
) -> Iterator[tuple[int, ClaimAnswer]]:
    """Claim up to 1,000 transactions in one call, and repeat the entries that failed by the rules of single claims.

    Yields the index of each request with its final answer once known: a response whose outcome is CLAIMED, DUPLICATE or
    PAYLOAD_MISMATCH, or a CallFailed, whose `applied` covers all attempts of the entry. If the iteration is
    interrupted, for example by KeyboardInterrupt, an unanswered request may have been applied.

    Every request needs a claim token, so that a repeated claim receives CLAIMED again. Raises ValueError otherwise. The
    first attempt fails at once without a connection. Repeated attempts wait for one until their timeout.
    """
    if not all(request.claim_token for request in requests):
        raise ValueError("every claim of a batch needs a claim_token: without one, a repeated claim is a duplicate")
    retrier = Retrier(policy)
    end = time.monotonic() + policy.budget_s
    failures: dict[int, CallFailed] = {}
    pending = list(range(len(requests)))
    for attempt in itertools.count():
        if not pending:
            return
        timeout_s = min(policy.attempt_timeout_s, end - time.monotonic())
        answers = _attempt(stub, [requests[index] for index in pending], timeout_s, wait_for_ready=attempt > 0)
        repeated: list[int] = []
        retry_after_s = 0.0
        for index, answer in zip(pending, answers, strict=True):
            if not isinstance(answer, CallFailed):
                yield index, answer
                continue
            failures[index] = _combined(failures.get(index), answer)
            if worth_repeating(answer):
                repeated.append(index)
                retry_after_s = max(retry_after_s, answer.retry_after_s or 0.0)
            else:
                yield index, failures[index]
        pause_s = retrier.pause_s(attempt, retry_after_s)
        if retrier.gives_up(attempt, pause_s, end):
            yield from ((index, failures[index]) for index in repeated)
            return
        pending = repeated
        if pending:
            time.sleep(pause_s)


def answers_of(reply: dedup_pb2.BatchClaimTransactionsResponse, expected: int) -> list[ClaimAnswer]:
    """Return the answer to each claim of a batch, in order.

    If the number of entries differs, none can be matched, and every claim fails.
    """
    if len(reply.entries) != expected:
        return [_broken(f"{len(reply.entries)} answers to {expected} claims") for _ in range(expected)]
    return [_answer_of(entry) for entry in reply.entries]


def _answer_of(entry: dedup_pb2.BatchClaimEntry) -> ClaimAnswer:
    result = entry.WhichOneof("result")
    if result == "response":
        return entry.response
    return failure_of_status(entry.error) if result == "error" else _broken("an empty answer to a claim")


def _broken(what: str) -> CallFailed:
    return CallFailed(f"the service gave {what}", code=grpc.StatusCode.UNKNOWN, reason="BATCH_BROKEN")


def _attempt(
    stub: dedup_pb2_grpc.DedupServiceStub,
    requests: list[dedup_pb2.ClaimTransactionRequest],
    timeout_s: float,
    *,
    wait_for_ready: bool,
) -> list[ClaimAnswer]:
    batch = dedup_pb2.BatchClaimTransactionsRequest(requests=requests)
    try:
        reply = stub.BatchClaimTransactions(batch, timeout=timeout_s, wait_for_ready=wait_for_ready)
    except grpc.RpcError as error:
        return [failure_of_call(error) for _ in requests]
    return [_checked(answer) for answer in answers_of(reply, len(requests))]


def _checked(answer: ClaimAnswer) -> ClaimAnswer:
    if isinstance(answer, CallFailed) or answer.outcome in _OUTCOMES:
        return answer
    return unknown_outcome(answer.outcome)


def _combined(earlier: CallFailed | None, failure: CallFailed) -> CallFailed:
    """Return an entry's report after another failed attempt; doubt stays."""
    if earlier is None:
        return failure
    applied: Applied = "unknown" if "unknown" in (earlier.applied, failure.applied) else "no"
    # Without a connection a repeated attempt ends as DEADLINE_EXCEEDED; the earlier error says more.
    kept = earlier if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED else failure
    kept.applied = applied
    return kept

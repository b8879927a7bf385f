"""Claims that travel together: what a batch sends, and what each of its claims is told."""

from typing import TypeGuard

import grpc
from google.protobuf.message import Message

from dedup.error_details import failure_of_status
from dedup.errors import CallFailed, Unavailable
from dedup.v1 import dedup_pb2

MAX_BATCH = 1_000
"""How many claims the service takes in one call."""

ClaimAnswer = dedup_pb2.ClaimTransactionResponse | CallFailed


class Crowd:
    """Says when a batch may leave before its time is up.

    Who was answered together mostly claims again together. So once nothing is under way, and as many claims wait as
    were about when the last answer came, nobody else is likely to come soon.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._claims = 0
        # At first nobody knows.
        self._expected = MAX_BATCH

    def is_gathered(self, waiting: int) -> bool:
        """Whether so many waiting claims should leave now."""
        return waiting >= MAX_BATCH or (not self._batches and waiting >= self._expected)

    def left(self, claims: int) -> None:
        """Note that a batch of so many claims has left."""
        self._batches += 1
        self._claims += claims

    def answered(self, claims: int, waiting: int) -> None:
        """Note the end of a batch of so many claims, while others wait."""
        self._expected = self._claims + waiting
        self._batches -= 1
        self._claims -= claims


def may_travel_with_others(request: Message) -> TypeGuard[dedup_pb2.ClaimTransactionRequest]:
    """Whether a request is a claim that a batch takes: one that waits would hold up the others."""
    return isinstance(request, dedup_pb2.ClaimTransactionRequest) and not request.HasField("wait")


def answers_of(reply: dedup_pb2.BatchClaimTransactionsResponse, expected: int) -> list[ClaimAnswer]:
    """Return the answer to each claim of a batch, in order.

    A reply with another number of entries cannot be matched to the claims, so it answers none of them.
    """
    if len(reply.entries) != expected:
        return [_broken(f"{len(reply.entries)} answers to {expected} claims") for _ in range(expected)]
    return [_answer_of(entry) for entry in reply.entries]


def too_late(timeout_s: float) -> Unavailable:
    """Return what a claim is told whose own time is up before its batch is answered."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    return Unavailable(f"{code.name}: no answer to the batch within {timeout_s:.3f} s", code=code)


def _answer_of(entry: dedup_pb2.BatchClaimEntry) -> ClaimAnswer:
    result = entry.WhichOneof("result")
    if result == "response":
        return entry.response
    return failure_of_status(entry.error) if result == "error" else _broken("an empty answer to a claim")


def _broken(what: str) -> CallFailed:
    return CallFailed(f"the service gave {what}", code=grpc.StatusCode.UNKNOWN, reason="BATCH_BROKEN")

"""One logical call of several attempts: whether to try again, when, and for how long."""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message

from dedup.errors import CallFailed, Unavailable
from dedup.steps import Pause, Send, Steps
from dedup.v1 import dedup_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a logical call may take and how its attempts are spaced, in seconds."""

    budget_s: float = 2.0
    attempt_timeout_s: float = 1.0
    first_backoff_s: float = 0.05
    max_backoff_s: float = 1.0

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.attempt_timeout_s <= 0:
            raise ValueError("the budget and the timeout of an attempt must be more than 0 seconds")


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a logical call; `doubtful` when an earlier attempt of it may have been applied."""

    reply: Message
    doubtful: bool


def worth_repeating(failure: CallFailed) -> bool:
    """Whether the same request may succeed a moment later.

    The service marks what a retry may mend with RetryInfo, so an UNAVAILABLE with a reason and without RetryInfo (a
    store that can never work as it is configured) is final. One without a reason was made by gRPC itself.
    """
    if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return True
    if not isinstance(failure, Unavailable):
        return False
    return not failure.reason or failure.retry_after_s is not None


class Retrier:
    """Repeats an unanswered request until it is answered, is refused for good, or its budget is spent."""

    def __init__(
        self,
        policy: RetryPolicy,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._jitter = jitter

    def call(
        self, method: str, request: Message, *, budget_s: float | None = None, wait_s: float = 0.0
    ) -> Steps[Answer]:
        """Yield the steps of one logical call, all with the same `request`, and so with the same token.

        Neither an attempt nor a pause ever ends after the budget. `wait_s` is how long the service was asked to hold a
        claim back: it is added to the budget, and an attempt after a lost one asks only for the rest of it.

        Raises CallFailed as the last attempt told it, and with `applied` "unknown" when any attempt may have been
        applied.
        """
        start = self._clock()
        end = start + (self._policy.budget_s if budget_s is None else budget_s) + wait_s
        doubtful = False
        for attempt in itertools.count():
            wait_left_s = max(0.0, start + wait_s - self._clock())
            if isinstance(request, dedup_pb2.ClaimTransactionRequest) and wait_s:
                request.wait.FromMilliseconds(int(wait_left_s * 1000))
            timeout_s = min(self._policy.attempt_timeout_s + wait_left_s, end - self._clock())
            try:
                reply = yield Send(method, request, timeout_s)
            except CallFailed as failure:
                doubtful = doubtful or failure.applied == "unknown"
                pause_s = self._pause_s(attempt, failure)
                if not worth_repeating(failure) or self._clock() + pause_s >= end:
                    failure.applied = "unknown" if doubtful else "no"
                    raise
            else:
                assert reply is not None  # noqa: S101 - A Send is answered by a reply.
                return Answer(reply, doubtful)
            yield Pause(pause_s)
        raise AssertionError  # pragma: no cover - Counting does not end.

    def _pause_s(self, attempt: int, failure: CallFailed) -> float:
        """Return the pause after an attempt: what the service asks for, and full jitter on an exponential backoff."""
        backoff_s = min(self._policy.max_backoff_s, self._policy.first_backoff_s * 2.0 ** min(attempt, 30))
        return (failure.retry_after_s or 0.0) + self._jitter(0.0, backoff_s)

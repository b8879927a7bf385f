"""Retries of one logical call: which failures are repeated, when, and for how long.

Generators yield the steps of a call (`Send` or `Pause`). `run` takes them in blocking code, `run_async` in a coroutine,
and tests from a list.
"""

import itertools
import random
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from dedup.errors import CallFailed, Unavailable
from dedup.v1 import dedup_pb2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Call `method` with `request`, for at most `timeout_s` seconds. The driver sends back the reply.

    `again` is True for another attempt of the same call.
    """

    method: str
    request: Message = field(repr=False)  # Contains the token.
    timeout_s: float
    again: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Sleep for `seconds`."""

    seconds: float


Steps = Generator[Send | Pause, Message | None, T]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Limits of one logical call, and the backoff between its attempts.

    Without `max_attempts` only the budget limits attempts. All clients share the defaults (`clients/defaults.json`).
    """

    budget_s: float = 2.0
    attempt_timeout_s: float = 1.0
    first_backoff_s: float = 0.05
    max_backoff_s: float = 1.0
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.attempt_timeout_s <= 0:
            raise ValueError("the budget and the timeout of an attempt must be more than 0 seconds")
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a logical call; `doubtful` if an earlier attempt may have been applied.

    `sent_s` is when the answered attempt was sent, by the retrier's clock.
    """

    reply: Message
    doubtful: bool
    sent_s: float


def worth_repeating(failure: CallFailed) -> bool:
    """Return whether the same request may succeed later.

    The service adds RetryInfo to retryable errors. UNAVAILABLE with a reason but without RetryInfo is final, for
    example a misconfigured store. Without a reason it comes from gRPC itself and is repeated.
    """
    if failure.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return True
    if not isinstance(failure, Unavailable):
        return False
    return not failure.reason or failure.retry_after_s is not None


class Retrier:
    """Repeats a request until it is answered, fails for good, or reaches its policy's limits."""

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
        """Yield the steps of one logical call. Every attempt sends the same `request`, hence token.

        No attempt or pause ends after the budget. The service may hold the claim back for `wait_s`, which is added to
        the budget and the attempt timeout; a repeated attempt asks only for the rest.

        Raises the last attempt's CallFailed, with `applied` "unknown" if any attempt may have been applied.
        """
        start = self._clock()
        end = start + (self._policy.budget_s if budget_s is None else budget_s) + wait_s
        doubtful = False
        for attempt in itertools.count():
            wait_left_s = max(0.0, start + wait_s - self._clock())
            if isinstance(request, dedup_pb2.ClaimTransactionRequest) and wait_s:
                request.wait.FromMilliseconds(int(wait_left_s * 1000))
            sent_s = self._clock()
            timeout_s = min(self._policy.attempt_timeout_s + wait_left_s, end - sent_s)
            try:
                reply = yield Send(method, request, timeout_s, again=attempt > 0)
            except CallFailed as failure:
                doubtful = doubtful or failure.applied == "unknown"
                pause_s = self.pause_s(attempt, failure.retry_after_s)
                if not worth_repeating(failure) or self.gives_up(attempt, pause_s, end):
                    failure.applied = "unknown" if doubtful else "no"
                    raise
            else:
                assert reply is not None  # noqa: S101 - The driver answers every Send with a reply.
                return Answer(reply, doubtful, sent_s)
            yield Pause(pause_s)
        raise AssertionError  # pragma: no cover - `count` never ends.

    def repeat(self, steps: Callable[[float], Steps[bool]]) -> Steps[bool]:
        """Make logical calls until one returns True or the budget is spent. Each receives the rest of the budget."""
        end = self._clock() + self._policy.budget_s
        for attempt in itertools.count():
            if (yield from steps(end - self._clock())):
                return True
            pause_s = self.pause_s(attempt, None)
            if self.gives_up(attempt, pause_s, end):
                return False
            yield Pause(pause_s)
        raise AssertionError  # pragma: no cover - `count` never ends.

    @property
    def policy(self) -> RetryPolicy:
        """The limits of its calls."""
        return self._policy

    def pause_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Return the pause after an attempt (from 0): the service's delay, plus backoff with full jitter."""
        backoff_s = min(self._policy.max_backoff_s, self._policy.first_backoff_s * 2.0 ** min(attempt, 30))
        return (retry_after_s or 0.0) + self._jitter(0.0, backoff_s)

    def gives_up(self, attempt: int, pause_s: float, end: float) -> bool:
        """Return whether the policy forbids another attempt after this one and its pause."""
        limit = self._policy.max_attempts
        return (limit is not None and attempt + 1 >= limit) or self._clock() + pause_s >= end


def run(steps: Steps[T], send: Callable[[Send], Message], pause: Callable[[float], None]) -> T:
    """Take the steps in blocking code, return their outcome. `send` raises CallFailed for a failed attempt."""
    answer: Message | None = None
    failure: CallFailed | None = None
    try:
        while True:
            step = steps.send(answer) if failure is None else steps.throw(failure)
            answer = failure = None
            if isinstance(step, Pause):
                pause(step.seconds)
                continue
            try:
                answer = send(step)
            except CallFailed as error:
                failure = error
    except StopIteration as end:
        outcome: T = end.value
        return outcome


async def run_async(
    steps: Steps[T], send: Callable[[Send], Awaitable[Message]], pause: Callable[[float], Awaitable[None]]
) -> T:
    """Take the steps in a coroutine, as `run` does."""
    answer: Message | None = None
    failure: CallFailed | None = None
    try:
        while True:
            step = steps.send(answer) if failure is None else steps.throw(failure)
            answer = failure = None
            if isinstance(step, Pause):
                await pause(step.seconds)
                continue
            try:
                answer = await send(step)
            except CallFailed as error:
                failure = error
    except StopIteration as end:
        outcome: T = end.value
        return outcome

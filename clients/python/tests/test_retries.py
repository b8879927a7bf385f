"""The attempts of one logical call, with a fake clock."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from dedup.calls import Calls, claim_request
from dedup.error_details import failure_of_closed_client, failure_of_status
from dedup.errors import CallFailed, Unavailable
from dedup.retries import Retrier, RetryPolicy, Send, run
from dedup.v1 import dedup_pb2

CLAIMED = dedup_pb2.ClaimTransactionResponse(outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED, claim_token="t" * 16)


def failure(
    code: str = "UNAVAILABLE", reason: str = "", applied: Any = "unknown", after: float | None = None
) -> CallFailed:
    """Return the failure of an attempt."""
    status = grpc.StatusCode[code]
    unavailable = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}
    kind = Unavailable if code in unavailable else CallFailed
    return kind("a failure", code=status, reason=reason, applied=applied, retry_after_s=after)


class Script:
    """A scripted service. Time passes only in pauses and attempts."""

    def __init__(self, *answers: Message | Callable[[], CallFailed], attempt_s: float = 0.0) -> None:
        self._answers = list(answers)
        self._attempt_s = attempt_s
        self.now = 0.0
        self.pauses: list[float] = []
        self.timeouts: list[float] = []
        self.requests: list[dedup_pb2.ClaimTransactionRequest] = []

    def send(self, step: Send) -> Message:
        """Answer the next attempt, or end it at its timeout."""
        assert step.timeout_s > 0
        self.timeouts.append(step.timeout_s)
        # Copied: a later attempt changes the wait of the same message.
        self.requests.append(dedup_pb2.ClaimTransactionRequest.FromString(step.request.SerializeToString()))
        if self._attempt_s >= step.timeout_s:
            self.now += step.timeout_s
            raise failure("DEADLINE_EXCEEDED")
        self.now += self._attempt_s
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Message):
            return answer
        raise answer()

    def pause(self, seconds: float) -> None:
        """Move the clock."""
        self.pauses.append(seconds)
        self.now += seconds

    def claim(self, *, jitter: float = 1.0, wait: float | None = None, **policy: Any) -> Any:
        """Make one logical claim. `jitter` is the position of every pause in its range, from 0 to 1."""
        retrier = Retrier(RetryPolicy(**policy), lambda: self.now, lambda low, high: low + (high - low) * jitter)
        request = claim_request("x", ttl=None, expire_time=None, namespace="", claimant="", fingerprint=b"", token=None)
        return run(Calls(retrier, "deny").claim(request, wait=wait, budget_s=None), self.send, self.pause)


def test_every_attempt_has_the_same_token() -> None:
    """Another logical call has another token."""
    scripts = [Script(failure, failure, CLAIMED), Script(failure, CLAIMED)]
    for script in scripts:
        script.claim()
    tokens = [{request.claim_token for request in script.requests} for script in scripts]
    assert [len(script.requests) for script in scripts] == [3, 2]
    assert all(len(found) == 1 and len(next(iter(found))) == 22 for found in tokens)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (lambda: failure("UNAVAILABLE"), 2),
        (lambda: failure("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS", "no", 0.2), 2),
        (lambda: failure("DEADLINE_EXCEEDED"), 2),
        (lambda: failure("DEADLINE_EXCEEDED", "DEADLINE_PASSED"), 2),
        (lambda: failure("UNAVAILABLE", "STORE_UNREACHABLE", "no", 0.2), 2),
        (lambda: failure("UNAVAILABLE", "STORE_REFUSED", "no"), 1),
        (lambda: failure("INTERNAL", "INTERNAL"), 1),
        (lambda: failure("FAILED_PRECONDITION", "VALUE_DAMAGED", "no"), 1),
        (lambda: failure("CANCELLED"), 2),
        (failure_of_closed_client, 1),
        (lambda: failure("UNIMPLEMENTED"), 1),
    ],
)
def test_only_failures_that_may_pass_are_retried(error: Callable[[], CallFailed], attempts: int) -> None:
    """The service marks them with RetryInfo. Connection errors and deadlines of gRPC itself count too."""
    script = Script(error, CLAIMED)
    if attempts == 1:
        with pytest.raises(CallFailed) as caught:
            script.claim()
        assert caught.value.code is error().code
    else:
        script.claim()
    assert len(script.requests) == attempts


def test_a_pause_is_at_least_the_retry_delay() -> None:
    """No pause is shorter than the RetryInfo delay, regardless of the jitter."""
    script = Script(lambda: failure("UNAVAILABLE", "STORE_LOADING", "no", 0.2), CLAIMED)
    script.claim(jitter=0.0)
    assert script.pauses == [0.2]


def test_backoff_is_exponential_with_full_jitter_up_to_a_limit() -> None:
    """The backoff doubles each time, and the pause is between 0 and the backoff."""
    waits = {}
    for jitter in (0.0, 0.5, 1.0):
        script = Script(*[failure] * 7, CLAIMED)
        script.claim(jitter=jitter, budget_s=60.0)
        waits[jitter] = script.pauses
    assert waits[1.0] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert waits[0.5] == [pause / 2 for pause in waits[1.0]]
    assert waits[0.0] == [0.0] * 7


@pytest.mark.parametrize("attempt_s", [0.0, 0.3, 0.9, 100.0])
@pytest.mark.parametrize("jitter", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("after", [None, 0.2])
def test_the_budget_is_never_exceeded(attempt_s: float, jitter: float, after: float | None) -> None:
    """No attempt and no pause ends after it. The caller gets the last error."""
    script = Script(lambda: failure(after=after), attempt_s=attempt_s)
    with pytest.raises(Unavailable):
        script.claim(jitter=jitter, budget_s=2.0, attempt_timeout_s=1.0)
    assert script.now <= 2.0
    assert len(script.requests) > 1
    assert max(script.timeouts) <= 1.0


def test_a_wait_is_added_to_the_budget_once() -> None:
    """A repeated attempt asks only for the rest of the wait."""
    script = Script(failure, CLAIMED, attempt_s=4.0)
    script.claim(wait=10.0, jitter=0.0, budget_s=2.0, attempt_timeout_s=1.0)
    assert [request.wait.ToMilliseconds() for request in script.requests] == [10_000, 6_000]
    assert script.timeouts == [11.0, 7.0]


def test_one_doubtful_attempt_makes_the_call_doubtful() -> None:
    """`applied` covers all attempts."""
    certain = lambda: failure("UNAVAILABLE", "STORE_REFUSED", "no")  # noqa: E731 - Used by two scripts.
    for script, applied in ((Script(certain), "no"), (Script(failure, certain), "unknown")):
        with pytest.raises(Unavailable) as caught:
            script.claim()
        assert caught.value.applied == applied


@pytest.mark.parametrize("outcome", [0, 4, 99])
@pytest.mark.parametrize("on_unavailable", ["deny", "allow"])
def test_an_unknown_outcome_is_never_a_claim(outcome: int, on_unavailable: Any) -> None:
    """Not even if work is allowed during an outage, because the service did answer."""
    script = Script(dedup_pb2.ClaimTransactionResponse(outcome=outcome, claim_token="t" * 16))  # type: ignore[arg-type]
    request = claim_request("x", ttl=None, expire_time=None, namespace="", claimant="", fingerprint=b"", token=None)
    steps = Calls(Retrier(RetryPolicy()), on_unavailable).claim(request, wait=None, budget_s=None)
    with pytest.raises(CallFailed, match="do not do the work"):
        run(steps, script.send, script.pause)


def test_an_unknown_code_is_a_failure() -> None:
    """A status code that this gRPC does not know becomes UNKNOWN."""
    from google.rpc import status_pb2  # noqa: PLC0415 - Only this test needs it.

    assert failure_of_status(status_pb2.Status(code=77)).code is grpc.StatusCode.UNKNOWN


def test_attempts_may_be_limited() -> None:
    """With `max_attempts` a call fails before its budget is spent."""
    script = Script(failure)
    with pytest.raises(Unavailable):
        script.claim(max_attempts=3)
    assert len(script.requests) == 3


@pytest.mark.parametrize("policy", [{"budget_s": 0.0}, {"attempt_timeout_s": -1.0}, {"max_attempts": 0}])
def test_a_policy_that_allows_no_attempt_is_refused(policy: dict[str, Any]) -> None:
    """Times must be more than 0, and attempts at least 1."""
    with pytest.raises(ValueError, match=r"more than 0|at least 1"):
        RetryPolicy(**policy)

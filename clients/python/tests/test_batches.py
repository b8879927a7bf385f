"""`claim_batch`: one call for many claims, repeated for the entries that failed."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from dedup import CallFailed, RetryPolicy, Unavailable, claim_batch, new_claim_token
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED


class Failure(grpc.RpcError):
    """A failed call, as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        """Return the code."""
        return self._code

    def details(self) -> str:
        """Return the message."""
        return "a failure"

    def trailing_metadata(self) -> Any:
        """Return no error details."""
        return ()


def requests(*ids: str) -> list[dedup_pb2.ClaimTransactionRequest]:
    """Return claims with tokens."""
    return [dedup_pb2.ClaimTransactionRequest(transaction_id=name, claim_token=new_claim_token()) for name in ids]


def answer(outcome: int = CLAIMED) -> dedup_pb2.BatchClaimEntry:
    """Return an entry with a response."""
    return dedup_pb2.BatchClaimEntry(response=dedup_pb2.ClaimTransactionResponse(outcome=outcome))  # type: ignore[arg-type]


def error(applied: str = "no", *, after_ms: int | None = 1, reason: str = "STORE_TIMEOUT") -> dedup_pb2.BatchClaimEntry:
    """Return an entry that failed as UNAVAILABLE; without `after_ms` it has no RetryInfo, and is final."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="dedup.v1", metadata={"applied": applied})]
    packed = [any_pb2.Any() for _ in range(2 if after_ms else 1)]
    packed[0].Pack(details[0])
    if after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(after_ms)
        packed[1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return dedup_pb2.BatchClaimEntry(error=status_pb2.Status(code=14, message="away", details=packed))


class Stub:
    """Answers each attempt from a list, by its entries or by a failure of the whole call. The last one repeats."""

    def __init__(self, *attempts: list[dedup_pb2.BatchClaimEntry] | grpc.StatusCode) -> None:
        self._attempts = list(attempts)
        self.calls: list[tuple[list[str], bool]] = []
        self.tokens: dict[str, set[str]] = {}
        self.timeouts: list[float] = []

    def BatchClaimTransactions(self, request: Any, *, timeout: float, wait_for_ready: bool) -> Any:  # noqa: N802 - The name of the rpc.
        """Answer one attempt."""
        self.calls.append(([claim.transaction_id for claim in request.requests], wait_for_ready))
        self.timeouts.append(timeout)
        for claim in request.requests:
            self.tokens.setdefault(claim.transaction_id, set()).add(claim.claim_token)
        found = self._attempts.pop(0) if len(self._attempts) > 1 else self._attempts[0]
        if isinstance(found, grpc.StatusCode):
            raise Failure(found)
        return dedup_pb2.BatchClaimTransactionsResponse(entries=found)


def claimed(stub: Stub, *ids: str, **policy: Any) -> dict[int, Any]:
    """Claim with short pauses, and return the answers by index."""
    limits = RetryPolicy(**{"first_backoff_s": 0.001, "max_backoff_s": 0.001} | policy)
    found: dict[int, Any] = {}
    for index, result in claim_batch(stub, requests(*ids), policy=limits):  # type: ignore[arg-type]
        assert index not in found
        found[index] = result
    return found


def test_only_failed_entries_are_repeated_with_their_tokens() -> None:
    """Entries with an answer or a final error are not repeated. Repeated attempts wait for a connection."""
    stub = Stub(
        [answer(), error(), error(after_ms=None, reason="STORE_REFUSED"), error()], [error(), answer()], [answer()]
    )
    found = claimed(stub, "a", "b", "c", "d")
    assert stub.calls == [(["a", "b", "c", "d"], False), (["b", "d"], True), (["b"], True)]
    assert [found[index].outcome for index in (0, 1, 3)] == [CLAIMED] * 3
    assert (type(found[2]), found[2].reason, found[2].message) == (Unavailable, "STORE_REFUSED", "away")
    assert all(len(tokens) == 1 for tokens in stub.tokens.values())


def test_answers_come_before_the_batch_is_repeated() -> None:
    """A caller that is interrupted later keeps the answers so far."""
    stub = Stub([answer(), error()], [answer()])
    answers: Iterator[tuple[int, object]] = claim_batch(stub, requests("a", "b"))  # type: ignore[arg-type]
    assert next(answers)[0] == 0
    assert len(stub.calls) == 1
    assert [index for index, _ in answers] == [1]


def test_a_failed_call_is_repeated_for_every_entry() -> None:
    """A lost connection concerns all entries."""
    stub = Stub(grpc.StatusCode.UNAVAILABLE, [answer(), answer(dedup_pb2.CLAIM_OUTCOME_DUPLICATE)])
    found = claimed(stub, "a", "b")
    assert [found[index].outcome for index in (0, 1)] == [CLAIMED, dedup_pb2.CLAIM_OUTCOME_DUPLICATE]


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED])
def test_a_final_failure_of_the_call_is_not_repeated(code: grpc.StatusCode) -> None:
    """Every entry receives the failure of the call."""
    stub = Stub(code)
    assert [found.code for found in claimed(stub, "a", "b").values()] == [code] * 2
    assert len(stub.calls) == 1


def test_attempts_and_budget_are_limited() -> None:
    """`max_attempts` limits the attempts, and without it the budget does. No attempt may outlast the budget."""
    stub = Stub(grpc.StatusCode.UNAVAILABLE)
    assert [found.code.name for found in claimed(stub, "a", max_attempts=4, budget_s=60).values()] == ["UNAVAILABLE"]
    assert [wait_for_ready for _, wait_for_ready in stub.calls] == [False, True, True, True]
    assert stub.timeouts == [1.0] * 4
    brief = Stub(grpc.StatusCode.UNAVAILABLE)
    claimed(brief, "a", budget_s=0.05)
    assert len(brief.calls) > 1
    assert max(brief.timeouts) <= 0.05


@pytest.mark.parametrize(
    ("attempts", "applied"),
    [(("no", "no"), "no"), (("unknown", "no"), "unknown"), (("no", "unknown"), "unknown")],
)
def test_doubt_of_one_attempt_remains(attempts: tuple[str, ...], applied: str) -> None:
    """`applied` covers all attempts of the entry."""
    stub = Stub(*[[error(each)] for each in attempts])
    assert claimed(stub, "a", max_attempts=2)[0].applied == applied


def test_a_timeout_does_not_hide_the_earlier_error() -> None:
    """An outage is reported as such, and the timeout of the last attempt makes it doubtful."""
    found = claimed(Stub([error()], grpc.StatusCode.DEADLINE_EXCEEDED), "a", max_attempts=2)[0]
    assert (found.code.name, found.reason, found.applied) == ("UNAVAILABLE", "STORE_TIMEOUT", "unknown")


@pytest.mark.parametrize("entry", [answer(0), answer(99), dedup_pb2.BatchClaimEntry()])
def test_an_unknown_outcome_is_never_a_claim(entry: dedup_pb2.BatchClaimEntry) -> None:
    """It is a CallFailed, so only CLAIMED means that the work may start."""
    found = claimed(Stub([entry]), "a")[0]
    assert isinstance(found, CallFailed)
    assert found.applied == "unknown"


def test_entries_of_another_number_answer_no_claim() -> None:
    """They cannot be matched to their claims."""
    found = claimed(Stub([answer()]), "a", "b")
    assert [each.reason for each in found.values()] == ["BATCH_BROKEN"] * 2


def test_a_claim_without_a_token_is_refused() -> None:
    """The service would generate one for each attempt."""
    with pytest.raises(ValueError, match="claim_token"):
        next(claim_batch(Stub([answer()]), [dedup_pb2.ClaimTransactionRequest(transaction_id="a")]))  # type: ignore[arg-type]


def test_an_empty_batch_makes_no_call() -> None:
    """The service would reject it."""
    stub = Stub([])
    assert claimed(stub) == {}
    assert stub.calls == []


def test_the_service_answers_a_batch(target: str, unique: str) -> None:
    """Against the real service: the same token receives CLAIMED again, another token is a duplicate."""
    with grpc.insecure_channel(target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        mine = requests(f"{unique}-1", f"{unique}-2")
        policy = RetryPolicy(budget_s=20, attempt_timeout_s=20)
        outcomes: Callable[[Any], list[Any]] = lambda batch: [  # noqa: E731 - A short name for three batches.
            getattr(result, "outcome", result)
            for _, result in sorted(claim_batch(stub, batch, policy=policy), key=lambda pair: pair[0])
        ]
        assert outcomes(mine) == outcomes(mine) == [CLAIMED] * 2
        assert outcomes(requests(f"{unique}-2")) == [dedup_pb2.CLAIM_OUTCOME_DUPLICATE]

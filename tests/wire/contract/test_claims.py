"""Claiming and looking up over real gRPC, on both stores."""

import time
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.errors import refused
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess

pytestmark = pytest.mark.every_engine

Stub = dedup_pb2_grpc.DedupServiceStub
Claim = dedup_pb2.ClaimTransactionRequest


def test_claimed_then_duplicate_with_the_holder(stub: Stub, unique: str) -> None:
    """The first claim is CLAIMED with a token; the second is DUPLICATE and shows the holder without its token."""
    before = time.time()
    first = stub.ClaimTransaction(Claim(transaction_id=unique, claimant="worker-1", ttl=Duration(seconds=30)))
    second = stub.ClaimTransaction(Claim(transaction_id=unique))
    assert first.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    assert 16 <= len(first.claim_token) <= 64
    assert second.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE
    assert second.claim_token == ""
    assert first.claim_token.encode() not in second.SerializeToString()
    assert second.transaction == first.transaction
    held = second.transaction
    assert (held.transaction_id, held.namespace, held.claimant) == (unique, "default", "worker-1")
    assert held.state == dedup_pb2.TRANSACTION_STATE_IN_PROGRESS
    assert before - 0.001 <= held.claim_time.ToNanoseconds() / 1e9 <= time.time()
    assert held.expire_time.ToMilliseconds() - held.claim_time.ToMilliseconds() == 30_000
    assert not held.HasField("completion_time")


def test_the_same_token_is_replayed(stub: Stub, unique: str) -> None:
    """A retry with its own token is CLAIMED again and says that it is a replay."""
    request = Claim(transaction_id=unique, claim_token="token-of-sixteen")
    first, again = stub.ClaimTransaction(request), stub.ClaimTransaction(request)
    assert (first.outcome, first.replayed) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, False)
    assert (again.outcome, again.replayed) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, True)
    assert again.claim_token == first.claim_token == "token-of-sixteen"


def test_another_fingerprint_is_a_mismatch(stub: Stub, unique: str) -> None:
    """The same id for other work is PAYLOAD_MISMATCH, without a token."""
    stub.ClaimTransaction(Claim(transaction_id=unique, payload_fingerprint=b"1" * 64))
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, payload_fingerprint=b"2"))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH
    assert reply.claim_token == ""
    assert reply.transaction.transaction_id == unique


def test_a_look_up_changes_nothing(stub: Stub, unique: str) -> None:
    """GetTransaction shows a claim without its token, and NOT_FOUND where there is none, and claims nothing."""
    answer = refused(lambda: stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique)))
    assert (answer.code, answer.reason, answer.applied) == (
        *(grpc.StatusCode.NOT_FOUND, "TRANSACTION_NOT_FOUND", "no"),
    )
    claimed = stub.ClaimTransaction(Claim(transaction_id=unique, namespace="pay"))
    assert claimed.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    found = stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique, namespace="pay"))
    assert found.transaction == claimed.transaction
    assert claimed.claim_token.encode() not in found.SerializeToString()


@pytest.mark.parametrize(
    "transaction_id", ["x", "é" * 256, "a b:c/d?e=f&g", "\u65e5\u672c", "e\u0301", "x" * 512], ids=range(6)
)
def test_ids_are_taken_byte_for_byte(stub: Stub, unique: str, transaction_id: str) -> None:
    """Any UTF-8 of 1 to 512 bytes without control characters is an id, and comes back as it was sent."""
    reply = stub.ClaimTransaction(Claim(transaction_id=transaction_id, namespace=unique))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    assert reply.transaction.transaction_id == transaction_id


def test_an_expire_time_is_kept_to_the_millisecond(stub: Stub, unique: str) -> None:
    """A claim until a moment shows that moment."""
    moment = Timestamp()
    moment.FromMilliseconds(int(time.time() * 1000) + 61_234)
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, expire_time=moment))
    assert reply.transaction.expire_time == moment


def hold(stub: Stub, unique: str, **fields: Any) -> str:
    """Claim an id and return the token."""
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, **fields))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    return str(reply.claim_token)


def test_complete_then_everybody_sees_the_result(stub: Stub, unique: str) -> None:
    """A completed transaction keeps its result; repeating that with token and result is fine."""
    token = hold(stub, unique, claimant="anna")
    request = dedup_pb2.CompleteTransactionRequest(
        transaction_id=unique, claim_token=token, result=b"paid \xff", ttl=Duration(seconds=90)
    )
    completed = stub.CompleteTransaction(request)
    assert completed.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
    done = completed.transaction
    assert (done.state, done.result, done.claimant) == (*(dedup_pb2.TRANSACTION_STATE_COMPLETED, b"paid \xff", "anna"),)
    assert done.expire_time.ToMilliseconds() - done.completion_time.ToMilliseconds() == 90_000
    assert stub.CompleteTransaction(request) == completed
    duplicate = stub.ClaimTransaction(Claim(transaction_id=unique, claim_token=token))
    assert (duplicate.outcome, duplicate.transaction) == (dedup_pb2.CLAIM_OUTCOME_DUPLICATE, done)
    for token_, result in ((token, b"other"), ("x" * 16, b"paid \xff")):
        request.claim_token, request.result = token_, result
        reply = stub.CompleteTransaction(request)
        assert (reply.outcome, reply.HasField("transaction")) == (dedup_pb2.COMPLETE_OUTCOME_NOT_HELD, False)


def test_release_then_the_next_one_wins(stub: Stub, unique: str) -> None:
    """A released transaction can be claimed at once, and the old token holds it no more."""
    request = dedup_pb2.ReleaseTransactionRequest(transaction_id=unique, claim_token=hold(stub, unique))
    assert stub.ReleaseTransaction(request).outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED
    hold(stub, unique)
    assert stub.ReleaseTransaction(request).outcome == dedup_pb2.RELEASE_OUTCOME_NOT_HELD


def test_extend_moves_the_end(stub: Stub, unique: str) -> None:
    """An extension shows the new end; one that would shorten leaves it, unless that is allowed."""
    token = hold(stub, unique, ttl=Duration(seconds=30))
    request = dedup_pb2.ExtendTransactionRequest(transaction_id=unique, claim_token=token, ttl=Duration(seconds=300))
    longer = stub.ExtendTransaction(request)
    assert longer.outcome == dedup_pb2.EXTEND_OUTCOME_EXTENDED
    lifetime_ms = longer.transaction.expire_time.ToMilliseconds() - longer.transaction.claim_time.ToMilliseconds()
    assert 300_000 <= lifetime_ms < 330_000
    request.ttl.FromSeconds(10)
    assert stub.ExtendTransaction(request) == longer
    request.allow_shortening = True
    shorter = stub.ExtendTransaction(request).transaction
    assert shorter.expire_time.ToMilliseconds() < longer.transaction.expire_time.ToMilliseconds()
    request.claim_token = "x" * 16
    assert stub.ExtendTransaction(request).outcome == dedup_pb2.EXTEND_OUTCOME_NOT_HELD


def test_a_batch_answers_each_entry_in_order(stub: Stub, unique: str) -> None:
    """A thousand entries are answered in order: claimed, duplicate of an earlier one, and refused each alone."""
    requests = [Claim(transaction_id=f"{unique}-{number}", claimant=str(number)) for number in range(997)]
    requests += [
        Claim(transaction_id=f"{unique}-3", claimant="again"),
        Claim(transaction_id=f"{unique}-x", ttl=Duration()),
        Claim(transaction_id=f"{unique}-y", wait=Duration(seconds=1)),
    ]
    entries = stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=requests)).entries
    assert len(entries) == 1_000
    for number, entry in enumerate(entries[:997]):
        assert entry.response.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        assert entry.response.transaction.claimant == str(number)
    assert entries[997].response.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE
    assert entries[997].response.transaction == entries[3].response.transaction
    for entry, field in ((entries[998], "ttl"), (entries[999], "wait")):
        assert entry.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        assert entry.error.details[0].Unpack(info)
        assert entry.error.details[1].Unpack(bad)
        assert (info.reason, info.metadata["applied"]) == ("INVALID_REQUEST", "no")
        assert [violation.field for violation in bad.field_violations] == [field]
    missing = dedup_pb2.GetTransactionRequest(transaction_id=f"{unique}-x")
    assert refused(lambda: stub.GetTransaction(missing)).code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("size", [0, 1_001])
def test_a_batch_has_a_size(stub: Stub, unique: str, size: int) -> None:
    """No entry, or more than a thousand, is refused as a whole and claims nothing."""
    batch = dedup_pb2.BatchClaimTransactionsRequest(requests=[Claim(transaction_id=unique)] * size)
    answer = refused(lambda: stub.BatchClaimTransactions(batch))
    assert (answer.code, list(answer.violations)) == (grpc.StatusCode.INVALID_ARGUMENT, ["requests"])
    hold(stub, unique)


def test_waiting_ends_before_the_deadline_does(stub: Stub, unique: str) -> None:
    """A wait that is longer than the caller's deadline is cut, so that the answer still arrives."""
    hold(stub, unique)
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, wait=Duration(seconds=300)), timeout=4)
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE


def test_of_fifty_waiters_on_a_released_claim_exactly_one_wins(stub: Stub, unique: str) -> None:
    """Fifty calls wait on one id; when it is released one of them is CLAIMED, and the others hear its result."""
    release = dedup_pb2.ReleaseTransactionRequest(transaction_id=unique, claim_token=hold(stub, unique))
    request = Claim(transaction_id=unique, wait=Duration(seconds=60))
    waiters = [stub.ClaimTransaction.future(request, timeout=30) for _ in range(50)]
    assert stub.ReleaseTransaction(release).outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED

    def winners() -> list[dedup_pb2.ClaimTransactionResponse]:
        answered = [waiter.result() for waiter in waiters if waiter.done()]
        return [reply for reply in answered if reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED]

    wait_until(winners, what="a winner")
    complete = dedup_pb2.CompleteTransactionRequest(
        transaction_id=unique, claim_token=winners()[0].claim_token, result=b"paid"
    )
    assert stub.CompleteTransaction(complete).outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
    replies = [waiter.result() for waiter in waiters]
    outcomes = [reply.outcome for reply in replies]
    assert outcomes.count(dedup_pb2.CLAIM_OUTCOME_CLAIMED) == 1
    duplicates = [reply for reply in replies if reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE]
    assert {reply.transaction.result for reply in duplicates} == {b"paid"}
    assert len(duplicates) == 49


def test_no_token_leaks_through_any_reply(service: ServiceProcess, stub: Stub, unique: str) -> None:
    """Whatever others ask about a transaction, neither reply, error nor log shows its token."""
    token = f"secret-{unique}"
    hold(stub, unique, claim_token=token)
    seen: list[bytes] = []
    for state in ("in progress", "completed"):
        seen += [
            stub.ClaimTransaction(Claim(transaction_id=unique)).SerializeToString(),
            stub.ClaimTransaction(Claim(transaction_id=unique, payload_fingerprint=b"x")).SerializeToString(),
            stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique)).SerializeToString(),
            stub.BatchClaimTransactions(
                dedup_pb2.BatchClaimTransactionsRequest(requests=[Claim(transaction_id=unique)])
            ).SerializeToString(),
        ]
        if state == "in progress":
            completed = stub.CompleteTransaction(
                dedup_pb2.CompleteTransactionRequest(transaction_id=unique, claim_token=token)
            )
            seen.append(completed.SerializeToString())
    stub.ReleaseTransaction(dedup_pb2.ReleaseTransactionRequest(transaction_id=unique, claim_token=token))
    too_long = dedup_pb2.ExtendTransactionRequest(transaction_id=unique, claim_token=token * 3)
    seen.append(repr(refused(lambda: stub.ExtendTransaction(too_long))).encode())
    assert not [reply for reply in seen if token.encode() in reply]
    assert not [line for line in service.stderr_lines if token in line]

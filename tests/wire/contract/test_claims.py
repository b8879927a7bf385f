"""Every rpc over real gRPC, on both stores: outcomes, batches, waits, and token secrecy."""

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


def test_a_duplicate_shows_the_holder(stub: Stub, unique: str) -> None:
    """The first claim receives CLAIMED and a token; the second receives DUPLICATE and the holder without its token."""
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


def test_a_retry_with_the_same_token_is_a_replay(stub: Stub, unique: str) -> None:
    """A retry with its own token receives CLAIMED again, with `replayed` set."""
    request = Claim(transaction_id=unique, claim_token="token-of-sixteen")
    first, again = stub.ClaimTransaction(request), stub.ClaimTransaction(request)
    assert (first.outcome, first.replayed) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, False)
    assert (again.outcome, again.replayed) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, True)
    assert again.claim_token == first.claim_token == "token-of-sixteen"


def test_another_fingerprint_is_a_mismatch(stub: Stub, unique: str) -> None:
    """The same id with another fingerprint receives PAYLOAD_MISMATCH and no token."""
    stub.ClaimTransaction(Claim(transaction_id=unique, payload_fingerprint=b"1" * 64))
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, payload_fingerprint=b"2"))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH
    assert reply.claim_token == ""
    assert reply.transaction.transaction_id == unique


def test_a_look_up_changes_nothing(stub: Stub, unique: str) -> None:
    """GetTransaction returns a claim without its token or NOT_FOUND, and claims nothing."""
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
    """Any UTF-8 of 1 to 512 bytes without control characters is a valid id and is returned unchanged."""
    reply = stub.ClaimTransaction(Claim(transaction_id=transaction_id, namespace=unique))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    assert reply.transaction.transaction_id == transaction_id


def test_an_expire_time_is_kept_to_the_millisecond(stub: Stub, unique: str) -> None:
    """The reply carries the requested expire_time."""
    moment = Timestamp()
    moment.FromMilliseconds(int(time.time() * 1000) + 61_234)
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, expire_time=moment))
    assert reply.transaction.expire_time == moment


def hold(stub: Stub, unique: str, **fields: Any) -> str:
    """Claim an id and return the token."""
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, **fields))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    return str(reply.claim_token)


def test_completion_stores_the_result(stub: Stub, unique: str) -> None:
    """Duplicates receive the stored result, and completing again with the same token and result succeeds."""
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


def test_a_released_id_can_be_claimed(stub: Stub, unique: str) -> None:
    """A released id can be claimed at once, and the old token no longer holds it."""
    request = dedup_pb2.ReleaseTransactionRequest(transaction_id=unique, claim_token=hold(stub, unique))
    assert stub.ReleaseTransaction(request).outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED
    hold(stub, unique)
    assert stub.ReleaseTransaction(request).outcome == dedup_pb2.RELEASE_OUTCOME_NOT_HELD


def test_extend_moves_the_expiry(stub: Stub, unique: str) -> None:
    """An extension returns the new expiry; it shortens the claim only with `allow_shortening`."""
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
    """A thousand entries are answered in order; an invalid entry fails alone."""
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
def test_a_batch_has_1_to_1000_entries(stub: Stub, unique: str, size: int) -> None:
    """A batch of no entries, or of more than a thousand, is rejected as a whole and claims nothing."""
    batch = dedup_pb2.BatchClaimTransactionsRequest(requests=[Claim(transaction_id=unique)] * size)
    answer = refused(lambda: stub.BatchClaimTransactions(batch))
    assert (answer.code, list(answer.violations)) == (grpc.StatusCode.INVALID_ARGUMENT, ["requests"])
    hold(stub, unique)


def test_a_wait_ends_before_the_deadline(stub: Stub, unique: str) -> None:
    """A wait longer than the caller's deadline is shortened so that the reply still arrives."""
    hold(stub, unique)
    reply = stub.ClaimTransaction(Claim(transaction_id=unique, wait=Duration(seconds=300)), timeout=4)
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE


def test_a_wait_above_the_maximum_needs_a_near_deadline(stub: Stub, unique: str) -> None:
    """A wait above 5 minutes is rejected, unless the deadline of the call cuts it to that or less."""
    hold(stub, unique)
    request = Claim(transaction_id=unique, wait=Duration(seconds=3_600))
    assert stub.ClaimTransaction(request, timeout=4).outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE
    too_long = {"wait": "is longer than the maximum of 300s: shorten it, or set a deadline of at most 300s"}
    for answer in (
        refused(lambda: stub.ClaimTransaction(request)),
        refused(lambda: stub.ClaimTransaction(request, timeout=600)),
    ):
        assert (answer.code, answer.violations) == (grpc.StatusCode.INVALID_ARGUMENT, too_long)


def test_one_of_fifty_waiters_wins_a_released_claim(stub: Stub, unique: str) -> None:
    """Fifty calls wait on one id: after the release one receives CLAIMED, and the others receive its result."""
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


def test_tokens_never_leak(service: ServiceProcess, stub: Stub, unique: str) -> None:
    """No reply, error or log line shows another caller's token."""
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

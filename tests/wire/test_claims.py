"""Claiming and looking up over real gRPC, on both stores."""

import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from harness.errors import refused

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


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("CompleteTransaction", dedup_pb2.CompleteTransactionRequest),
        ("ReleaseTransaction", dedup_pb2.ReleaseTransactionRequest),
        ("ExtendTransaction", dedup_pb2.ExtendTransactionRequest),
        ("BatchClaimTransactions", dedup_pb2.BatchClaimTransactionsRequest),
    ],
)
def test_what_is_not_served_yet_says_so(stub: Stub, method: str, request_type: type) -> None:
    """The rest of the contract is UNIMPLEMENTED, and certainly changed nothing."""
    answer = refused(lambda: getattr(stub, method)(request_type()))
    assert (answer.code, answer.reason, answer.applied) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_SERVED", "no")


def test_waiting_is_refused_rather_than_ignored(stub: Stub, unique: str) -> None:
    """A claim that asks to wait is refused, since answering at once would be another answer than it asked for."""
    request = Claim(transaction_id=unique, wait=Duration(seconds=1))
    assert refused(lambda: stub.ClaimTransaction(request)).code is grpc.StatusCode.UNIMPLEMENTED
    assert refused(lambda: stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique)))

"""The service over Redis Cluster and with `--min-replicas`, as its callers see it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.cluster import ClusterDeployment
from tests.support.errors import refused
from tests.support.processes import RedisProcess, ServiceProcess

Claim = dedup_pb2.ClaimTransactionRequest
StartService = Callable[..., ServiceProcess]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ClusterDeployment]:
    """A cluster of three masters without replicas."""
    deployment = ClusterDeployment(tmp_path, replicas=False)
    try:
        yield deployment.start()
    finally:
        deployment.stop()


def test_a_batch_is_split_by_node(start_service: StartService, cluster: ClusterDeployment, unique: str) -> None:
    """Entries on three nodes are answered in order, and only the entries of a lost node fail.

    Protection: each entry goes to the node of its key.
    """
    service = start_service("--store-url", cluster.url, "--store-timeout", "500ms")
    requests = [Claim(transaction_id=f"{unique}-{number}", claimant="me") for number in range(60)]
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        for outcome in (dedup_pb2.CLAIM_OUTCOME_CLAIMED, dedup_pb2.CLAIM_OUTCOME_DUPLICATE):
            batch = stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=requests))
            assert [entry.response.outcome for entry in batch.entries] == [outcome] * 60
            assert [e.response.transaction.transaction_id for e in batch.entries] == [
                r.transaction_id for r in requests
            ]
        cluster.masters[2].stop()
        batch = stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=requests))
    answered = [entry for entry in batch.entries if entry.HasField("response")]
    assert {entry.response.outcome for entry in answered} == {dedup_pb2.CLAIM_OUTCOME_DUPLICATE}
    assert 0 < len(answered) < 60
    assert {entry.error.code for entry in batch.entries if entry.HasField("error")} == {
        grpc.StatusCode.UNAVAILABLE.value[0]
    }


def test_claims_fail_without_the_required_replica(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """Without the replica that `--min-replicas` requires, no claim succeeds, and start-up logs a critical finding.

    Protection: WAIT.
    """
    service = start_service("--store-url", redis_server.url, "--min-replicas", "1", "--store-timeout", "200ms")
    assert [line["check"] for line in service.events("store_finding_reported") if line["severity"] == "critical"].count(
        "replicas"
    ) == 1
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        answer = refused(lambda: stub.ClaimTransaction(Claim(transaction_id=unique)))
    assert (answer.code, answer.reason, answer.applied) == (
        *(grpc.StatusCode.UNAVAILABLE, "STORE_NOT_REPLICATED", "unknown"),
    )
    assert answer.retry_after_ms

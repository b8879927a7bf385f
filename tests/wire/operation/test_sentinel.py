"""A Sentinel failover as the callers of the service see it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess
from tests.support.sentinel import SentinelDeployment

MINE = "token-of-the-first"
OTHER = "token-of-another"
RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
IDS = 10


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[SentinelDeployment]:
    """A master, its replica and three Sentinels."""
    deployment = SentinelDeployment(tmp_path)
    try:
        yield deployment.start()
    finally:
        deployment.stop()


def test_replicated_claims_survive_a_failover(
    start_service: Callable[..., ServiceProcess], deployment: SentinelDeployment, unique: str
) -> None:
    """After the master is killed, replicated claims keep their holders, errors are retryable, and health recovers.

    Protection: the store asks the Sentinels for the master before every connection.
    """
    service = start_service("--store-url", deployment.url)
    with service.channel() as channel:
        stub, health = dedup_pb2_grpc.DedupServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        errors: set[grpc.StatusCode] = set()

        def claim(number: int, token: str) -> dedup_pb2.ClaimTransactionResponse:
            request = dedup_pb2.ClaimTransactionRequest(transaction_id=f"{unique}-{number}", claim_token=token)
            replies: list[dedup_pb2.ClaimTransactionResponse] = []

            def answered() -> bool:
                try:
                    replies.append(stub.ClaimTransaction(request, timeout=5))
                except grpc.RpcError as error:
                    errors.add(error.code())
                return bool(replies)

            wait_until(answered, what="an answer")
            return replies[0]

        def health_is(status: "health_pb2.HealthCheckResponse.ServingStatus") -> bool:
            return bool(health.Check(health_pb2.HealthCheckRequest()).status == status)

        for number in range(IDS):
            assert claim(number, MINE).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        assert not errors
        deployment.replicate()
        deployment.master.stop()
        for number in range(IDS):
            other, mine = claim(number, OTHER), claim(number, MINE)
            assert other.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE
            assert (mine.outcome, mine.replayed, mine.claim_token) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, True, MINE)
        assert errors <= RETRYABLE
        wait_until(lambda: health_is(health_pb2.HealthCheckResponse.SERVING), what="health to say SERVING")

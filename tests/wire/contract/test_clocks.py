"""Expire times while the clock of the service jumps: the clock of the store decides."""

from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.claims import system_clock_ms
from tests.support.errors import refused
from tests.support.processes import RedisProcess, ServiceProcess

pytestmark = pytest.mark.every_engine

Claim = dedup_pb2.ClaimTransactionRequest
CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED
HOUR_MS = 3_600_000


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
@pytest.mark.parametrize("jump_ms", [-30_000, 30_000], ids=["back", "ahead"])
def test_an_expire_time_is_judged_by_the_clock_of_redis(
    start_service: Callable[..., ServiceProcess],
    redis_server: RedisProcess,
    redis_client: redis.Redis,
    tmp_path: Path,
    unique: str,
    *,
    jump_ms: int,
    layout: str,
) -> None:
    """After the clock of the service jumps, no claim is CLAIMED and not kept, and the limit of the ttl holds.

    Protection: Redis compares the expire time with its own clock in the command that claims.
    """
    shift = tmp_path / "shift"
    shift.write_text("0")
    service = start_service(
        *("--store-url", redis_server.url, "--key-layout", layout, "--max-ttl", "1h"),
        command=("tests.support.shifted_clock",),
        environment={"SHIFT_FILE": str(shift)},
    )

    def claim_of(name: str, ahead_ms: int) -> Claim:
        moment = Timestamp()
        moment.FromMilliseconds(system_clock_ms() + ahead_ms)
        return Claim(transaction_id=f"{unique}-{name}", expire_time=moment)

    def kept(claim: Claim) -> int:
        prefix = "" if layout == "raw" else "dedup:default:"
        return int(redis_client.pexpiretime(f"{prefix}{claim.transaction_id}"))

    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        shift.write_text(str(jump_ms))
        # At once, and often: a check of the clocks every now and then would come too late.
        for number in range(50):
            past = claim_of(f"past-{number}", -10_000)
            answer = refused(lambda past=past: stub.ClaimTransaction(past))  # type: ignore[misc]
            assert (answer.reason, answer.applied, list(answer.violations)) == (
                "INVALID_REQUEST",
                "no",
                ["expire_time"],
            )
            assert kept(past) == -2
        far = claim_of("far", HOUR_MS + 20_000)
        assert "maximum ttl of 1h" in refused(lambda: stub.ClaimTransaction(far)).message
        good = [claim_of("soon", 20_000), claim_of("late", HOUR_MS - 20_000)]
        for claim in good:
            reply = stub.ClaimTransaction(claim)
            assert (reply.outcome, reply.transaction.expire_time) == (CLAIMED, claim.expire_time)
            assert kept(claim) == claim.expire_time.ToMilliseconds()
        batch = [claim_of("past-b", -10_000), claim_of("soon-b", 20_000), claim_of("far-b", HOUR_MS + 20_000)]
        entries = stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=batch)).entries
        assert [entry.response.outcome for entry in entries] == [0, CLAIMED, 0]
        assert [kept(claim) > 0 for claim in batch] == [False, True, False]
    for claim in (*good, *batch):
        redis_client.delete(claim.transaction_id)

"""Two services on one store race a completion against the expiry of its claim."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.processes import RedisProcess, ServiceProcess

TTL_MS = 40
AT_LEAST, AT_MOST = 40, 400


@pytest.mark.parametrize("kind", ["redis", "sqlite"])
async def test_a_completion_and_the_next_claim_never_both_win(
    start_service: Callable[..., ServiceProcess], redis_server: RedisProcess, tmp_path: Path, unique: str, kind: str
) -> None:
    """Either the completion is in time and others see its result, or the next claim wins and completing fails.

    Protection: the token is compared and the value replaced in one atomic step.
    """
    url = redis_server.url if kind == "redis" else f"sqlite://{tmp_path / 'claims.db'}"
    first, second = await asyncio.gather(*(asyncio.to_thread(start_service, "--store-url", url) for _ in range(2)))
    chance = random.Random(20251128)
    wins: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(first.target) as one, grpc.aio.insecure_channel(second.target) as two:
        holder, rival = dedup_pb2_grpc.DedupServiceStub(one), dedup_pb2_grpc.DedupServiceStub(two)

        async def complete(transaction_id: str, token: str) -> bool:
            # A random moment around the expiry of the claim.
            await asyncio.sleep(chance.uniform(TTL_MS - 8, TTL_MS + 4) / 1_000)
            reply = await holder.CompleteTransaction(
                dedup_pb2.CompleteTransactionRequest(transaction_id=transaction_id, claim_token=token, result=b"paid")
            )
            return reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED

        async def claim_or_see_the_end(transaction_id: str) -> bool:
            while True:
                request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id)
                reply = await rival.ClaimTransaction(request)
                if reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED:
                    return True
                if reply.transaction.state == dedup_pb2.TRANSACTION_STATE_COMPLETED:
                    return False

        for number in range(AT_MOST):
            transaction_id = f"{unique}-{number}"
            request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id)
            request.ttl.FromMilliseconds(TTL_MS)
            token = (await holder.ClaimTransaction(request)).claim_token
            completed, claimed = await asyncio.gather(
                complete(transaction_id, token), claim_or_see_the_end(transaction_id)
            )
            assert completed != claimed
            wins["completion" if completed else "claim"] += 1
            if number >= AT_LEAST and min(wins["completion"], wins["claim"]) >= 5:
                return
    raise AssertionError(f"no race occurred: {wins}")

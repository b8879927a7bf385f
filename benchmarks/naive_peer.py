"""A naive implementation for comparison: grpc.server with ten threads and redis-py.

It serves ClaimTransaction of the same contract. `setnx` claims with one atomic command, `get-then-set` with two, the
original defect. Tokens are ignored: a retry receives DUPLICATE, and duplicates learn nothing about the holder.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import redis

from dedup.v1 import dedup_pb2, dedup_pb2_grpc

TTL_MS = 60_000

Admit = Callable[[str], bool]


class NaivePeer(dedup_pb2_grpc.DedupServiceServicer):
    """Serves ClaimTransaction only."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit

    def ClaimTransaction(  # noqa: N802 - the contract's name
        self, request: dedup_pb2.ClaimTransactionRequest, _: grpc.ServicerContext
    ) -> dedup_pb2.ClaimTransactionResponse:
        """Claim one transaction."""
        admitted = self._admit(f"naive:{request.transaction_id}")
        return dedup_pb2.ClaimTransactionResponse(
            outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED if admitted else dedup_pb2.CLAIM_OUTCOME_DUPLICATE,
            transaction=dedup_pb2.Transaction(transaction_id=request.transaction_id),
        )


def setnx(client: redis.Redis) -> Admit:
    """Claim with one atomic command."""
    return lambda key: bool(client.set(key, "1", nx=True, px=TTL_MS))


def get_then_set(client: redis.Redis) -> Admit:
    """Claim with two commands: a race."""

    def admit(key: str) -> bool:
        if client.get(key) is not None:
            return False
        client.set(key, "1", px=TTL_MS)
        return True

    return admit


VARIANTS = {"setnx": setnx, "get-then-set": get_then_set}


def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", choices=sorted(VARIANTS), required=True)
    parser.add_argument("--listen", required=True, help="host:port")
    parser.add_argument("--redis", required=True, help="URL")
    options = parser.parse_args()
    server = grpc.server(ThreadPoolExecutor(max_workers=10))
    admit = VARIANTS[options.variant](redis.Redis.from_url(options.redis))
    peer = NaivePeer(admit)  # type: ignore[abstract] # the other rpcs answer UNIMPLEMENTED
    dedup_pb2_grpc.add_DedupServiceServicer_to_server(peer, server)
    server.add_insecure_port(options.listen)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()

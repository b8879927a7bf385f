"""Whether the answers are right: a service that is fast and wrong is not measured."""

from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import grpc

from benchmarks.load import ConstantAnswer
from benchmarks.servers import CannotMeasure
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

CLAIM = "/dedup.v1.DedupService/ClaimTransaction"
NOOP = "/dedup.benchmark.Noop/Call"
_TIMEOUT_S = 5.0
# More than a measurement takes, so that the claim does not end under it.
_HOT_TTL_S = 3_600
_TOKEN = "benchmark-token-of-one-caller"  # noqa: S105 - names an attempt
_RIVALS = 16
_CONNECTIONS = 4


def noop(transaction_id: str) -> ConstantAnswer:
    """Return a claim for the no-op, which answers nothing."""
    return ConstantAnswer(_hot_claim(transaction_id, retry=False).SerializeToString(), 0)


@contextmanager
def claimed(target: str, transaction_id: str, *, retry: bool) -> Iterator[ConstantAnswer]:
    """Claim the id, learn what later callers are told, and see at the end that they would still be told the same.

    Exactly one call is told CLAIMED, the one made here; those that follow are told DUPLICATE, or, as retries with its
    token, CLAIMED and replayed. Raises CannotMeasure when they are not.
    """
    with grpc.insecure_channel(target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        request = _hot_claim(transaction_id, retry=retry)
        first = stub.ClaimTransaction(request, timeout=_TIMEOUT_S)
        if first.outcome != dedup_pb2.CLAIM_OUTCOME_CLAIMED or first.replayed:
            raise CannotMeasure(f"{target}: the first claim of {transaction_id} was told {first}")
        later = stub.ClaimTransaction(request, timeout=_TIMEOUT_S)
        expected = dedup_pb2.CLAIM_OUTCOME_CLAIMED if retry else dedup_pb2.CLAIM_OUTCOME_DUPLICATE
        if later.outcome != expected or later.replayed != retry:
            raise CannotMeasure(f"{target}: a later claim of {transaction_id} was told {later}")
        yield ConstantAnswer(request.SerializeToString(), later.ByteSize())
        last = stub.ClaimTransaction(request, timeout=_TIMEOUT_S)
        if last != later:
            raise CannotMeasure(f"{target}: a claim of {transaction_id} was told {later} before and {last} after")


async def doubly_claimed(target: str, run: str, ids: int) -> int:
    """Let 16 callers claim each of as many ids at once, and return how many ids were not CLAIMED exactly once."""
    async with AsyncExitStack() as stack:
        stubs = []
        for number in range(_CONNECTIONS):
            # Without an option that tells them apart, channels to one address share their connection.
            channel = grpc.aio.insecure_channel(target, options=(("dedup.benchmark", number),))
            stubs.append(dedup_pb2_grpc.DedupServiceStub(await stack.enter_async_context(channel)))

        async def race(number: int) -> bool:
            request = dedup_pb2.ClaimTransactionRequest(transaction_id=f"{run}:{number}")
            calls = [stub.ClaimTransaction(request, timeout=_TIMEOUT_S) for stub in stubs * (_RIVALS // _CONNECTIONS)]
            replies = [await call for call in calls]
            return [reply.outcome for reply in replies].count(dedup_pb2.CLAIM_OUTCOME_CLAIMED) == 1

        return [await race(number) for number in range(ids)].count(False)


def _hot_claim(transaction_id: str, *, retry: bool) -> dedup_pb2.ClaimTransactionRequest:
    """Return a claim of the one id that all callers claim; a retry brings the token of its holder."""
    request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id, claimant="benchmark")
    request.ttl.FromSeconds(_HOT_TTL_S)
    if retry:
        request.claim_token = _TOKEN
    return request

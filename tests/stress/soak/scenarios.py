"""The scenarios: short sequences of calls, each checked against the contract."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from dedup.v1 import dedup_pb2
from tests.stress.soak.calls import DOUBT, TTL_MS, Caller, of_ms, outcome_of

Scenario = Callable[[Caller], Awaitable[None]]

CLAIMED, DUPLICATE = "CLAIMED", "DUPLICATE"
_BATCH = 20
_DOUBT_CODES = {code.value[0] for code in DOUBT}


async def life(caller: Caller) -> None:
    """Claim, claim as another, repeat, extend, get, complete, and claim as another again."""
    transaction_id, token, result = caller.new_id(), caller.new_id(), caller.rng.randbytes(100)
    first = await caller.claim(transaction_id, token)
    caller.expect(outcome_of(first), CLAIMED, "a first claim")
    caller.expect(first.claim_token, token, "its token")
    other = await caller.claim(transaction_id, caller.new_id())
    caller.expect((outcome_of(other), other.transaction.claimant), (DUPLICATE, token), "a claim by another")
    again = await caller.claim(transaction_id, token)
    caller.expect((outcome_of(again), again.replayed), (CLAIMED, True), "a repeated claim")
    extended = await caller.hold("ExtendTransaction", transaction_id, token, ttl=of_ms(2 * TTL_MS))
    caller.expect(outcome_of(extended), "EXTENDED", "an extension")
    found = await caller.ask("GetTransaction", dedup_pb2.GetTransactionRequest(transaction_id=transaction_id))
    caller.expect(found.transaction.claimant, token, "the holder")
    completed = await caller.hold("CompleteTransaction", transaction_id, token, result=result, ttl=of_ms(TTL_MS))
    caller.expect(outcome_of(completed), "COMPLETED", "a completion")
    late = await caller.claim(transaction_id, caller.new_id())
    caller.expect((outcome_of(late), late.transaction.result), (DUPLICATE, result), "a claim after completion")


async def release(caller: Caller) -> None:
    """Claim with a fingerprint, claim with another payload, release, and claim as another."""
    transaction_id, token, next_token = caller.new_id(), caller.new_id(), caller.new_id()
    first = await caller.claim(transaction_id, token, fingerprint=b"a")
    caller.expect(outcome_of(first), CLAIMED, "a first claim")
    other = await caller.claim(transaction_id, next_token, fingerprint=b"b")
    caller.expect(outcome_of(other), "PAYLOAD_MISMATCH", "another payload")
    wrong = await caller.hold("ReleaseTransaction", transaction_id, next_token)
    caller.expect(outcome_of(wrong), "NOT_HELD", "a release by another")
    released = await caller.hold("ReleaseTransaction", transaction_id, token)
    # A retry of a release whose reply was lost receives NOT_HELD.
    if not (caller.doubted and outcome_of(released) == "NOT_HELD"):
        caller.expect(outcome_of(released), "RELEASED", "a release")
    caller.expect(outcome_of(await caller.claim(transaction_id, next_token)), CLAIMED, "a claim after a release")


async def wait(caller: Caller) -> None:
    """Wait as a duplicate until the holder completes, and receive its result."""
    transaction_id, token = caller.new_id(), caller.new_id()
    caller.expect(outcome_of(await caller.claim(transaction_id, token)), CLAIMED, "a first claim")
    waiting = asyncio.create_task(caller.claim(transaction_id, caller.new_id(), wait_ms=4_000))
    await asyncio.sleep(caller.rng.uniform(0, 0.1))
    await caller.hold("CompleteTransaction", transaction_id, token, result=b"done", ttl=of_ms(TTL_MS))
    reply = await waiting
    caller.expect(outcome_of(reply), DUPLICATE, "a claim that waited")
    if not caller.doubted:
        caller.expect(reply.transaction.result, b"done", "its result")


async def race(caller: Caller) -> None:
    """Make ten concurrent claims: exactly one wins."""
    transaction_id, tokens = caller.new_id(), [caller.new_id() for _ in range(10)]
    replies = await asyncio.gather(*(caller.claim(transaction_id, token) for token in tokens))
    winners = [outcome_of(reply) for reply in replies].count(CLAIMED)
    caller.expect(winners, 1, "the winners of a race")


async def batch(caller: Caller) -> None:
    """Claim a batch with a duplicate and an invalid entry: each entry is answered independently and in order."""
    tokens = [caller.new_id() for _ in range(_BATCH)]
    requests = [_claim_of(caller, token) for token in tokens]
    requests.append(dedup_pb2.ClaimTransactionRequest(transaction_id=requests[0].transaction_id))
    requests.append(dedup_pb2.ClaimTransactionRequest(transaction_id="\n"))
    request = dedup_pb2.BatchClaimTransactionsRequest(requests=requests)
    while True:
        reply = await caller.ask("BatchClaimTransactions", request)
        *claims, duplicate, bad = reply.entries
        if not any(entry.error.code in _DOUBT_CODES for entry in reply.entries):
            break
        await asyncio.sleep(0.1)
    caller.expect([outcome_of(entry.response) for entry in claims], [CLAIMED] * _BATCH, "claims of a batch")
    caller.expect([entry.response.claim_token for entry in claims], tokens, "their tokens")
    caller.expect(outcome_of(duplicate.response), DUPLICATE, "the duplicate of a batch")
    caller.expect(bad.error.code, grpc.StatusCode.INVALID_ARGUMENT.value[0], "the invalid entry of a batch")


async def invalid_requests(caller: Caller) -> None:
    """Send an invalid request to each rpc."""
    bad: list[tuple[str, Any]] = [
        ("ClaimTransaction", dedup_pb2.ClaimTransactionRequest(transaction_id="x" * 513)),
        ("ClaimTransaction", dedup_pb2.ClaimTransactionRequest(transaction_id="x", claim_token="short")),
        ("CompleteTransaction", dedup_pb2.CompleteTransactionRequest(transaction_id="x")),
        ("ReleaseTransaction", dedup_pb2.ReleaseTransactionRequest(claim_token="t" * 16)),
        ("ExtendTransaction", dedup_pb2.ExtendTransactionRequest(transaction_id="x", claim_token="t" * 16, ttl={})),
        ("BatchClaimTransactions", dedup_pb2.BatchClaimTransactionsRequest()),
    ]
    for method, request in bad:
        code = await caller.rejected(method, request)
        caller.expect(code, grpc.StatusCode.INVALID_ARGUMENT, f"an invalid {method}")
    unclaimed = dedup_pb2.GetTransactionRequest(transaction_id=caller.new_id())
    caller.expect(await caller.rejected("GetTransaction", unclaimed), grpc.StatusCode.NOT_FOUND, "an unclaimed id")


async def cancel(caller: Caller) -> None:
    """Cancel claims, then claim with the same token: CLAIMED, whether or not they took effect."""
    await _give_up(caller, lambda request: caller.try_once(request, cancel_after_s=caller.rng.uniform(0, 0.005)))


async def deadline(caller: Caller) -> None:
    """Claim with deadlines too near, then claim with the same token."""
    await _give_up(caller, lambda request: caller.try_once(request, deadline_s=caller.rng.uniform(0.0005, 0.02)))


async def _give_up(caller: Caller, attempt: Callable[[Any], Awaitable[None]]) -> None:
    token = caller.new_id()
    request = _claim_of(caller, token)
    for _ in range(5):
        await attempt(request)
    reply = await caller.ask("ClaimTransaction", request)
    caller.expect((outcome_of(reply), reply.claim_token), (CLAIMED, token), "a claim after giving up")


def _claim_of(caller: Caller, token: str) -> Any:
    return dedup_pb2.ClaimTransactionRequest(transaction_id=caller.new_id(), claim_token=token, ttl=of_ms(TTL_MS))


# Relative frequency of each scenario.
SCENARIOS: dict[Scenario, int] = {
    life: 8,
    release: 4,
    wait: 2,
    race: 2,
    batch: 2,
    invalid_requests: 1,
    cancel: 2,
    deadline: 1,
}

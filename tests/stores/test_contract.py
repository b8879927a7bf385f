"""The contract suite: the same cases over every store."""

import asyncio

import pytest

from dedup_service.claims import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    ClaimStore,
    InvalidRequest,
    Policies,
    Policy,
    RequestedExpiry,
    StoreUnavailable,
    TransactionNotFound,
    TransactionState,
    system_clock_ms,
)
from tests.support.claims import MINUTE, a_claim, end_of, lasting
from tests.support.polling import eventually

POLICY = Policy(default_ttl_ms=60_000, max_ttl_ms=86_400_000, retention_ms=3_600_000)


@pytest.fixture
def claims(store: ClaimStore) -> ClaimService:
    """The claim semantics over the store."""
    return ClaimService(store, Policies(POLICY))


async def test_the_first_claim_is_stored_and_the_second_meets_it(store: ClaimStore, unique: str) -> None:
    """`claim` returns None when it stored the claim, and otherwise the holder with every field."""
    first = a_claim(unique, claimant="worker-1", payload_fingerprint=b"\x00\xff")
    assert await store.claim(first, MINUTE) is None
    assert await store.claim(a_claim(unique, token="another-token-16"), MINUTE) == first
    assert await store.get("default", unique) == first


async def test_of_many_concurrent_claims_one_is_stored(store: ClaimStore, unique: str) -> None:
    """Of 90 concurrent claims of one id exactly one is stored, and all others receive it as the holder."""
    contenders = [a_claim(unique, token=f"token-number-{number:04}") for number in range(90)]
    holders = await asyncio.gather(*(store.claim(contender, MINUTE) for contender in contenders))
    winners = [contender for contender, holder in zip(contenders, holders, strict=True) if holder is None]
    assert len(winners) == 1
    assert {holder for holder in holders if holder is not None} == set(winners)


async def test_every_answer_reaches_its_own_caller(store: ClaimStore, unique: str) -> None:
    """Concurrent claims and look-ups of different ids never receive each other's answers."""
    held = [a_claim(f"{unique}-{number}", token=f"token-number-{number:04}") for number in range(50)]
    await asyncio.gather(*(store.claim(claim, MINUTE) for claim in held))
    again = [store.claim(claim._replace(claim_token="another-token-16"), MINUTE) for claim in held]
    looked = [store.get("default", claim.transaction_id) for claim in held]
    assert await asyncio.gather(*again, *looked) == held + held


async def test_an_unclaimed_id_is_not_found(store: ClaimStore, unique: str) -> None:
    """A look-up of an unclaimed id returns None and claims nothing."""
    assert await store.get("default", unique) is None
    assert await store.claim(a_claim(unique), MINUTE) is None


@pytest.mark.parametrize("absolute", [False, True], ids=["ttl", "expire-time"])
async def test_a_claim_ends_at_its_expiry(store: ClaimStore, unique: str, absolute: bool) -> None:  # noqa: FBT001
    """A claim is held until its ttl or expire time has passed, and can be claimed again after it."""
    first = a_claim(unique, ttl_ms=300)
    assert await store.claim(first, end_of(first) if absolute else lasting(300)) is None
    assert await store.get("default", unique) == first
    second = a_claim(unique, token="another-token-16")

    async def is_taken() -> bool:
        return await store.claim(second, MINUTE) is None

    await eventually(is_taken, what="the expiry")
    assert first.expire_time_ms is not None
    assert system_clock_ms() >= first.expire_time_ms - 1
    assert await store.get("default", unique) == second


async def test_an_expire_time_in_the_past_is_refused(store: ClaimStore, unique: str) -> None:
    """A past expire time is refused: it is not stored and never reported as claimed."""
    past = a_claim(unique, ttl_ms=-1)
    with pytest.raises(InvalidRequest, match="expire_time"):
        await store.claim(past, end_of(past))
    assert await store.get("default", unique) is None


async def test_namespaces_and_ids_are_kept_apart(store: ClaimStore, unique: str) -> None:
    """Different splits of one text into namespace and id, and NFC and NFD spellings, are different claims."""
    spellings = ("\u00e9", "e\u0301")
    pairs = [("a", f"b:{unique}"), ("b", f"a:{unique}"), ("a.b", unique)]
    pairs += [("default", f"{spelling}{unique}") for spelling in spellings]
    stored = [await store.claim(a_claim(text, namespace=namespace), MINUTE) for namespace, text in pairs]
    assert stored == [None] * len(pairs)


async def test_a_cancelled_claim_leaves_the_store_in_order(store: ClaimStore, unique: str) -> None:
    """After cancelled claims every later answer still reaches its own caller."""
    tasks = [asyncio.create_task(store.claim(a_claim(f"{unique}-{number}"), MINUTE)) for number in range(40)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    probe = a_claim(f"{unique}-probe")
    assert await store.claim(probe, MINUTE) is None
    assert await store.get("default", probe.transaction_id) == probe


async def test_many_claims_are_answered_in_order_and_each_alone(store: ClaimStore, unique: str) -> None:
    """In a batch the first claim of an id holds it, and a refused claim does not affect the others."""
    claims = [(a_claim(f"{unique}-{number // 2}", claimant=str(number)), MINUTE) for number in range(98)]
    past = a_claim(f"{unique}-past", ttl_ms=-1)
    answers = await store.claim_all([*claims[:50], (past, end_of(past)), *claims[50:]])
    assert isinstance(answers[50], InvalidRequest)
    holders = [claims[number - 1][0] if number % 2 else None for number in range(98)]
    assert [*answers[:50], *answers[51:]] == holders
    assert await store.get("default", f"{unique}-past") is None


async def test_many_claims_that_are_cancelled_leave_the_store_in_order(store: ClaimStore, unique: str) -> None:
    """Later answers reach their own callers, and abandoned claims leave no message in the log of the loop."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    claims = [(a_claim(f"{unique}-{number}"), MINUTE) for number in range(40)]
    task = asyncio.create_task(store.claim_all(claims))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    probe = a_claim(f"{unique}-probe")
    assert await store.claim_all([(probe, MINUTE)]) == [None]
    assert await store.get("default", probe.transaction_id) == probe
    assert not complaints


async def test_a_closed_store_refuses_each_of_many_claims(store: ClaimStore, unique: str) -> None:
    """Each of them receives its own error."""
    await store.close()
    answers = await store.claim_all([(a_claim(f"{unique}-{number}"), MINUTE) for number in range(3)])
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 3


async def test_a_closed_store_fails_its_check(store: ClaimStore, unique: str) -> None:
    """`check` succeeds while the store answers; after `close`, which may be called twice, every call is refused."""
    await store.check()
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.check()
    with pytest.raises(StoreUnavailable):
        await store.claim(a_claim(unique), MINUTE)


async def test_its_description_is_for_people(store: ClaimStore) -> None:
    """A store describes where its claims are."""
    assert str(store.description)


async def test_the_same_token_is_a_replay(claims: ClaimService, unique: str) -> None:
    """Repeating a claim with its own token is CLAIMED and replayed, and returns the first claim unchanged."""
    request = ClaimRequest(unique, claim_token="token-of-sixteen", claimant="first")
    first = await claims.claim(request)
    again = await claims.claim(request._replace(claimant="changed"))
    assert (first.outcome, first.replayed) == (ClaimOutcome.CLAIMED, False)
    assert (again.outcome, again.replayed) == (ClaimOutcome.CLAIMED, True)
    assert again.transaction == first.transaction


async def test_another_token_is_a_duplicate(claims: ClaimService, unique: str) -> None:
    """A claim with another token, or with a generated one, is a duplicate and receives the holder."""
    first = await claims.claim(ClaimRequest(unique, claimant="first"))
    for token in ("", "another-token-16"):
        answer = await claims.claim(ClaimRequest(unique, claim_token=token))
        assert answer.outcome is ClaimOutcome.DUPLICATE
        assert answer.transaction == first.transaction


async def test_another_fingerprint_is_a_mismatch(claims: ClaimService, unique: str) -> None:
    """The same id with another fingerprint is a mismatch, even with the token of the holder; absent is not compared."""
    request = ClaimRequest(unique, claim_token="token-of-sixteen", payload_fingerprint=b"one")
    await claims.claim(request)
    for token in ("token-of-sixteen", ""):
        answer = await claims.claim(request._replace(claim_token=token, payload_fingerprint=b"two"))
        assert answer.outcome is ClaimOutcome.PAYLOAD_MISMATCH
    assert (await claims.claim(request._replace(claim_token=""))).outcome is ClaimOutcome.DUPLICATE
    assert (await claims.claim(ClaimRequest(unique))).outcome is ClaimOutcome.DUPLICATE


async def test_a_completed_transaction_is_a_duplicate_even_to_its_own_token(
    store: ClaimStore, claims: ClaimService, unique: str
) -> None:
    """CLAIMED always means go, so the token of a completed transaction receives DUPLICATE, with the result."""
    now_ms = system_clock_ms()
    done = a_claim(unique, state=TransactionState.COMPLETED, completion_time_ms=now_ms, result=b"paid 5")
    assert await store.claim(done, MINUTE) is None
    answer = await claims.claim(ClaimRequest(unique, claim_token=done.claim_token or ""))
    assert (answer.outcome, answer.transaction) == (ClaimOutcome.DUPLICATE, done)


async def test_looking_up_an_unclaimed_id_is_an_error(claims: ClaimService, unique: str) -> None:
    """A look-up of an unclaimed id raises TransactionNotFound."""
    with pytest.raises(TransactionNotFound):
        await claims.get("default", unique)


async def test_a_wait_ends_at_the_expire_time_of_its_claim(claims: ClaimService, unique: str) -> None:
    """A wait that would outlive the claim it asks for is cut, and the duplicate is answered with the holder."""
    held = await claims.claim(ClaimRequest(unique))
    at_time = RequestedExpiry(time_ms=system_clock_ms() + 500)
    async with asyncio.timeout(60):
        answer = await claims.claim(ClaimRequest(unique, expiry=at_time, wait_ms=200_000))
    assert (answer.outcome, answer.transaction) == (ClaimOutcome.DUPLICATE, held.transaction)


async def test_default_and_given_lifetimes_are_kept(claims: ClaimService, unique: str) -> None:
    """The transaction expires after the default, the ttl, or at the expire time, to the millisecond."""
    now_ms = system_clock_ms()
    by_default = (await claims.claim(ClaimRequest(f"{unique}-1"))).transaction
    by_ttl = (await claims.claim(ClaimRequest(f"{unique}-2", expiry=RequestedExpiry(ttl_ms=1_234)))).transaction
    at_time = RequestedExpiry(time_ms=now_ms + 9_999)
    by_time = (await claims.claim(ClaimRequest(f"{unique}-3", expiry=at_time))).transaction
    assert by_default.expire_time_ms == (by_default.claim_time_ms or 0) + POLICY.default_ttl_ms
    assert by_ttl.expire_time_ms == (by_ttl.claim_time_ms or 0) + 1_234
    assert by_time.expire_time_ms == now_ms + 9_999


@pytest.mark.parametrize("skew_ms", [-30_000, 30_000], ids=["service-behind", "service-ahead"])
async def test_an_expire_time_is_judged_by_the_clock_of_the_store(store: ClaimStore, unique: str, skew_ms: int) -> None:
    """Whatever the clock of the service reads, an expire time must lie within the maximum ttl by the store's clock.

    Protection: the store checks it in the step that claims. Redis reports success for a time in the past and keeps
    nothing.
    """
    service = ClaimService(store, Policies(POLICY), clock_ms=lambda: system_clock_ms() + skew_ms)
    aheads_ms = {
        "past": -20_000,
        "soon": 20_000,
        "late": POLICY.max_ttl_ms - 20_000,
        "too late": POLICY.max_ttl_ms + 20_000,
    }

    def claim_of(name: str) -> ClaimRequest:
        expire_time_ms = system_clock_ms() + aheads_ms[name.partition("-")[0]]
        return ClaimRequest(f"{name}-{unique}", expiry=RequestedExpiry(time_ms=expire_time_ms))

    for name in ("past", "too late"):
        with pytest.raises(InvalidRequest, match=f"expire_time: .*{'past' if name == 'past' else '1d'}"):
            await service.claim(claim_of(name))
    for name in ("soon", "late"):
        request = claim_of(name)
        assert (await service.claim(request)).outcome is ClaimOutcome.CLAIMED
        held = await service.get("default", request.transaction_id)
        assert held.expire_time_ms == request.expiry.time_ms
    answers = await service.claim_all([claim_of(f"{name}-batch") for name in aheads_ms])
    outcomes = [answer.outcome if isinstance(answer, ClaimAnswer) else type(answer) for answer in answers]
    assert outcomes == [InvalidRequest, ClaimOutcome.CLAIMED, ClaimOutcome.CLAIMED, InvalidRequest]
    for name in ("past", "too late", "past-batch", "too late-batch"):
        assert await store.get("default", f"{name}-{unique}") is None

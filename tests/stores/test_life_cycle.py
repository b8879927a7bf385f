"""The contract suite, second part: the rights of a token, the same cases over every store.

Without fakeredis, whose Lua lacks cmsgpack. Protection: the token compare, in one atomic step with the change.
"""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from dedup_service.claims import (
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    ClaimStore,
    HolderRequest,
    InvalidRequest,
    Policies,
    Policy,
    RequestedExpiry,
    Transaction,
    TransactionNotFound,
    TransactionState,
    system_clock_ms,
)
from dedup_service.claims import waiting as waiting_module
from tests.support.claims import MINUTE, a_claim
from tests.support.polling import eventually

pytestmark = pytest.mark.parametrize("store", ["redis", "redis-unix-socket", "redis-cluster", "sqlite"], indirect=True)

POLICY = Policy(default_ttl_ms=60_000, max_ttl_ms=86_400_000, retention_ms=3_600_000)
TOKEN, STRANGER = "token-of-sixteen", "another-token-16"


@pytest.fixture
def claims(store: ClaimStore) -> ClaimService:
    """The claim semantics over the store."""
    return ClaimService(store, Policies(POLICY))


async def hold(claims: ClaimService, unique: str, ttl_ms: int = 60_000) -> Transaction:
    """Claim an id with TOKEN and return the transaction."""
    request = ClaimRequest(unique, claim_token=TOKEN, claimant="é", payload_fingerprint=b"\xff\x00")
    answer = await claims.claim(request._replace(expiry=RequestedExpiry(ttl_ms)))
    assert answer.outcome is ClaimOutcome.CLAIMED
    return answer.transaction


async def taken_over(claims: ClaimService, unique: str) -> Transaction:
    """Let a short claim of TOKEN expire, claim it with STRANGER, and return that transaction."""
    await hold(claims, unique, ttl_ms=30)
    answers: list[ClaimAnswer] = []

    async def taken() -> bool:
        answers.append(await claims.claim(ClaimRequest(unique, claim_token=STRANGER)))
        return answers[-1].outcome is ClaimOutcome.CLAIMED

    await eventually(taken, what="the expiry")
    return answers[-1].transaction


def asks(
    unique: str, token: str = TOKEN, *, ttl_ms: int | None = None, expire_time_ms: int | None = None, **fields: Any
) -> HolderRequest:
    """Return a request of a holder."""
    expiry = RequestedExpiry(ttl_ms, expire_time_ms)
    return HolderRequest(unique, claim_token=token, expiry=expiry)._replace(**fields)


async def test_completing_keeps_the_result_and_the_rest(claims: ClaimService, unique: str) -> None:
    """A completion sets state, result, time and expiry, keeps the other fields, and every later call sees it."""
    held = await hold(claims, unique)
    before = system_clock_ms()
    completed = await claims.complete(asks(unique, result=b"paid \xff"))
    assert completed is not None
    assert completed.completion_time_ms is not None
    assert before <= completed.completion_time_ms <= system_clock_ms()
    assert completed.expire_time_ms == completed.completion_time_ms + POLICY.retention_ms
    assert completed == held._replace(
        state=TransactionState.COMPLETED,
        result=b"paid \xff",
        completion_time_ms=completed.completion_time_ms,
        expire_time_ms=completed.expire_time_ms,
    )
    assert await claims.get("default", unique) == completed
    for token in (TOKEN, STRANGER, ""):
        answer = await claims.claim(ClaimRequest(unique, claim_token=token))
        assert (answer.outcome, answer.transaction) == (ClaimOutcome.DUPLICATE, completed)


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 4096])
async def test_results_of_every_size_come_back(claims: ClaimService, unique: str, size: int) -> None:
    """A result is opaque bytes up to the limit, also at the sizes where its encoding changes."""
    await hold(claims, unique)
    result = bytes(range(256)) * 16
    completed = await claims.complete(asks(unique, result=result[:size]))
    assert completed is not None
    assert (await claims.get("default", unique)).result == result[:size]


async def test_repeating_a_completion_changes_nothing(claims: ClaimService, unique: str) -> None:
    """The same token and result receive the first completion; another result is NOT_HELD."""
    await hold(claims, unique)
    first = await claims.complete(asks(unique, result=b"paid"))
    assert await claims.complete(asks(unique, result=b"paid", ttl_ms=1_000)) == first
    assert await claims.complete(asks(unique, result=b"other")) is None
    assert await claims.get("default", unique) == first


async def test_a_completed_transaction_is_neither_released_nor_extended(claims: ClaimService, unique: str) -> None:
    """A completed transaction cannot be released, extended, or completed by another token."""
    await hold(claims, unique)
    completed = await claims.complete(asks(unique, result=b"paid"))
    assert not await claims.release(asks(unique))
    assert await claims.extend(asks(unique, ttl_ms=86_400_000)) is None
    assert await claims.complete(asks(unique, STRANGER, result=b"paid")) is None
    assert await claims.get("default", unique) == completed


async def test_another_fingerprint_is_a_mismatch_also_when_completed(claims: ClaimService, unique: str) -> None:
    """The fingerprint of a completed transaction is compared like that of one in progress."""
    await hold(claims, unique)
    await claims.complete(asks(unique))
    answer = await claims.claim(ClaimRequest(unique, payload_fingerprint=b"other"))
    assert answer.outcome is ClaimOutcome.PAYLOAD_MISMATCH


@pytest.mark.parametrize("absolute", [False, True], ids=["ttl", "expire-time"])
async def test_a_completed_transaction_ends_with_its_retention(
    claims: ClaimService,
    unique: str,
    absolute: bool,  # noqa: FBT001
) -> None:
    """The retention of a completion may be shorter than the claim was, and ends it."""
    await hold(claims, unique)
    lifetime: dict[str, Any] = {"expire_time_ms": system_clock_ms() + 200} if absolute else {"ttl_ms": 200}
    completed = await claims.complete(asks(unique, **lifetime))
    assert completed is not None

    async def claimed_again() -> bool:
        return (await claims.claim(ClaimRequest(unique))).outcome is ClaimOutcome.CLAIMED

    await eventually(claimed_again, what="the end of the retention")
    assert completed.expire_time_ms is not None
    assert system_clock_ms() >= completed.expire_time_ms - 1


async def test_a_released_claim_can_be_claimed_at_once(claims: ClaimService, unique: str) -> None:
    """After a release the next caller receives CLAIMED, and the first token holds nothing."""
    await hold(claims, unique)
    assert not await claims.release(asks(unique, STRANGER))
    assert await claims.release(asks(unique))
    assert not await claims.release(asks(unique))
    assert (await claims.claim(ClaimRequest(unique, claim_token=STRANGER))).outcome is ClaimOutcome.CLAIMED
    assert await claims.complete(asks(unique)) is None


async def test_an_extension_changes_only_the_expiry(claims: ClaimService, unique: str) -> None:
    """An extended claim outlives its first expiry, and has the new one."""
    held = await hold(claims, unique, ttl_ms=300)
    extended = await claims.extend(asks(unique, ttl_ms=60_000))
    assert extended is not None
    assert extended == held._replace(expire_time_ms=extended.expire_time_ms)
    assert extended.expire_time_ms is not None
    assert held.expire_time_ms is not None
    assert extended.expire_time_ms > held.expire_time_ms + 50_000

    async def first_end_has_passed() -> bool:
        return system_clock_ms() > (held.expire_time_ms or 0) + 20

    await eventually(first_end_has_passed)
    assert await claims.get("default", unique) == extended


async def test_an_extension_never_shortens_unless_asked(claims: ClaimService, unique: str) -> None:
    """A shorter ttl or an earlier time does not change the expiry unless shortening is allowed."""
    held = await hold(claims, unique, ttl_ms=60_000)
    sooner = system_clock_ms() + 10_000
    assert await claims.extend(asks(unique, ttl_ms=1_000)) == held
    assert await claims.extend(asks(unique, expire_time_ms=sooner)) == held
    assert await claims.get("default", unique) == held
    shortened = await claims.extend(asks(unique, expire_time_ms=sooner, allow_shortening=True))
    assert shortened == held._replace(expire_time_ms=sooner)
    ended = await claims.extend(asks(unique, ttl_ms=20, allow_shortening=True))
    assert ended is not None

    async def claimed_again() -> bool:
        return (await claims.claim(ClaimRequest(unique))).outcome is ClaimOutcome.CLAIMED

    await eventually(claimed_again, what="the shortened end")


async def test_an_extension_without_an_expiry_uses_the_default_ttl(claims: ClaimService, unique: str) -> None:
    """An extension without an expiry lasts the default ttl from now."""
    await hold(claims, unique, ttl_ms=1_000)
    extended = await claims.extend(asks(unique))
    assert extended is not None
    assert abs((extended.expire_time_ms or 0) - system_clock_ms() - POLICY.default_ttl_ms) < 5_000


async def test_a_claim_that_expired_and_was_taken_is_left_alone(claims: ClaimService, unique: str) -> None:
    """A token whose claim expired and was taken by another cannot complete, release or extend it."""
    theirs = await taken_over(claims, unique)
    assert await claims.complete(asks(unique, result=b"late")) is None
    assert not await claims.release(asks(unique))
    assert await claims.extend(asks(unique, ttl_ms=86_400_000)) is None
    assert await claims.get("default", unique) == theirs


async def test_an_unclaimed_id_is_not_held(claims: ClaimService, unique: str) -> None:
    """Without a claim every change is NOT_HELD and creates nothing."""
    assert await claims.complete(asks(unique)) is None
    assert not await claims.release(asks(unique))
    assert await claims.extend(asks(unique)) is None
    assert (await claims.claim(ClaimRequest(unique))).outcome is ClaimOutcome.CLAIMED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"claim_token": ""}, "claim_token"),
        ({"claim_token": "short"}, "claim_token"),
        ({"transaction_id": ""}, "transaction_id"),
        ({"namespace": "Pay"}, "namespace"),
        ({"ttl_ms": 0}, "ttl"),
        ({"ttl_ms": 86_400_001}, "ttl"),
        ({"result": b"x" * 4097}, "result"),
    ],
)
async def test_bad_changes_are_refused_with_their_field(
    claims: ClaimService, unique: str, fields: dict[str, Any], field: str
) -> None:
    """An invalid request is refused with its field, and changes nothing."""
    held = await hold(claims, unique)
    for change in (claims.complete, claims.release, claims.extend):
        with pytest.raises(InvalidRequest) as caught:
            await change(asks(unique, **fields))
        assert [violation.field for violation in caught.value.violations] == [field]
    assert await claims.get("default", unique) == held


async def test_of_concurrent_changes_one_decides(claims: ClaimService, unique: str) -> None:
    """Of racing completions with different results and a release exactly one wins, and its result is stored."""
    for number in range(20):
        name = f"{unique}-{number}"
        await hold(claims, name)
        results = [b"one", b"two", b"three"]
        completions = [claims.complete(asks(name, result=result)) for result in results]
        completed, released = await asyncio.gather(asyncio.gather(*completions), claims.release(asks(name)))
        winners = [result for result, answer in zip(results, completed, strict=True) if answer is not None]
        assert len(winners) + released == 1
        if winners:
            assert (await claims.get("default", name)).result == winners[0]


async def waiting(claims: ClaimService, count: int) -> None:
    """Return when that many callers wait."""

    async def all_wait() -> bool:
        return sum(map(len, claims._waiters._waiters.values())) == count

    await eventually(all_wait, what="the waiters")


async def test_a_waiter_receives_the_completion(store: ClaimStore, claims: ClaimService, unique: str) -> None:
    """A waiting duplicate receives the result, whether this process completes the work or another one."""
    for name, by in ((f"{unique}-1", claims), (f"{unique}-2", ClaimService(store, Policies(POLICY)))):
        await hold(claims, name)
        waiter = asyncio.create_task(claims.claim(ClaimRequest(name, wait_ms=60_000)))
        await waiting(claims, 1)
        completed = await by.complete(asks(name, result=b"paid"))
        answer = await waiter
        assert (answer.outcome, answer.transaction) == (ClaimOutcome.DUPLICATE, completed)


async def test_of_fifty_waiters_on_a_released_claim_one_wins(claims: ClaimService, unique: str) -> None:
    """When a claim is released exactly one waiter receives CLAIMED, and the others wait for that one."""
    await hold(claims, unique)
    requests = [ClaimRequest(unique, claim_token=f"token-number-{number:04}", wait_ms=60_000) for number in range(50)]
    waiters = [asyncio.create_task(claims.claim(request)) for request in requests]
    await waiting(claims, 50)
    assert await claims.release(asks(unique))
    done, others = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    winners = [task.result() for task in done if task.result().outcome is ClaimOutcome.CLAIMED]
    assert len(winners) == 1
    assert await claims.complete(asks(unique, winners[0].claim_token, result=b"paid")) is not None
    answers = await asyncio.gather(*others, *done)
    outcomes = [answer.outcome for answer in answers]
    assert outcomes.count(ClaimOutcome.CLAIMED) == 1
    assert {answer.transaction.result for answer in answers if answer.outcome is ClaimOutcome.DUPLICATE} == {b"paid"}


async def test_a_released_claim_is_not_taken_after_the_expire_time(
    store: ClaimStore, claims: ClaimService, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim whose expire time has passed during its wait is refused if nobody holds the transaction any more."""
    # No poll finds the release, as if it came just before the expire time.
    monkeypatch.setattr(waiting_module, "POLL_S", 1_000)
    await hold(claims, unique)
    at_time = RequestedExpiry(time_ms=system_clock_ms() + 2_000)
    waiter = asyncio.create_task(claims.claim(ClaimRequest(unique, expiry=at_time, wait_ms=60_000)))
    await waiting(claims, 1)
    assert await ClaimService(store, Policies(POLICY)).release(asks(unique))
    with pytest.raises(InvalidRequest, match="expire_time: passed while the claim waited"):
        await waiter
    with pytest.raises(TransactionNotFound):
        await claims.get("default", unique)


async def test_a_waiter_takes_over_what_expires(claims: ClaimService, unique: str) -> None:
    """When the claim of the holder expires a waiter receives CLAIMED."""
    await hold(claims, unique, ttl_ms=200)
    answer = await claims.claim(ClaimRequest(unique, claim_token=STRANGER, wait_ms=60_000))
    assert (answer.outcome, answer.claim_token) == (ClaimOutcome.CLAIMED, STRANGER)


async def test_a_wait_ends_with_a_duplicate(claims: ClaimService, unique: str) -> None:
    """If nothing changes the waiter receives DUPLICATE at the end of its wait, and not before."""
    held = await hold(claims, unique)
    begun = time.monotonic()
    answer = await claims.claim(ClaimRequest(unique, wait_ms=250))
    assert time.monotonic() - begun >= 0.25
    assert (answer.outcome, answer.transaction) == (ClaimOutcome.DUPLICATE, held)


async def test_waiters_leave_at_once_when_cancelled_and_at_the_shutdown(claims: ClaimService, unique: str) -> None:
    """A cancelled waiter leaves no state; at shutdown every other waiter is answered, and none waits again."""
    held = await hold(claims, unique)
    waiters = [asyncio.create_task(claims.claim(ClaimRequest(unique, wait_ms=300_000))) for _ in range(10)]
    await waiting(claims, 10)
    for waiter in waiters[::2]:
        waiter.cancel()
    await waiting(claims, 5)
    await claims.close()
    answers = await asyncio.gather(*waiters[1::2])
    assert {answer.transaction for answer in answers} == {held}
    assert not claims._waiters._waiters
    late = await claims.claim(ClaimRequest(unique, wait_ms=300_000))
    assert late.outcome is ClaimOutcome.DUPLICATE


async def test_many_waiters_ask_the_store_once(
    store: ClaimStore, claims: ClaimService, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many callers wait for one transaction, the store is asked once per poll."""
    monkeypatch.setattr(waiting_module, "POLL_S", 0.01)
    asked = 0
    get = store.get

    async def counted(namespace: str, transaction_id: str) -> Transaction | None:
        nonlocal asked
        asked += 1
        return await get(namespace, transaction_id)

    monkeypatch.setattr(store, "get", counted)
    await hold(claims, unique)
    waiters = [asyncio.create_task(claims.claim(ClaimRequest(unique, wait_ms=300_000))) for _ in range(100)]
    await waiting(claims, 100)
    begun = time.monotonic()

    async def asked_ten_times() -> bool:
        return asked >= 10

    await eventually(asked_ten_times)
    assert asked <= (time.monotonic() - begun) / 0.01 + 3
    await claims.close()
    await asyncio.gather(*waiters)


async def test_shadow_mode_lets_duplicates_through_and_counts_them(store: ClaimStore, unique: str) -> None:
    """In shadow mode duplicates and mismatches receive CLAIMED with a mark, at once and with their own token."""
    claims = ClaimService(store, Policies(POLICY, {"pay": replace(POLICY, shadow=True)}))
    first = await claims.claim(ClaimRequest(unique, "pay", claim_token=TOKEN, payload_fingerprint=b"1"))
    assert (first.outcome, first.shadow_duplicate) == (ClaimOutcome.CLAIMED, False)
    for fingerprint in (b"1", b"2"):
        request = ClaimRequest(unique, "pay", claim_token=STRANGER, payload_fingerprint=fingerprint, wait_ms=300_000)
        answer = await claims.claim(request)
        assert (answer.outcome, answer.shadow_duplicate) == (ClaimOutcome.CLAIMED, True)
        assert (answer.claim_token, answer.transaction) == (STRANGER, first.transaction)
    assert claims.shadow_duplicates == {"pay": 2}
    assert await claims.complete(asks(unique, STRANGER, namespace="pay")) is None


async def test_policies_apply_by_namespace_and_may_be_replaced(store: ClaimStore, unique: str) -> None:
    """Each namespace has its own lifetimes, unknown ones can be refused, and new rules apply to the next call."""
    pay = Policy(default_ttl_ms=5_000, max_ttl_ms=9_000, retention_ms=7_000)
    claims = ClaimService(store, Policies(POLICY, {"pay": pay}, allow_unknown=False))
    held = (await claims.claim(ClaimRequest(unique, "pay", claim_token=TOKEN))).transaction
    assert held.expire_time_ms == (held.claim_time_ms or 0) + 5_000
    completed = await claims.complete(asks(unique, namespace="pay"))
    assert completed is not None
    assert completed.expire_time_ms == (completed.completion_time_ms or 0) + 7_000
    with pytest.raises(InvalidRequest, match="maximum of 9s"):
        await claims.claim(ClaimRequest(unique, "pay", expiry=RequestedExpiry(9_001)))
    for call in (
        claims.claim(ClaimRequest(unique, "other")),
        claims.get("other", unique),
        claims.release(asks(unique, namespace="other")),
    ):
        with pytest.raises(InvalidRequest, match="namespace: 'other' is not known here"):
            await call
    claims.policies = Policies(POLICY)
    assert (await claims.claim(ClaimRequest(unique, "other"))).outcome is ClaimOutcome.CLAIMED


async def test_a_similar_token_holds_nothing(store: ClaimStore, unique: str) -> None:
    """The token of the holder is compared in full: a prefix, an extension or a changed one holds nothing."""
    claim = a_claim(unique, token=TOKEN)
    await store.claim(claim, MINUTE)
    claims = ClaimService(store, Policies(POLICY))
    for token in (TOKEN[:-1] + "x", TOKEN + "x", "x" + TOKEN):
        assert not await claims.release(asks(unique, token))
        assert await claims.complete(asks(unique, token)) is None
    assert await store.get("default", unique) == claim


@pytest.mark.parametrize("ahead_ms", [-1, POLICY.max_ttl_ms + 20_000], ids=["past", "too-late"])
async def test_a_change_to_a_bad_expire_time_changes_nothing(store: ClaimStore, unique: str, ahead_ms: int) -> None:
    """An expire time that is past or too far away by the clock of the store fails the change; the claim stays.

    Protection: the step that changes the claim checks it. With a time in the past Redis would delete the claim.
    """
    behind = ClaimService(store, Policies(POLICY), clock_ms=lambda: system_clock_ms() - 30_000)
    held = await hold(behind, unique)
    for change in (behind.complete, behind.extend):
        with pytest.raises(InvalidRequest, match="expire_time"):
            await change(asks(unique, expire_time_ms=system_clock_ms() + ahead_ms, allow_shortening=True))
        assert await store.get("default", unique) == held

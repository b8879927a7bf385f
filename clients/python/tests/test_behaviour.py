"""The behaviour of claims, for both clients, over each store and with the fake."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from dedup import DuplicateTransaction, InvalidRequest, NotHeld, PayloadMismatch, TransactionState, new_claim_token
from dedup.ids import logged_id
from dedup.testing import AsyncFakeClient


async def test_a_duplicate_names_its_holder(world: Any, unique: str) -> None:
    """The exception has the claimant and the times of the holder."""
    client = world.client(claimant="anna")
    claim = await client.claim(unique, ttl=timedelta(seconds=30))
    assert (claim.replayed, claim.fail_open, claim.shadow_duplicate) == (False, False, False)
    with pytest.raises(DuplicateTransaction, match="in progress, claimed by anna") as caught:
        await client.claim(unique)
    holder = caught.value.holder
    assert (holder.transaction_id, holder.namespace, holder.claimant) == (unique, "default", "anna")
    assert holder.state is TransactionState.IN_PROGRESS
    assert holder == claim.transaction
    assert holder.claim_time is not None
    assert holder.expire_time is not None
    assert holder.expire_time - holder.claim_time == timedelta(seconds=30)


async def test_leaving_the_block_completes_with_the_result(world: Any, unique: str) -> None:
    """Later duplicates receive the first result."""
    client = world.client()
    async with client.claim(unique) as claim:
        claim.result = b"paid 5"
        claim.retention = 90
    with pytest.raises(DuplicateTransaction, match="is completed") as caught:
        await client.claim(unique)
    holder = caught.value.holder
    assert holder.completed
    assert holder.result == b"paid 5"
    assert holder.completion_time is not None
    assert holder.expire_time is not None
    assert timedelta(seconds=89) < holder.expire_time - holder.completion_time < timedelta(seconds=91)


async def test_leaving_by_an_exception_keeps(world: Any, unique: str) -> None:
    """The work may have taken effect, so no second run begins while the claim lives."""
    client = world.client()
    with pytest.raises(ZeroDivisionError):
        async with client.claim(unique):
            raise ZeroDivisionError
    with pytest.raises(DuplicateTransaction, match="in progress"):
        await client.claim(unique)


@pytest.mark.parametrize("level", ["claim", "client", "handle"])
async def test_a_listed_exception_releases(world: Any, unique: str, level: str) -> None:
    """It says that nothing was done. Subclasses count, and the exception propagates."""
    listed = (ArithmeticError,)
    client = world.client(release_on=listed if level == "client" else ())
    with pytest.raises(ZeroDivisionError):
        async with client.claim(unique, release_on=listed if level == "claim" else None) as claim:
            if level == "handle":
                claim.release_on = listed
            raise ZeroDivisionError
    assert await client.get(unique) is None
    await client.claim(unique)


@pytest.mark.parametrize(
    ("listed", "error", "kept"),
    [
        ((Exception,), TimeoutError, True),
        ((OSError,), TimeoutError, True),
        ((OSError,), ConnectionRefusedError, False),
        ((TimeoutError,), TimeoutError, False),
        ((ValueError,), KeyError, True),
        ((Exception,), asyncio.CancelledError, True),
    ],
)
async def test_a_timeout_releases_only_if_listed_itself(
    world: Any, unique: str, listed: Any, error: type[BaseException], kept: Any
) -> None:
    """Work that timed out or was cancelled may have taken effect."""
    client = world.client()
    claim = await client.claim(unique, release_on=listed)
    await claim.__aexit__(error, error(), None)
    assert (await client.get(unique) is not None) is kept


async def test_only_exceptions_may_be_listed(world: Any) -> None:
    """Cancellation cannot be listed."""
    for wrong in (asyncio.CancelledError, "ValueError"):
        with pytest.raises(TypeError, match="subclasses of Exception"):
            await world.client().claim("x", release_on=(wrong,))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, asyncio.CancelledError])
async def test_an_interruption_keeps_the_claim(world: Any, unique: str, stop: type[BaseException]) -> None:
    """Interrupted work may have taken effect."""
    client = world.client()
    claim = await client.claim(unique)
    await claim.__aexit__(stop, stop(), None)
    assert (await client.get(unique)).state is TransactionState.IN_PROGRESS


async def test_an_explicit_ending_stands(world: Any, unique: str) -> None:
    """Leaving the block changes nothing after `complete` or `release`, also if an exception follows."""
    client = world.client()
    with pytest.raises(ZeroDivisionError):
        async with client.claim(f"{unique}-1") as claim:
            completed = await claim.complete(b"done", ttl=60)
            raise ZeroDivisionError
    assert completed.result == b"done"
    assert (await client.get(f"{unique}-1")).completed
    async with client.claim(f"{unique}-2") as claim:
        await claim.release()
    assert await client.get(f"{unique}-2") is None


async def test_completing_twice_is_completed_once(world: Any, unique: str) -> None:
    """The same token and result are COMPLETED again; another result is NOT_HELD."""
    claim = await world.client().claim(unique)
    assert (await claim.complete(b"one")).result == b"one"
    assert (await claim.complete(b"one")).completed
    with pytest.raises(NotHeld):
        await claim.complete(b"two")
    with pytest.raises(NotHeld):
        await claim.release()
    with pytest.raises(NotHeld):
        await claim.extend(60)


async def test_an_expired_claim_is_not_held(world: Any, unique: str) -> None:
    """Another caller receives it, and the first caller gets NotHeld at the end of its block."""
    client = world.client()
    with pytest.raises(NotHeld, match=logged_id(unique)):
        async with client.claim(unique, ttl=0.1):
            await world.pass_time(0.3)
            await client.claim(unique)


async def test_an_extension_shortens_only_if_allowed(world: Any, unique: str) -> None:
    """An earlier end needs `allow_shortening`."""
    claim = await world.client().claim(unique, ttl=60)
    longer = await claim.extend(timedelta(seconds=120))
    assert longer.expire_time > claim.transaction.expire_time
    assert (await claim.extend(30)).expire_time == longer.expire_time
    assert (await claim.extend(30, allow_shortening=True)).expire_time < longer.expire_time
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    assert (await claim.extend(expire_time=moment)).expire_time == moment


async def test_the_same_token_is_replayed(world: Any, unique: str) -> None:
    """A caller that repeats its own call receives CLAIMED again. A completed transaction is a duplicate."""
    client, token = world.client(), new_claim_token()
    first = await client.claim(unique, token=token)
    again = await client.claim(unique, token=token)
    assert (first.replayed, again.replayed, again.claim_token) == (False, True, token)
    await again.complete(b"x")
    with pytest.raises(DuplicateTransaction):
        await client.claim(unique, token=token)


async def test_another_fingerprint_is_a_mismatch(world: Any, unique: str) -> None:
    """The same id with another fingerprint is not a duplicate. Without a fingerprint nothing is compared."""
    client = world.client()
    await client.claim(unique, fingerprint=b"one")
    with pytest.raises(PayloadMismatch) as caught:
        await client.claim(unique, fingerprint=b"two")
    assert caught.value.holder.transaction_id == unique
    for same in (b"one", b""):
        with pytest.raises(DuplicateTransaction):
            await client.claim(unique, fingerprint=same)


async def test_namespaces_are_independent(world: Any, unique: str) -> None:
    """The same id in another namespace is another transaction."""
    client = world.client(namespace="pay")
    async with client.claim(unique) as claim:
        assert claim.namespace == "pay"
        async with client.claim(unique, namespace="mail"):
            pass
        assert not (await client.get(unique)).completed
        assert (await client.get(unique, namespace="mail")).completed
    assert await client.get(unique, namespace="default") is None


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("transaction_id", {"transaction_id": ""}),
        ("transaction_id", {"transaction_id": "x" * 513}),
        ("transaction_id", {"transaction_id": "tab\t"}),
        ("namespace", {"namespace": "Pay"}),
        ("claim_token", {"token": "short"}),
        ("claimant", {"claimant": "x" * 257}),
        ("payload_fingerprint", {"fingerprint": b"x" * 65}),
        ("ttl", {"ttl": -1}),
        ("ttl", {"ttl": timedelta(days=8)}),
        ("expire_time", {"expire_time": datetime(2020, 1, 1, tzinfo=UTC)}),
        ("wait", {"wait": 301}),
    ],
)
async def test_an_invalid_field_is_named(world: Any, unique: str, field: str, options: dict[str, Any]) -> None:
    """InvalidRequest names the field. Nothing is changed and nothing is retried."""
    with pytest.raises(InvalidRequest) as caught:
        await world.client().claim(**({"transaction_id": unique} | options))
    assert list(caught.value.violations) == [field]
    assert (caught.value.code, caught.value.applied) == (grpc.StatusCode.INVALID_ARGUMENT, "no")
    assert caught.value.reason == "INVALID_REQUEST"


async def test_a_result_that_is_too_large_does_not_undo_the_work(world: Any, unique: str) -> None:
    """The result is rejected, and the transaction is completed without it. So is an invalid retention."""
    client = world.client()
    with pytest.raises(InvalidRequest, match="completed without it") as caught:
        async with client.claim(unique) as claim:
            claim.result = b"x" * 4097
            claim.retention = timedelta(days=400)
    assert set(caught.value.violations) == {"result", "ttl"}
    found = await client.get(unique)
    assert found.completed
    assert found.result == b""


@pytest.mark.parametrize("result", ["paid 5", None, 5, bytearray(b"x"), b"x" * 1_048_577])
@pytest.mark.parametrize("how", ["set", "complete", "listed", "swallowed", "another"])
async def test_work_with_a_result_that_cannot_be_stored_is_completed_once(
    world: Any, unique: str, result: Any, how: str
) -> None:
    """The caller gets the error, and the transaction is completed without a result, whatever the block does."""
    client = world.client()
    caught: list[Exception] = []
    try:
        async with client.claim(unique, release_on=(Exception,) if how == "listed" else ()) as claim:
            if how == "complete":
                await claim.complete(result or 0)
            try:
                claim.result = result
            except (TypeError, ValueError) as error:
                caught.append(error)
                if how == "another":
                    raise RuntimeError from error
                if how != "swallowed":
                    raise
    except (TypeError, ValueError, RuntimeError) as error:
        caught.append(error)
    assert caught
    assert "completed without it" in str(caught[0])
    found = await client.get(unique)
    assert found.completed
    assert found.result == b""


async def test_a_valid_result_replaces_an_invalid_one(world: Any, unique: str) -> None:
    """The last result counts."""
    client = world.client()
    async with client.claim(unique) as claim:
        with pytest.raises(TypeError):
            claim.result = "paid 5"
        claim.result = b"paid 5"
    assert (await client.get(unique)).result == b"paid 5"


async def test_of_a_hundred_concurrent_claims_one_wins(world: Any, unique: str) -> None:
    """One claim and 99 duplicates."""
    clients = [world.client(timeout=20) for _ in range(4)]

    async def claim(number: int) -> str:
        try:
            await clients[number % 4].claim(unique)
        except DuplicateTransaction:
            return "duplicate"
        return "claimed"

    answers = await asyncio.gather(*map(claim, range(100)))
    assert (answers.count("claimed"), answers.count("duplicate")) == (1, 99)


async def test_two_expiries_are_refused(world: Any) -> None:
    """So is an expiry without a time zone."""
    client = world.client()
    with pytest.raises(ValueError, match="not both"):
        await client.claim("x", ttl=1, expire_time=datetime.now(UTC))
    with pytest.raises(ValueError, match="time zone"):
        await client.claim("x", expire_time=datetime(2100, 1, 1))  # noqa: DTZ001 - The test needs a naive time.


async def test_a_claim_that_is_never_awaited_is_reported() -> None:
    """Python emits a RuntimeWarning and nothing is claimed. A claim cannot be awaited twice."""
    client = AsyncFakeClient()
    with pytest.warns(RuntimeWarning, match="never awaited"):
        client.claim("x")
    assert client.service.calls == []
    claiming = client.claim("x")
    await claiming
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await claiming

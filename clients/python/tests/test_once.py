"""The decorator, for blocking and for coroutine functions."""

import asyncio
import json
from typing import Any

import pytest

from dedup import Client, DuplicateTransaction, PayloadMismatch, aio, once, transaction_id
from dedup.testing import AsyncFakeClient, FakeClient


def key(order: str, **_: object) -> str:
    """Return the transaction id of a call."""
    return transaction_id("order", order)


def test_a_function_runs_once(target: str, unique: str) -> None:
    """The second call with the same key is a duplicate. Another key runs."""
    with Client(target) as client:

        @once(client, key=key)
        def pay(order: str, *, amount: int) -> str:
            """Pay."""
            return f"{order} {amount}"

        assert pay.__doc__ == "Pay."
        assert pay(unique, amount=5) == f"{unique} 5"
        with pytest.raises(DuplicateTransaction):
            pay(unique, amount=5)
        assert pay(f"{unique}-2", amount=5) == f"{unique}-2 5"


async def test_a_coroutine_function_runs_once_and_its_result_is_stored(target: str, unique: str) -> None:
    """Duplicates of completed work return the first result."""
    runs = []
    async with aio.Client(target) as client:

        @once(
            client,
            key=key,
            ttl=30,
            retention=60,
            wait=10,
            encode=lambda value: json.dumps(value).encode(),
            decode=json.loads,
        )
        async def pay(order: str) -> dict[str, int]:
            await asyncio.sleep(0)
            runs.append(order)
            return {"paid": 5}

        assert await asyncio.gather(*[pay(unique) for _ in range(5)]) == [{"paid": 5}] * 5
        assert runs == [unique]


async def test_a_duplicate_may_be_answered() -> None:
    """`on_duplicate` may be a function or a coroutine function."""

    async def elsewhere(duplicate: DuplicateTransaction) -> str:
        await asyncio.sleep(0)
        return f"{duplicate.holder.claimant} does it"

    waiting = AsyncFakeClient(claimant="anna")
    await waiting.claim("order:1")
    assert await once(waiting, key=key, on_duplicate=elsewhere)(_nothing)("1") == "anna does it"
    blocking = FakeClient(waiting.service)
    assert once(blocking, key=key, on_duplicate=lambda found: found.holder.claimant)(lambda order: order)("1") == "anna"


def test_failed_work_may_be_repeated() -> None:
    """An exception keeps the claim unless `release_on` lists it."""
    client = FakeClient()
    outcomes: list[Any] = [ZeroDivisionError(), "paid", ZeroDivisionError()]

    def pay(order: str) -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return f"{order} {outcome}"

    guarded = once(client, key=key, release_on=(ArithmeticError,))(pay)
    with pytest.raises(ZeroDivisionError):
        guarded("1")
    assert guarded("1") == "1 paid"
    kept = once(client, key=key)(pay)
    with pytest.raises(ZeroDivisionError):
        kept("2")
    with pytest.raises(DuplicateTransaction):
        kept("2")


@pytest.mark.parametrize("fault", ["encode", "size"])
async def test_work_stays_done_if_its_result_cannot_be_stored(fault: str) -> None:
    """The caller gets the error, and the work is not repeated."""

    def encode(value: str) -> bytes:
        return b"x" * 5_000 if fault == "size" else value.encode("ascii")

    options: Any = {"key": key, "encode": encode, "decode": bytes.decode}
    expected = Exception
    blocking, waiting = FakeClient(), AsyncFakeClient()
    with pytest.raises(expected):
        once(blocking, **options)(lambda order: f"{order} é")("1")
    with pytest.raises(expected):
        await once(waiting, **options)(_accent)("1")
    for client in (blocking, waiting):
        found = FakeClient(client.service).get("order:1")
        assert found is not None
        assert found.completed


def test_another_fingerprint_is_a_mismatch() -> None:
    """The same key with other arguments raises PayloadMismatch."""

    @once(FakeClient(), key=lambda order, _amount: str(order), fingerprint=lambda _order, amount: bytes([amount]))
    def pay(order: str, amount: int) -> tuple[str, int]:
        return order, amount

    pay("1", 5)
    with pytest.raises(PayloadMismatch):
        pay("1", 6)


def test_the_client_must_fit_the_function() -> None:
    """A blocking client would block the event loop. `encode` without `decode` would lose results."""
    with pytest.raises(TypeError, match=r"dedup\.aio\.Client"):
        once(FakeClient(), key=key)(_nothing)
    with pytest.raises(TypeError, match=r"dedup\.Client"):
        once(AsyncFakeClient(), key=key)(lambda order: order)
    with pytest.raises(ValueError, match="both"):
        once(FakeClient(), key=key, encode=str.encode)


async def _nothing(order: str) -> str:
    return order


async def _accent(order: str) -> str:
    return f"{order} é"

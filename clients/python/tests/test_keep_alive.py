"""Keep-alive of both clients, over the live service and with the fake."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup import ClaimLost, Client, DuplicateTransaction, NotHeld, aio, call_metadata, once
from dedup.testing import AsyncFakeClient, FakeClient
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis that the test may suspend."""
    server = RedisProcess(tmp_path).start()
    yield server
    server.stop()


@pytest.fixture
async def own_target(own_redis: RedisProcess, start_service: Callable[..., ServiceProcess]) -> AsyncIterator[str]:
    """Address of a service over that Redis."""
    service = await asyncio.to_thread(start_service, "--store-url", own_redis.url)
    yield service.target
    await asyncio.to_thread(service.kill)


async def test_work_longer_than_its_ttl_runs_once(world: Any, unique: str) -> None:
    """After 2.5 ttls every other caller is still a duplicate, and the work is completed."""
    client = world.client(timeout=20)
    async with client.claim(unique, ttl=4, keep_alive=True) as claim:
        for _ in range(20):
            await world.pass_time(0.5)
            with pytest.raises(DuplicateTransaction):
                await client.claim(unique)
        assert not claim.lost
        claim.result = b"paid 5"
    assert (await client.get(unique)).result == b"paid 5"


async def test_a_claim_without_keep_alive_expires(world: Any, unique: str) -> None:
    """The default for an explicit claim."""
    client = world.client()
    claim = await client.claim(unique, ttl=0.1)
    await world.pass_time(0.3)
    await client.claim(unique)
    assert not claim.lost


@pytest.mark.parametrize("ending", ["complete", "release", "block", "kept"])
async def test_keep_alive_ends_with_the_claim(world: Any, unique: str, ending: str) -> None:
    """No extension follows, and `on_lost` is not called."""
    told: list[object] = []
    client = world.client(timeout=20)
    claim = await client.claim(unique, ttl=2, keep_alive=True, on_lost=told.append)
    if ending in {"complete", "release"}:
        await getattr(claim, ending)()
    else:
        error = ValueError() if ending == "kept" else None
        async with claim:
            pass
        await claim.__aexit__(type(error), error, None)
    await world.pass_time(2.2)
    if ending == "kept":
        assert (await client.get(unique)).completed
    assert told == []
    assert not claim.lost


def test_the_fake_keeps_claims_alive_on_its_own_clock() -> None:
    """`advance` extends on the way, so that tests need no time."""
    client = FakeClient()
    with client.claim("x", keep_alive=True):
        client.service.advance(3_000)
        assert client.get("x") is not None
        extensions = [request for method, request in client.service.calls if method == "ExtendTransaction"]
        assert len(extensions) >= 150
    client.service.advance(3_600)
    assert len([method for method, _ in client.service.calls if method == "ExtendTransaction"]) == len(extensions)


def test_a_kept_block_is_not_extended_after_its_end() -> None:
    """A claim left by an exception expires after its ttl."""
    client = FakeClient()
    with pytest.raises(ValueError, match="failed"), client.claim("x", ttl=60, keep_alive=True):
        raise ValueError("failed")
    client.service.advance(61)
    assert client.get("x") is None


def test_max_hold_limits_keep_alive() -> None:
    """The work is told before the claim ends."""
    client = FakeClient()
    told: list[object] = []
    claim = client.claim("x", ttl=60, keep_alive=True, max_hold=300, on_lost=told.append)
    client.service.advance(293)
    lost = [claim.lost]
    client.service.advance(2)
    assert told == [claim]
    assert [*lost, claim.lost] == [False, True]
    assert client.get("x") is not None
    claim.complete(b"late, but still held")


def test_an_expire_time_is_never_extended() -> None:
    """The caller said when the claim ends."""
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415 - Only this test needs it.

    client = FakeClient()
    claim = client.claim("x", expire_time=datetime.now(UTC) + timedelta(seconds=60), keep_alive=True)
    client.service.advance(50)
    assert [method for method, _ in client.service.calls] == ["ClaimTransaction"]
    assert not claim.lost


def test_grants_without_a_claim_are_not_extended() -> None:
    """There is nothing to extend, and nothing to lose."""
    client = FakeClient(on_unavailable="allow")
    client.service.unavailable = True
    with client.claim("x", keep_alive=True) as claim:
        client.service.advance(100)
    assert claim.fail_open
    assert not claim.lost


async def test_the_work_is_told_of_the_loss_before_the_claim_ends(
    own_redis: RedisProcess, own_target: str, unique: str
) -> None:
    """With the store suspended nothing can be extended. Both clients tell while the claim is still held."""
    async with aio.Client(own_target, timeout=30, attempt_timeout=0.5) as waiting:
        with Client(own_target, timeout=30, attempt_timeout=0.5) as blocking:
            told: list[str] = []
            options: Any = {"ttl": 4, "keep_alive": True}
            first = await asyncio.to_thread(
                lambda: blocking.claim(f"{unique}-1", on_lost=lambda _: told.append("sync"), **options)
            )
            second = await waiting.claim(f"{unique}-2", on_lost=lambda _: told.append("aio"), **options)
            own_redis.pause()
            try:
                await eventually(lambda: _is(sorted(told) == ["aio", "sync"]), 30, "the loss")
            finally:
                own_redis.resume()
            assert first.lost
            assert second.lost


async def test_a_claim_taken_away_is_lost_at_the_next_extension(own_redis: RedisProcess, own_target: str) -> None:
    """NOT_HELD cancels the work, and its block raises ClaimLost."""
    async with aio.Client(own_target, timeout=30) as client:
        with pytest.raises(ClaimLost) as caught:
            async with client.claim("taken", ttl=2, keep_alive=True, cancel_on_lost=True) as claim:
                await asyncio.to_thread(_delete_everything, own_redis)
                await asyncio.sleep(60)
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        assert claim.lost
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        # The task is usable afterwards.
        await asyncio.sleep(0)


async def test_only_the_block_is_cancelled() -> None:
    """A loss at its end does not cancel the code after it, and finished work is still completed."""
    client = AsyncFakeClient()
    async with client.claim("x", ttl=60, keep_alive=True, cancel_on_lost=True) as claim:
        client.service.unavailable = True
        client.service.advance(55)
        assert claim.lost
        client.service.unavailable = False
    await asyncio.sleep(0)
    found = await client.get("x")
    assert found is not None
    assert found.completed


async def test_the_cancellation_of_the_caller_stays_its_own() -> None:
    """A block that is cancelled from outside after the loss raises CancelledError."""
    client = AsyncFakeClient()

    async def work() -> None:
        async with client.claim("x", ttl=60, keep_alive=True, cancel_on_lost=True):
            client.service.unavailable = True
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            client.service.advance(55)
            await asyncio.sleep(60)

    working = asyncio.ensure_future(work())
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_a_lost_claim_cannot_be_entered() -> None:
    """The work would begin without a claim."""
    client = AsyncFakeClient()
    claim = await client.claim("x", ttl=60, keep_alive=True, cancel_on_lost=True)
    client.service.unavailable = True
    client.service.advance(55)
    with pytest.raises(ClaimLost):
        async with claim:
            raise AssertionError


def test_after_the_loss_complete_is_still_tried() -> None:
    """The service knows whether the token holds the transaction."""
    client = FakeClient()
    claim = client.claim("x", ttl=60, keep_alive=True)
    client.service.unavailable = True
    client.service.advance(70)
    client.service.unavailable = False
    assert claim.lost
    with pytest.raises(NotHeld):
        claim.complete()


def test_a_failing_on_lost_does_not_harm_other_claims(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, by the hashed id."""
    client = FakeClient()
    told: list[object] = []

    def fail(_: object) -> None:
        raise ZeroDivisionError

    claims = [
        client.claim(name, keep_alive=True, on_lost=on_lost) for name, on_lost in (("x", fail), ("y", told.append))
    ]
    client.service.unavailable = True
    client.service.advance(60)
    assert told == [claims[1]]
    assert "on_lost failed" in caplog.text


def test_a_slow_extension_does_not_delay_others(unique: str, target: str) -> None:
    """Each attempt runs by itself: a claim whose extension is not answered loses only itself."""
    with Client(target, timeout=20, attempt_timeout=20) as client:
        transport: Any = client._transport
        start, held = transport.start, []

        def slow(step: Any, metadata: Any, done: Any) -> None:
            held.append(done) if step.request.transaction_id.endswith("slow") else start(step, metadata, done)

        transport.start = slow
        told = threading.Event()
        client.claim(f"{unique}-slow", ttl=3, keep_alive=True, on_lost=lambda _: told.set())
        others = [client.claim(f"{unique}-{number}", ttl=3, keep_alive=True) for number in range(5)]
        assert told.wait(30)
        wait_until(lambda: all(_extended(claim) for claim in others), 30)
        assert not any(claim.lost for claim in others)
        assert len([thread for thread in threading.enumerate() if thread.name == "dedup-keep-alive"]) == 1


def test_one_thread_serves_every_claim_and_ends(unique: str, sqlite_target: str) -> None:
    """It exists while there are claims to keep alive, and a later claim starts another."""
    with Client(sqlite_target, timeout=30) as client:
        for turn in "ab":
            claims = [client.claim(f"{unique}-{turn}-{number}", ttl=9, keep_alive=True) for number in range(5)]
            assert _threads() == 1
            for claim in claims:
                claim.complete()
            wait_until(lambda: _threads() == 0, 30, "the thread to end")


def test_extensions_carry_the_metadata_of_their_claim(unique: str, start_service: Any, tmp_path: Path) -> None:
    """Such as the caller's token. The thread of keep-alive has no `call_metadata` of its own."""
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    with Client(service.target, timeout=20) as client:
        with call_metadata(("x-correlation-id", unique)):
            claim = client.claim(unique, ttl=1, keep_alive=True)
        wait_until(
            lambda: (
                {"method": "ExtendTransaction", "correlation_id": unique}.items()
                <= max((line for line in service.events("call_finished")), key=lambda line: line["method"]).items()
            ),
            30,
            "a logged extension",
        )
        claim.release()


def test_shortening_ends_keep_alive() -> None:
    """The next extension would make the claim longer again."""
    client = FakeClient()
    claim = client.claim("x", ttl=60, keep_alive=True)
    claim.extend(5, allow_shortening=True)
    client.service.advance(6)
    assert client.get("x") is None


def test_a_closed_client_tells_its_claims(target: str, unique: str) -> None:
    """Nothing extends them any more."""
    told: list[object] = []
    with Client(target) as client:
        claim = client.claim(unique, keep_alive=True, on_lost=told.append)
    assert told == [claim]
    assert claim.lost


async def test_a_decorated_function_is_kept_alive() -> None:
    """By default, for both kinds of functions."""
    blocking, waiting = FakeClient(), AsyncFakeClient()

    @once(blocking, key=lambda: "x", ttl=60)
    def work() -> bool:
        blocking.service.advance(150)
        return blocking.get("x") is not None

    @once(waiting, key=lambda: "x", ttl=60)
    async def work_async() -> bool:
        waiting.service.advance(150)
        return await waiting.get("x") is not None

    @once(blocking, key=lambda: "y", ttl=60, keep_alive=False)
    def expire() -> bool:
        blocking.service.advance(150)
        return blocking.get("y") is not None

    assert work()
    assert await work_async()
    with pytest.raises(NotHeld):
        expire()


def test_a_decorated_function_has_the_options_of_keep_alive() -> None:
    """`max_hold` and `on_lost` as for a claim. Threads cannot be cancelled."""
    client = FakeClient()
    told: list[object] = []

    @once(client, key=lambda: "x", ttl=60, max_hold=90, on_lost=told.append)
    def work() -> None:
        client.service.advance(85)

    work()
    assert len(told) == 1
    with pytest.raises(ValueError, match="cannot be cancelled"):
        once(client, key=lambda: "x", cancel_on_lost=True)
    with pytest.raises(ValueError, match="more than 0"):
        client.claim("y", keep_alive=True, max_hold=0)


def _threads() -> int:
    return sum(thread.name == "dedup-keep-alive" for thread in threading.enumerate())


def _extended(claim: Any) -> bool:
    found = claim._client.get(claim.transaction_id)
    return found is not None and found.expire_time > claim.transaction.expire_time


def _delete_everything(server: RedisProcess) -> None:
    import redis  # noqa: PLC0415 - Only this helper needs it.

    with redis.Redis.from_url(server.url) as connection:
        connection.flushall()


async def _is(value: bool) -> bool:  # noqa: FBT001 - An awaitable condition.
    return value

"""Durable mode: a claim is CLAIMED only once as many replicas have it as the settings ask for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import hiredis
import pytest
import redis

from dedup_service.claims import (
    Applied,
    CheckFailed,
    Completion,
    Extension,
    InvalidRequest,
    Reason,
    Release,
    StoreUnavailable,
    Transaction,
    TransactionState,
    system_clock_ms,
)
from dedup_service.stores.redis.canary import RedisCanary
from dedup_service.stores.redis.channel import ReplicaQuorum
from dedup_service.stores.redis.link import FixedServer, OneServer, RedisLink
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.redis.url import parse_redis_url
from dedup_service.stores.registry import StoreConfig, make_store
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.claims import MINUTE, a_claim, end_of, lasting
from tests.support.cluster import ClusterDeployment
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess
from tests.support.sentinel import SentinelDeployment

MINE = "token-of-the-first"
OTHER = "token-of-another"
IDS = 200

OpenStore = Callable[..., Awaitable[RedisStore]]


@dataclass
class Pair:
    """A master and its replica, without Sentinel."""

    master: RedisProcess
    replica: RedisProcess

    def promote(self) -> None:
        """Stop the master, and promote the replica with the data it has received."""
        self.master.stop()
        with redis.Redis(port=self.replica.port, protocol=2) as client:
            client.execute_command("REPLICAOF", "NO", "ONE")


@pytest.fixture
def pair(start_redis: Callable[..., RedisProcess]) -> Pair:
    """A master whose replica follows."""
    master = start_redis("--repl-diskless-sync-delay", "0")
    replica = start_redis("--replicaof", "127.0.0.1", str(master.port))
    with redis.Redis(port=master.port, protocol=2) as client:
        # Until its first acknowledgement a replica that follows does not count.
        wait_until(lambda: client.set("marker", 1, ex=60) and client.wait(1, 100) == 1, what="the replica to follow")
    return Pair(master, replica)


@pytest.fixture
async def open_store() -> AsyncIterator[OpenStore]:
    """Opens stores that require one replica or the given number, and closes them at the end."""
    async with contextlib.AsyncExitStack() as opened:

        async def open_it(url: str, min_replicas: int = 1, timeout_ms: int = 3_000) -> RedisStore:
            store = make_store(StoreConfig(url, timeout_ms=timeout_ms, min_replicas=min_replicas))
            assert isinstance(store, RedisStore)
            opened.push_async_callback(store.close)
            await store.open()
            return store

        yield open_it


@contextlib.contextmanager
def paused(server: RedisProcess) -> Iterator[None]:
    """Stop a server for the context."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


async def failure_of(call: Awaitable[object]) -> tuple[str, Applied]:
    """Return reason and `applied` of a failed call."""
    with pytest.raises(StoreUnavailable) as caught:
        await call
    return caught.value.reason, caught.value.applied


async def answered(call: Callable[[], Awaitable[Transaction | None]]) -> Transaction | None:
    """Repeat a call until it is answered, and return the answer."""
    answers: list[Transaction | None] = []

    async def attempted() -> bool:
        with contextlib.suppress(StoreUnavailable):
            answers.append(await call())
        return bool(answers)

    await eventually(attempted, what="an answer")
    return answers[0]


async def test_a_claim_without_its_replica_is_doubt(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """While the replica does not acknowledge, no caller receives CLAIMED, although the claim may be stored.

    Protection: WAIT after the SET, and its count. A retry with the same token also needs the replica, even over a new
    connection that has written nothing itself: the confirming write covers that.
    """
    store = await open_store(pair.master.url)
    assert await store.claim(a_claim(f"{unique}-before"), MINUTE) is None
    claim = a_claim(unique, token=MINE)
    with paused(pair.replica):
        assert await failure_of(store.claim(claim, MINUTE)) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)
        assert await failure_of(store.claim(claim, MINUTE)) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)
        second = await open_store(pair.master.url)
        assert await failure_of(second.claim(claim, MINUTE)) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)
        # A duplicate needs no replica: it starts no work.
        duplicate = await store.claim(a_claim(unique, token=OTHER), MINUTE)
        assert duplicate is not None
        assert duplicate.claim_token == MINE
    replayed = await answered(lambda: store.claim(claim, MINUTE))
    assert replayed is not None
    assert replayed.claim_token == MINE
    pair.promote()
    survivor = await open_store(pair.replica.url, min_replicas=0)
    held = await survivor.claim(a_claim(unique, token=OTHER), MINUTE)
    assert held is not None
    assert held.claim_token == MINE


async def test_a_retry_writes_before_its_wait(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """A retry with the same token writes the expiry again.

    Protection: the write of the confirming script. Since Redis 7.2 WAIT covers only writes of its own connection.
    """
    store = await open_store(pair.master.url)
    claim = a_claim(unique, token=MINE)
    assert await store.claim(claim, MINUTE) is None
    with redis.Redis(port=pair.master.port, protocol=2) as admin:
        ends_at_ms = admin.pexpiretime(f"dedup:default:{unique}")
        admin.config_resetstat()
        assert await store.claim(claim, MINUTE) == claim
        assert admin.info("commandstats")["cmdstat_pexpireat"]["calls"] == 1
        assert admin.pexpiretime(f"dedup:default:{unique}") == ends_at_ms


async def test_completions_and_extensions_wait_too(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """Acknowledged completions and extensions survive a failover, also those that repeat an unacknowledged one.

    Protection: WAIT after the scripts, and the write of a repetition that changes nothing.
    """
    store = await open_store(pair.master.url)
    claim = a_claim(unique, token=MINE)
    assert await store.claim(claim, MINUTE) is None
    extension = Extension("default", unique, MINE, lasting(120_000), allow_shortening=False)
    completion = Completion("default", unique, MINE, b"paid", system_clock_ms(), lasting(120_000))

    def extend(by: RedisStore) -> Awaitable[Transaction | None]:
        return by.extend(extension)

    def complete(by: RedisStore) -> Awaitable[Transaction | None]:
        return by.complete(completion)

    for change in (extend, complete):
        with paused(pair.replica):
            assert await failure_of(change(store)) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)
            second = await open_store(pair.master.url)
            assert await failure_of(change(second)) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)
        assert await answered(partial(change, store)) is not None
    pair.promote()
    survivor = await open_store(pair.replica.url, min_replicas=0)
    found = await survivor.get("default", unique)
    assert found is not None
    assert (found.state, found.result) == (TransactionState.COMPLETED, b"paid")


async def test_expire_times_are_checked_and_wait_too(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """A claim by expire time waits for its replica, alone and in a batch, and one in the past is refused."""
    store = await open_store(pair.master.url)
    past, first, second = (
        a_claim(f"{unique}-{ttl_ms}", token=MINE, ttl_ms=ttl_ms) for ttl_ms in (-5_000, 60_000, 70_000)
    )
    with pytest.raises(InvalidRequest, match="expire_time"):
        await store.claim(past, end_of(past))
    assert await store.claim(first, end_of(first)) is None
    assert await store.claim(first, end_of(first)) == first
    refused, held, kept = await store.claim_all([(claim, end_of(claim)) for claim in (past, first, second)])
    assert isinstance(refused, InvalidRequest)
    assert (held, kept) == (first, None)
    with redis.Redis(port=pair.replica.port, protocol=2) as replica:
        keys = [f"dedup:default:{claim.transaction_id}" for claim in (past, first, second)]
        assert [replica.pexpiretime(key) for key in keys] == [-2, first.expire_time_ms, second.expire_time_ms]
    with paused(pair.replica):
        third = a_claim(f"{unique}-third", token=MINE)
        assert await failure_of(store.claim(third, end_of(third))) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)


async def test_a_release_needs_no_replica(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """A release is acknowledged without a replica: losing it in a failover costs time, and never pays twice."""
    store = await open_store(pair.master.url)
    assert await store.claim(a_claim(unique, token=MINE), MINUTE) is None
    with paused(pair.replica):
        assert await store.release(Release("default", unique, MINE))


async def test_more_replicas_than_there_are(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """Two replicas cannot acknowledge where there is one."""
    store = await open_store(pair.master.url, min_replicas=2)
    assert await failure_of(store.claim(a_claim(unique), MINUTE)) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)


async def test_a_user_without_the_right_to_wait(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """Without the right to WAIT every claim is doubt, with the reason."""
    with redis.Redis(port=pair.master.port, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "+@all", "-wait")
    store = await open_store(f"redis://limited:pw@127.0.0.1:{pair.master.port}")
    assert await failure_of(store.claim(a_claim(unique), MINUTE)) == ("STORE_NOT_PERMITTED", Applied.UNKNOWN)


async def test_one_wait_answers_for_many_claims(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """Concurrent claims wait together: far fewer WAITs than claims, and one winner each.

    Protection of throughput: rounds. Redis serves nothing else on a connection that waits.
    """
    store = await open_store(pair.master.url)
    with redis.Redis(port=pair.master.port, protocol=2) as admin:
        admin.config_resetstat()
        crowd = [
            store.claim(a_claim(f"{unique}-{number}", token=f"{token}-{attempt}"), MINUTE)
            for number in range(50)
            for attempt, token in enumerate((MINE, OTHER, OTHER, OTHER))
        ]
        answers = await asyncio.gather(*crowd)
        calls = admin.info("commandstats")
    assert answers.count(None) == 50
    assert calls["cmdstat_set"]["calls"] >= 200
    assert calls["cmdstat_wait"]["calls"] <= 5


async def test_a_bug_in_a_round_leaves_no_caller_waiting() -> None:
    """When sending a round fails unexpectedly its callers receive an error, and the next round is sent.

    Protection: the rounds outlive any exception.
    """
    answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    answer.set_result(1)
    channel = Mock(send=Mock(side_effect=[KeyError("hunter2"), answer, answer]))
    quorum = ReplicaQuorum(channel, replicas=1, wait_ms=10)
    async with asyncio.timeout(5):
        assert await failure_of(quorum.send("SET")) == ("STORE_ERROR", Applied.UNKNOWN)
        assert await quorum.send("SET") == (1, 1)


async def test_a_cancelled_caller_is_not_sent(open_store: OpenStore, pair: Pair, unique: str) -> None:
    """A command whose caller is cancelled before its round is never sent."""
    store = await open_store(pair.master.url)
    with paused(pair.replica):
        first = asyncio.create_task(store.claim(a_claim(f"{unique}-first"), MINUTE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = asyncio.create_task(store.claim(a_claim(f"{unique}-second"), MINUTE))
        await asyncio.sleep(0)
        second.cancel()
        assert await failure_of(first) == ("STORE_NOT_REPLICATED", Applied.UNKNOWN)
    assert await store.get("default", f"{unique}-second") is None


async def claims_lost(deployment: SentinelDeployment, min_replicas: int) -> tuple[int, int]:
    """Kill a master whose replica lags; return the number of claims acknowledged, and the number lost.

    The replica is paused while half of the claims are made, as by a slow network.
    """
    claimed = []

    async def claim(store: RedisStore, number: int) -> None:
        with contextlib.suppress(StoreUnavailable):
            if await store.claim(a_claim(f"lost-{number}", token=MINE), MINUTE) is None:
                claimed.append(number)

    async def is_lost(store: RedisStore, number: int) -> bool:
        holder = await answered(lambda: store.claim(a_claim(f"lost-{number}", token=OTHER), MINUTE))
        return holder is None or holder.claim_token != MINE

    async with contextlib.AsyncExitStack() as opened:
        stores: list[RedisStore] = []
        for replicas in (min_replicas, 0):
            store = make_store(StoreConfig(deployment.url, timeout_ms=3_000, min_replicas=replicas))
            assert isinstance(store, RedisStore)
            opened.push_async_callback(store.close)
            await store.open()
            stores.append(store)
        claiming, looking = stores
        await asyncio.to_thread(deployment.replicate)
        await asyncio.gather(*(claim(claiming, number) for number in range(IDS // 2)))
        deployment.replica.pause()
        await asyncio.to_thread(fill_sockets, deployment.master)
        await asyncio.gather(*(claim(claiming, number) for number in range(IDS // 2, IDS)))
        deployment.master.stop()
        deployment.replica.resume()
        await asyncio.to_thread(wait_until, deployment.replica_is_master, what="the failover")
        return len(claimed), sum(await asyncio.gather(*(is_lost(looking, number) for number in claimed)))


def fill_sockets(master: RedisProcess) -> None:
    """Write more than the buffers of a connection hold, which a replica would still read after a crash."""
    with redis.Redis(port=master.port, protocol=2) as client:
        for _ in range(32):
            client.set("filler", "x" * 2**20, ex=60)


@pytest.mark.parametrize("min_replicas", [0, 1])
async def test_losses_of_a_failover(tmp_path: Path, min_replicas: int) -> None:
    """A failover to a replica that lags loses acknowledged claims without durable mode, and none with it.

    Protection: WAIT. The figures are those of docs/guarantees.md.
    """
    deployment = SentinelDeployment(tmp_path)
    try:
        deployment.start()
        claimed, lost = await claims_lost(deployment, min_replicas)
    finally:
        deployment.stop()
    assert (claimed, lost) == ((IDS, IDS // 2) if min_replicas == 0 else (IDS // 2, 0))


class Elected(FixedServer):
    """The locator of a master that the test elects."""

    def elect(self, server: RedisProcess) -> None:
        """Locate this server from now on."""
        self._target = parse_redis_url(server.url)


@contextlib.asynccontextmanager
async def watched(locator: FixedServer, min_replicas: int) -> AsyncIterator[RedisStore]:
    """Yield an open store."""
    link = RedisLink(locator, timeout_ms=3_000, min_replicas=min_replicas)
    layout = prefixed_layout("dedup:")
    store = RedisStore(OneServer(link), layout, "a test", canary=RedisCanary(b"canary:"), min_replicas=min_replicas)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def losses_seen(store: RedisStore) -> tuple[bool, int]:
    """Check the store; return whether the server answered, and how many losses the check reported."""
    try:
        notices = await store.check()
    except CheckFailed as failed:
        return failed.reason is Reason.STORE_NOT_REPLICATED, sum(notice.forgot for notice in failed.notices)
    return True, sum(notice.forgot for notice in notices)


@pytest.mark.parametrize("min_replicas", [0, 1])
async def test_the_canary_expects_what_a_failover_must_keep(pair: Pair, min_replicas: int) -> None:
    """A failover to a lagging replica loses counts, which is a loss of claims unless they needed the replica.

    Protection: in durable mode only a count that replicas acknowledged is expected.
    """
    locator = Elected(parse_redis_url(pair.master.url))
    async with watched(locator, min_replicas) as store:
        assert await losses_seen(store) == (True, 0)
        with redis.Redis(port=pair.master.port, protocol=2) as admin:
            # WAIT covers the writes of its own connection, and replication keeps the order of all writes.
            admin.set("marker", 2, ex=60)
            assert admin.wait(1, 10_000) == 1
        with paused(pair.replica):
            await asyncio.to_thread(fill_sockets, pair.master)
            for _ in range(3):
                assert await losses_seen(store) == (True, 0)
            pair.master.stop()
        locator.elect(pair.replica)
        pair.promote()
        seen: list[int] = []

        async def answered_by_the_replica() -> bool:
            answers, losses = await losses_seen(store)
            seen.append(losses)
            return answers

        await eventually(answered_by_the_replica, what="the promoted replica")
        seen += [(await losses_seen(store))[1] for _ in range(3)]
    assert sum(seen) == (0 if min_replicas else 1)


async def test_a_loss_without_a_replica_is_reported_once(pair: Pair) -> None:
    """In durable mode a flush is reported by the next check, once, also while no replica acknowledges.

    Protection: a failed check has its notices.
    """
    async with watched(FixedServer(parse_redis_url(pair.master.url)), 1) as store:
        assert await losses_seen(store) == (True, 0)
        with paused(pair.replica):
            with redis.Redis(port=pair.master.port, protocol=2) as admin:
                admin.flushall()
            assert [await losses_seen(store) for _ in range(3)] == [(True, 1), (True, 0), (True, 0)]


async def test_in_a_cluster(open_store: OpenStore, tmp_path: Path, unique: str) -> None:
    """Each master of a cluster waits for its own replica, also right after a redirection."""
    deployment = ClusterDeployment(tmp_path)
    try:
        await asyncio.to_thread(deployment.start)
        store = await open_store(deployment.url)
        for number in range(30):
            await answered(lambda number=number: store.claim(a_claim(f"{unique}-{number}", token=MINE), MINUTE))  # type: ignore[misc]
        for replica in deployment.replicas:
            replica.pause()
        failures = {await failure_of(store.claim(a_claim(f"{unique}-x{number}"), MINUTE)) for number in range(6)}
        assert failures == {("STORE_NOT_REPLICATED", Applied.UNKNOWN)}
    finally:
        deployment.stop()


async def test_a_failure_after_a_redirected_write_is_doubt() -> None:
    """If the WAIT after a redirected write cannot be sent, the write was made all the same, and its outcome is unknown.

    Protection: a failure after a write is never "not applied". A mock, since no server here loses a connection at that
    moment.
    """
    moved = hiredis.ReplyError("MOVED 1 127.0.0.1:7000")
    away = StoreUnavailable(Reason.STORE_CONNECTION_LOST, "the connection was lost", Applied.NO)
    written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    written.set_result(None)
    link = SimpleNamespace(
        channel=SimpleNamespace(send=Mock(return_value=written)),
        quorum=SimpleNamespace(send=AsyncMock(side_effect=[(moved, 0), away])),
    )
    nodes = Mock(link_of=Mock(return_value=link), redirected=Mock(return_value=link))
    store = RedisStore(nodes, prefixed_layout("dedup:"), "a test", canary=RedisCanary(b"canary:"), min_replicas=1)
    assert await failure_of(store.claim(a_claim("x"), MINUTE)) == ("STORE_CONNECTION_LOST", Applied.UNKNOWN)

"""The check of a store tells whether claims are taken, not only whether the store answers."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from dedup_service.claims import ClaimStore, Reason, StoreUnavailable
from dedup_service.stores.registry import StoreConfig, make_store
from tests.support.claims import MINUTE, a_claim
from tests.support.cluster import ClusterDeployment
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess
from tests.support.refusals import APP, REFUSALS, Refusal, allow_app

OpenStore = Callable[..., Awaitable[ClaimStore]]
StartRedis = Callable[..., RedisProcess]


@pytest.fixture
async def open_store() -> AsyncIterator[OpenStore]:
    """Opens stores by URL and settings, and closes them at the end."""
    async with contextlib.AsyncExitStack() as opened:

        async def open_it(url: str, layout: str = "prefixed", *, min_replicas: int = 0) -> ClaimStore:
            store = make_store(StoreConfig(url, layout, timeout_ms=5_000, min_replicas=min_replicas))
            opened.push_async_callback(store.close)
            await store.open()
            return store

        yield open_it


@pytest.fixture
def own_redis(start_redis: StartRedis) -> Iterator[tuple[RedisProcess, Any]]:
    """A Redis for this test only, with the user of the service, and a client of its administrator."""
    server = start_redis()
    with redis.Redis(port=server.port, protocol=2) as admin:
        allow_app(admin)
        yield server, admin


def url_of(server: RedisProcess) -> str:
    """Return the URL with the user of the service."""
    return f"redis://{APP}@127.0.0.1:{server.port}/0"


async def failure_of(call: Awaitable[object]) -> Reason | None:
    """Return the reason of a failed call, or None."""
    try:
        await call
    except StoreUnavailable as failure:
        return failure.reason
    return None


async def checks_with(store: ClaimStore, reason: Reason | None) -> None:
    """Return when a check fails for this reason, or succeeds."""

    async def so() -> bool:
        return await failure_of(store.check()) is reason

    await eventually(so, what=f"a check with {reason}")


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
async def test_a_check_fails_while_redis_answers_and_refuses_claims(
    open_store: OpenStore, own_redis: tuple[RedisProcess, Any], unique: str, refusal: Refusal
) -> None:
    """The check fails for the reason of the claims, although nobody claims, and succeeds again by itself.

    Protection: the check writes as a claim does.
    """
    server, admin = own_redis
    store = await open_store(url_of(server))
    await checks_with(store, None)
    with refusal.applied_to(admin):
        assert await failure_of(store.check()) is refusal.reason
        assert await failure_of(store.claim(a_claim(unique), MINUTE)) is refusal.reason
        assert await failure_of(store.check()) is refusal.reason
    await checks_with(store, None)
    assert await store.claim(a_claim(unique), MINUTE) is None


async def test_a_check_fails_while_redis_cannot_save(
    open_store: OpenStore, start_redis: StartRedis, tmp_path: Path, unique: str
) -> None:
    """A Redis that stops writes after a failed snapshot fails the check.

    Protection: the check writes.
    """
    folder = tmp_path / "data"
    folder.mkdir()
    server = start_redis("--save", "3600 1000000", "--dir", str(folder))
    store = await open_store(server.url)
    await checks_with(store, None)
    with redis.Redis(port=server.port, protocol=2) as admin:
        shutil.rmtree(folder)
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err", what="a failed snapshot")
        assert await failure_of(store.claim(a_claim(unique), MINUTE)) is Reason.STORE_MISCONFIGURED
        assert await failure_of(store.check()) is Reason.STORE_MISCONFIGURED
        folder.mkdir()
        admin.config_set("stop-writes-on-bgsave-error", "no")
    await checks_with(store, None)


async def test_a_check_needs_the_replicas_of_a_claim(
    open_store: OpenStore, start_redis: StartRedis, unique: str
) -> None:
    """In durable mode the check fails while too few replicas acknowledge, and succeeds once one follows.

    Protection: the write of the check waits for replicas.
    """
    server = start_redis("--repl-diskless-sync-delay", "0")
    store = await open_store(server.url, min_replicas=1)
    assert await failure_of(store.check()) is Reason.STORE_NOT_REPLICATED
    start_redis("--replicaof", "127.0.0.1", str(server.port))
    await checks_with(store, None)
    assert await store.claim(a_claim(unique), MINUTE) is None


@pytest.mark.parametrize(
    ("layout", "keys"), [("prefixed", "~dedup:default:*"), ("raw", "~paid:*"), ("raw", "~paid:* ~dedup-canary*")]
)
async def test_a_key_that_the_user_may_not_write_does_not_fail_the_check(
    open_store: OpenStore, own_redis: tuple[RedisProcess, Any], unique: str, layout: str, keys: str
) -> None:
    """Neither a forbidden canary nor the refused claim of another key means that claims are refused.

    Protection: a forbidden canary key is replaced by a key of the layout; claims do not decide.
    """
    server, admin = own_redis
    admin.execute_command("ACL", "SETUSER", "app", "resetkeys", *keys.split())
    store = await open_store(url_of(server), layout)
    await store.check()
    forbidden = a_claim(unique, namespace="default" if layout == "raw" else "other")
    assert await failure_of(store.claim(forbidden, MINUTE)) is Reason.STORE_NOT_PERMITTED
    assert await failure_of(store.check()) is None
    assert await store.claim(a_claim(f"paid:{unique}"), MINUTE) is None


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
async def test_without_the_right_to_set_the_canary_is_no_excuse(
    open_store: OpenStore, own_redis: tuple[RedisProcess, Any], layout: str
) -> None:
    """A user who may not run SET fails the check in every layout, also where the canary key is forbidden."""
    server, admin = own_redis
    admin.execute_command("ACL", "SETUSER", "app", "resetkeys", "~unrelated:*", "-set")
    store = await open_store(url_of(server), layout)
    assert await failure_of(store.check()) is Reason.STORE_NOT_PERMITTED


@pytest.mark.parametrize("pattern", ["~*", "~dedup:default:*"])
async def test_a_check_costs_one_small_command_and_leaves_one_key_with_an_expiry(
    open_store: OpenStore, own_redis: tuple[RedisProcess, Any], pattern: str
) -> None:
    """Ten checks run ten SETs, where the canary is forbidden of another key."""
    server, admin = own_redis
    admin.execute_command("ACL", "SETUSER", "app", "resetkeys", pattern)
    store = await open_store(url_of(server))
    await store.check()
    admin.config_resetstat()
    for _ in range(10):
        await store.check()
    calls = {name: stat["calls"] for name, stat in admin.info("commandstats").items()}
    expected = {"cmdstat_set": 10}
    assert {name: count for name, count in calls.items() if name != "cmdstat_config|resetstat"} == expected
    keys = admin.keys()
    assert len(keys) <= 1
    # One millisecond may have passed since.
    assert all(admin.pttl(key) != -1 for key in keys)


async def test_a_slow_check_is_a_good_one(open_store: OpenStore, own_redis: tuple[RedisProcess, Any]) -> None:
    """A check whose replies are late, but within the timeout, succeeds."""
    server, _ = own_redis
    async with FaultProxy(server.port) as proxy:
        store = await open_store(proxy.url)
        await store.check()
        sent = len(proxy.sent_upstream)
        proxy.hold_replies.clear()
        check = asyncio.create_task(store.check())

        async def asked() -> bool:
            return len(proxy.sent_upstream) > sent

        await eventually(asked, what="the check")
        await asyncio.sleep(0)
        assert not check.done()
        proxy.hold_replies.set()
        assert not await check
        assert proxy.connections == 1


async def test_a_cluster_takes_claims_while_one_of_its_masters_does(
    open_store: OpenStore, masters: ClusterDeployment
) -> None:
    """The check of a cluster tries every master, and fails when each of them refuses claims.

    Protection: each master is written to.
    """
    store = await open_store(masters.url)
    await store.check()
    try:
        for number, master in enumerate(masters.masters):
            assert await failure_of(store.check()) is None, f"{number} masters are full"
            master.ask("CONFIG", "SET", "maxmemory", 1)
        assert await failure_of(store.check()) is Reason.STORE_OUT_OF_MEMORY
    finally:
        for master in masters.masters:
            master.ask("CONFIG", "SET", "maxmemory", 0)
    assert await failure_of(store.check()) is None

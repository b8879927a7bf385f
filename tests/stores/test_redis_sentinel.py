"""Claims in a Redis located by Sentinel: failovers need no intervention and never make a second winner."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis
import trustme

from dedup_service.claims import (
    Applied,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    Policies,
    Policy,
    Release,
    StoreRefused,
    StoreUnavailable,
    Transaction,
)
from dedup_service.stores.redis.canary import RedisCanary
from dedup_service.stores.redis.link import FixedServer, OneServer, RedisLink
from dedup_service.stores.redis.sentinel import SentinelLocator
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.redis.url import RedisTarget, parse_redis_url, parse_sentinel_url
from dedup_service.stores.registry import StoreConfig, make_store
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.claims import MINUTE, a_claim
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, free_port
from tests.support.sentinel import SentinelDeployment, SentinelProcess, sentinel_url

MINE = "token-of-the-first"
OTHER = "token-of-another"
IDS = 20

OpenStore = Callable[..., Awaitable[RedisStore]]
StartRedis = Callable[..., RedisProcess]
StartSentinel = Callable[..., SentinelProcess]


@pytest.fixture
async def open_store() -> AsyncIterator[OpenStore]:
    """Opens stores by URL, and closes them at the end."""
    async with contextlib.AsyncExitStack() as opened:

        async def open_it(url: str, *, timeout_ms: int = 1_000) -> RedisStore:
            store = make_store(StoreConfig(url, timeout_ms=timeout_ms))
            assert isinstance(store, RedisStore)
            opened.push_async_callback(store.close)
            await store.open()
            return store

        yield open_it


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[SentinelDeployment]:
    """A master, its replica and three Sentinels."""
    deployment = SentinelDeployment(tmp_path)
    try:
        yield deployment.start()
    finally:
        deployment.stop()


@pytest.fixture
def start_sentinel(tmp_path: Path) -> Iterator[StartSentinel]:
    """Starts single Sentinels, and ends them at the end."""
    with contextlib.ExitStack() as started:

        def start(master_port: int, *lines: str, tls: bool = False) -> SentinelProcess:
            process = SentinelProcess(tmp_path / "sentinel", master_port, *lines, tls=tls)
            started.callback(process.stop)
            return process.start()

        yield start


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[int, list[None]]]:
    """Yield the port of a server that accepts connections and never answers, and a list that grows with each."""
    connections: list[None] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(None)
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                pass
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], connections


async def answered(store: RedisStore, claim: Transaction) -> Transaction | None:
    """Repeat a claim until it is answered, and return the answer."""
    answers: list[Transaction | None] = []

    async def claimed() -> bool:
        with contextlib.suppress(StoreUnavailable):
            answers.append(await store.claim(claim, MINUTE))
        return bool(answers)

    await eventually(claimed, what="an answer")
    return answers[0]


async def holders(store: RedisStore, unique: str, token: str) -> set[str | None]:
    """Claim every id of the test again, and return the tokens of the holders; None is a new claim."""
    found = [await answered(store, a_claim(f"{unique}-{number}", token=token)) for number in range(IDS)]
    return {holder.claim_token if holder else None for holder in found}


async def claim_and_replicate(store: RedisStore, deployment: SentinelDeployment, unique: str) -> None:
    """Claim every id of the test, and return when the replica has the claims."""
    for number in range(IDS):
        assert await store.claim(a_claim(f"{unique}-{number}", token=MINE), MINUTE) is None
    await asyncio.to_thread(deployment.replicate)


async def served_by(store: RedisStore, server: RedisProcess, unique: str) -> None:
    """Return when new claims arrive at this server."""
    with redis.Redis(port=server.port, protocol=2) as client:

        async def arrives() -> bool:
            transaction_id = f"{unique}-{asyncio.get_running_loop().time()}"
            await answered(store, a_claim(transaction_id))
            return bool(client.exists(f"dedup:default:{transaction_id}"))

        await eventually(arrives, what="claims to reach the server")


async def grown_to(seen: list[tuple[str, str | None]], length: int) -> bool:
    """Whether that many answers were seen."""
    return len(seen) >= length


async def reason_of(call: Awaitable[object]) -> tuple[str, Applied, str]:
    """Return reason, `applied` and message of a failed call."""
    with pytest.raises(StoreUnavailable) as caught:
        await call
    return caught.value.reason, caught.value.applied, str(caught.value)


async def test_a_failover_under_load_makes_no_second_winner(
    open_store: OpenStore, deployment: SentinelDeployment, unique: str
) -> None:
    """During a failover replicated claims are answered correctly or not at all, and are served again without help.

    Protection: the master is located for every connection.
    """
    store = await open_store(deployment.url)
    await claim_and_replicate(store, deployment, unique)
    over = asyncio.Event()
    seen: list[tuple[str, str | None]] = []

    async def claim_on(token: str) -> None:
        while not over.is_set():
            for number in range(IDS):
                with contextlib.suppress(StoreUnavailable):
                    holder = await store.claim(a_claim(f"{unique}-{number}", token=token), MINUTE)
                    seen.append((token, holder.claim_token if holder else None))
            await asyncio.sleep(0.005)

    claimers = [asyncio.create_task(claim_on(token)) for token in (MINE, OTHER) * 4]
    await asyncio.to_thread(deployment.fail_over)
    await asyncio.to_thread(wait_until, deployment.replica_is_master, what="the failover")
    await served_by(store, deployment.replica, unique)
    before = len(seen)
    await eventually(lambda: grown_to(seen, before + 200), what="the claimers to go on")
    over.set()
    await asyncio.gather(*claimers)
    assert {holder for _, holder in seen} == {MINE}
    assert {token for token, _ in seen[before:]} == {MINE, OTHER}


async def test_a_killed_master_is_replaced_without_help(
    open_store: OpenStore, deployment: SentinelDeployment, unique: str
) -> None:
    """After the master was killed, the promoted replica serves claims with the same holders.

    Protection: the master is located for every connection.
    """
    store = await open_store(deployment.url)
    assert store.description.startswith('Redis master "mymaster" by Sentinel 127.0.0.1:')
    await claim_and_replicate(store, deployment, unique)
    deployment.master.stop()
    assert await holders(store, unique, MINE) == {MINE}
    assert await holders(store, unique, OTHER) == {MINE}
    assert await answered(store, a_claim(f"{unique}-new")) is None


async def test_a_hanging_master_is_left_when_sentinel_names_another(
    open_store: OpenStore, deployment: SentinelDeployment, unique: str
) -> None:
    """An idle connection to a hanging master moves to the new master before the next claim.

    Protection: the master is located again while connected.
    """
    store = await open_store(deployment.url)
    await claim_and_replicate(store, deployment, unique)
    deployment.master.pause()
    with redis.Redis(port=deployment.replica.port, decode_responses=True) as client:

        def moved() -> bool:
            return any(entry["cmd"] == "role" for entry in client.client_list())

        await asyncio.to_thread(wait_until, moved, what="the store to connect to the new master")
    holder = await store.claim(a_claim(f"{unique}-0", token=OTHER), MINUTE)
    assert holder is not None
    assert holder.claim_token == MINE


async def test_a_deposed_master_that_still_answers_is_left(
    open_store: OpenStore, start_redis: StartRedis, start_sentinel: StartSentinel, unique: str
) -> None:
    """When Sentinel names another master, the service leaves the old one although it still takes claims.

    Protection: the master is located again while connected.
    """
    old, new = start_redis(), start_redis()
    sentinel = start_sentinel(old.port)
    store = await open_store(sentinel_url(sentinel.port))
    assert await store.claim(a_claim(f"{unique}-old"), MINUTE) is None
    await asyncio.to_thread(sentinel.watch, new.port)
    await served_by(store, new, unique)


async def test_a_working_server_is_kept_while_no_sentinel_answers(
    open_store: OpenStore, start_redis: StartRedis, start_sentinel: StartSentinel, unique: str
) -> None:
    """The service keeps a working master when every Sentinel is lost, or has lost the name of the master."""
    server = start_redis()
    sentinel = start_sentinel(server.port)
    store = await open_store(sentinel_url(sentinel.port))
    [(_, link)] = store._nodes.masters()
    channel = link.channel
    with redis.Redis(port=sentinel.port, protocol=2) as admin:
        admin.execute_command("SENTINEL", "REMOVE", "mymaster")
    asked: list[Exception] = []
    locator = link._locator
    locate = locator.locate

    async def watched_locate() -> object:
        try:
            return await locate()
        except (StoreRefused, StoreUnavailable) as error:
            asked.append(error)
            raise

    locator.locate = watched_locate  # type: ignore[method-assign,assignment]

    async def asked_in_vain(kind: type[Exception]) -> bool:
        return any(isinstance(error, kind) for error in asked)

    await eventually(lambda: asked_in_vain(StoreRefused), what="the Sentinel to be asked")
    sentinel.stop()
    await eventually(lambda: asked_in_vain(StoreUnavailable), what="the Sentinel to be asked in vain")
    assert await store.claim(a_claim(unique), MINUTE) is None
    assert link.channel is channel


async def test_a_bug_in_a_recheck_does_not_end_the_rechecks(
    open_store: OpenStore,
    start_redis: StartRedis,
    start_sentinel: StartSentinel,
    unique: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a recheck failed unexpectedly, the next one still detects a new master.

    Protection: the recheck outlives any exception of the locator.
    """
    old, new = start_redis(), start_redis()
    sentinel = start_sentinel(old.port)
    store = await open_store(sentinel_url(sentinel.port))
    locate = SentinelLocator.locate
    failed = asyncio.Event()

    async def fails_once(locator: SentinelLocator) -> RedisTarget:
        if not failed.is_set():
            failed.set()
            raise KeyError("hunter2")
        return await locate(locator)

    monkeypatch.setattr(SentinelLocator, "locate", fails_once)
    async with asyncio.timeout(10):
        await failed.wait()
    assert await store.claim(a_claim(unique), MINUTE) is None
    await asyncio.to_thread(sentinel.watch, new.port)
    await served_by(store, new, unique)


async def test_an_attempt_to_connect_to_a_hanging_server_ends_when_another_is_the_master(
    redis_server: RedisProcess, unique: str
) -> None:
    """A store that connects to a server that hangs serves once another one is named, long before its timeout.

    Protection: the master is located again while connecting.
    """

    class Named(FixedServer):
        recheck_s = 0.01  # type: ignore[assignment]

    async with silent_server() as (port, attempts):
        locator = Named(parse_redis_url(f"redis://127.0.0.1:{port}/0"))
        link = RedisLink(locator, timeout_ms=600_000)
        store = RedisStore(OneServer(link), prefixed_layout("dedup:"), "a test", canary=RedisCanary(b"canary:"))
        link.start()

        async def attempted() -> bool:
            return bool(attempts)

        await eventually(attempted, what="the attempt")
        locator._target = parse_redis_url(redis_server.url)
        async with asyncio.timeout(60):
            assert await answered(store, a_claim(unique)) is None
        await store.close()


@pytest.mark.parametrize("outage", ["killed", "paused", "unknown"])
async def test_a_waiter_survives_the_time_without_a_master(
    open_store: OpenStore, deployment: SentinelDeployment, unique: str, outage: str
) -> None:
    """A waiting duplicate survives lost connections, and the first read after the release wakes it.

    The master is killed, hangs, or is killed while the Sentinels know no master. Protection: neither a lost connection
    nor a store that refuses to work at the moment ends a wait or its poller.
    """
    store = await open_store(deployment.url)
    reads: list[str] = []
    read = store.get

    async def noted(namespace: str, transaction_id: str) -> Transaction | None:
        try:
            found = await read(namespace, transaction_id)
        except Exception as error:
            reads.append(type(error).__name__)
            raise
        reads.append("held" if found else "free")
        return found

    store.get = noted  # type: ignore[method-assign]
    claims = ClaimService(store, Policies(Policy(600_000, 600_000, 600_000)))
    await claims.claim(ClaimRequest(unique, claim_token=MINE))
    await asyncio.to_thread(deployment.replicate)
    waiter = asyncio.create_task(claims.claim(ClaimRequest(unique, claim_token=OTHER, wait_ms=300_000)))

    async def read_as(kind: str) -> None:
        before = len(reads)

        async def seen() -> bool:
            return waiter.done() or kind in reads[before:]

        await eventually(seen, 60, what=f"a read with {kind}")

    await read_as("held")
    if outage == "unknown":
        deployment.forget_master()
    if outage == "paused":
        deployment.master.pause()
    else:
        deployment.master.stop()
    if outage == "unknown":
        await read_as("StoreRefused")
        deployment.promote_by_hand()
    await asyncio.to_thread(wait_until, deployment.replica_is_master, 60, what="the failover")
    await read_as("held")
    # By another process: its own releases wake waiters without a read.
    holder = await open_store(deployment.replica.url)
    assert await holder.release(Release("default", unique, MINE))
    async with asyncio.timeout(60):
        answer = await waiter
    assert (answer.outcome, reads.count("free")) == (ClaimOutcome.CLAIMED, 1)
    await claims.close()


@pytest.mark.parametrize("forbidden", ["", "-role"])
async def test_a_replica_is_not_taken_for_the_master(
    open_store: OpenStore, start_redis: StartRedis, start_sentinel: StartSentinel, unique: str, forbidden: str
) -> None:
    """A replica that Sentinel names, such as one not promoted yet, makes nothing ready.

    Protection: the role is checked after connecting, by INFO where ROLE is forbidden.
    """
    server = start_redis("--replicaof", "127.0.0.1", str(free_port()))
    sentinel = start_sentinel(server.port)
    with redis.Redis(port=server.port) as admin:
        admin.acl_setuser("dedup", enabled=True, nopass=True, keys=["*"], commands=["+@all", *forbidden.split()])
        store = await open_store(sentinel_url(sentinel.port, user="dedup:any@"))
        reason, applied, message = await reason_of(store.check())
        assert (reason, applied) == ("STORE_READ_ONLY", Applied.NO)
        assert "read-only replica" in message
        admin.replicaof("NO", "ONE")
    assert await answered(store, a_claim(unique)) is None


async def test_a_sentinel_that_is_down_is_skipped(
    open_store: OpenStore, start_redis: StartRedis, start_sentinel: StartSentinel, unique: str
) -> None:
    """Of one Sentinel that is down, one that hangs and one that answers, the last one counts."""
    server = start_redis()
    sentinel = start_sentinel(server.port)
    async with silent_server() as (silent, _):
        store = await open_store(sentinel_url(free_port(), silent, sentinel.port), timeout_ms=300)
        assert await store.claim(a_claim(unique), MINUTE) is None


async def test_the_sentinel_that_answered_is_asked_first_next_time(start_sentinel: StartSentinel) -> None:
    """A hanging Sentinel costs its timeout once, not at every call."""
    sentinel = start_sentinel(free_port())
    async with silent_server() as (silent, connections):
        locator = SentinelLocator(parse_sentinel_url(sentinel_url(silent, sentinel.port)), timeout_ms=300)
        assert await locator.locate() == await locator.locate()
        assert len(connections) == 1


async def test_a_sentinel_that_hangs_is_asked_last_also_after_a_cancelled_call(start_sentinel: StartSentinel) -> None:
    """A call that was cancelled while a Sentinel hung leaves the next call to begin with another one.

    Protection: a Sentinel is last in order until it answers. A host that dies with the master and the first Sentinel
    otherwise costs its timeout for each call, and each lost connection cancels one.
    """
    sentinel = start_sentinel(free_port())
    async with silent_server() as (silent, connections):
        locator = SentinelLocator(parse_sentinel_url(sentinel_url(silent, sentinel.port)), timeout_ms=600_000)
        call = asyncio.create_task(locator.locate())

        async def hangs() -> bool:
            return bool(connections)

        await eventually(hangs, what="the first Sentinel to be asked")
        call.cancel()
        async with asyncio.timeout(60):
            await locator.locate()
        assert len(connections) == 1


async def test_an_unknown_master_is_refused_at_startup(open_store: OpenStore, start_sentinel: StartSentinel) -> None:
    """A master unknown to the Sentinels is refused at start-up with a sentence that names it."""
    sentinel = start_sentinel(free_port())
    with pytest.raises(StoreRefused, match=r"knows no master 'another'.*sentinel monitor"):
        await open_store(sentinel_url(sentinel.port, rest="/another"))


async def test_without_any_sentinel_nothing_was_applied(
    open_store: OpenStore, start_redis: StartRedis, unique: str
) -> None:
    """While no Sentinel locates the master, claims certainly were not applied, and the error names the causes."""
    server = start_redis()
    store = await open_store(sentinel_url(free_port(), server.port))
    reason, applied, message = await reason_of(store.claim(a_claim(unique), MINUTE))
    assert (reason, applied) == ("SENTINEL_UNREACHABLE", Applied.NO)
    assert "none of the 2 Sentinels asked" in message
    assert "unknown command" in message


async def test_servers_and_sentinels_have_their_own_passwords(
    open_store: OpenStore, start_redis: StartRedis, start_sentinel: StartSentinel, unique: str
) -> None:
    """User, password and database apply to the servers, the query arguments to the Sentinels; no error shows one."""
    server = start_redis("--requirepass", "p@ss")
    sentinel = start_sentinel(
        server.port,
        'requirepass "s@nt+"',
        "user asker on >s@nt+ +sentinel|get-master-addr-by-name",
        "sentinel auth-pass mymaster p@ss",
    )
    rest = "/mymaster/3?sentinel_username=asker&sentinel_password=s%40nt+"
    store = await open_store(sentinel_url(sentinel.port, user=":p%40ss@", rest=rest))
    assert await store.claim(a_claim(unique), MINUTE) is None
    with redis.Redis(port=server.port, password="p@ss", db=3) as client:
        assert client.exists(f"dedup:default:{unique}")
    for user, rest, expected in (
        (":p%40ss@", "/mymaster?sentinel_password=wr%40ng", "SENTINEL_UNREACHABLE"),
        (":p%40ss@", "/mymaster", "SENTINEL_UNREACHABLE"),
        (":wr%40ng@", "/mymaster?sentinel_password=s%40nt%2B", "STORE_NOT_AUTHENTICATED"),
    ):
        refused = await open_store(sentinel_url(sentinel.port, user=user, rest=rest))
        reason, applied, message = await reason_of(refused.check())
        assert (reason, applied) == (expected, Applied.NO)
        for text in (message, refused.description):
            assert not [secret for secret in ("p@ss", "s@nt", "wr@ng", "%40") if secret in text]


async def test_sentinels_and_servers_are_asked_over_tls(
    open_store: OpenStore, start_redis: StartRedis, start_sentinel: StartSentinel, tmp_path: Path, unique: str
) -> None:
    """`rediss+sentinel://` trusts Sentinels and servers certified by the given authority, and none without it."""
    authority = trustme.CA()
    authority_file, key_file = tmp_path / "ca.pem", tmp_path / "server.pem"
    authority.cert_pem.write_to_path(authority_file)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(key_file)
    options = {
        "tls-cert-file": str(key_file),
        "tls-key-file": str(key_file),
        "tls-ca-cert-file": str(authority_file),
        "tls-auth-clients": "no",
        "tls-replication": "yes",
    }
    server = start_redis(*(part for name, value in options.items() for part in (f"--{name}", value)), tls=True)
    sentinel = start_sentinel(server.tls_port, *(f"{name} {value}" for name, value in options.items()), tls=True)
    rest = f"/mymaster?ssl_ca_certs={authority_file}"
    # A handshake takes its time on a loaded machine.
    store = await open_store(sentinel_url(sentinel.tls_port, scheme="rediss+sentinel", rest=rest), timeout_ms=20_000)
    assert await store.claim(a_claim(unique), MINUTE) is None
    untrusting = await open_store(sentinel_url(sentinel.tls_port, scheme="rediss+sentinel"))
    assert (await reason_of(untrusting.check()))[0] == "SENTINEL_UNREACHABLE"

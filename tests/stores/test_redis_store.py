"""Cases particular to Redis: stored keys and values, foreign claims, refusals, and faults of the connection."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import redis
import trustme

from dedup_service.claims import (
    Applied,
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    HolderRequest,
    InvalidRequest,
    Policies,
    Policy,
    Reason,
    RequestedExpiry,
    StoreNotice,
    StoreRefused,
    StoreUnavailable,
    UnreadableValue,
    system_clock_ms,
)
from dedup_service.stores.redis import channel as channel_module
from dedup_service.stores.redis.canary import RedisCanary
from dedup_service.stores.redis.link import FixedServer, OneServer, RedisLink
from dedup_service.stores.redis.scripts import COMPLETE, EXTEND, RELEASE
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.redis.url import RedisTarget, parse_redis_url
from dedup_service.stores.registry import StoreConfig, make_store
from dedup_service.stores.stored_value import MAX_VALUE_BYTES, prefixed_layout
from tests.support.claims import MINUTE, a_claim
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually
from tests.support.processes import RedisProcess, free_port
from tests.support.scripted_redis import ScriptedRedis, says

TOKEN = "token-of-sixteen"

OpenStore = Callable[..., Awaitable[RedisStore]]


@pytest.fixture
async def open_store(redis_server: RedisProcess) -> AsyncIterator[OpenStore]:
    """Opens stores by URL and settings, and closes them at the end."""
    opened: list[RedisStore] = []

    async def open_it(url: str = "", *, layout: str = "prefixed", timeout_ms: int = 5_000) -> RedisStore:
        store = make_store(StoreConfig(url or redis_server.url, layout, timeout_ms=timeout_ms))
        assert isinstance(store, RedisStore)
        opened.append(store)
        await store.open()
        return store

    yield open_it
    for store in opened:
        await store.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis for this test only, to reconfigure, stop and break; not started yet."""
    server = RedisProcess(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def tls_redis(tmp_path: Path) -> Iterator[tuple[RedisProcess, Path]]:
    """A Redis that also speaks TLS, and the certificate of the authority that vouches for it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority_file, key_file = tmp_path / "ca.pem", tmp_path / "server.pem"
    authority.cert_pem.write_to_path(authority_file)
    certificate.private_key_and_cert_chain_pem.write_to_path(key_file)
    files = ("--tls-cert-file", key_file, "--tls-key-file", key_file, "--tls-ca-cert-file", authority_file)
    server = RedisProcess(tmp_path, *map(str, files), "--tls-auth-clients", "no", tls=True).start()
    yield server, authority_file
    server.stop()


def service_over(store: RedisStore) -> ClaimService:
    """Return the claim semantics over a store."""
    return ClaimService(store, Policies(Policy(default_ttl_ms=60_000, max_ttl_ms=86_400_000, retention_ms=60_000)))


async def test_key_and_value_are_as_documented(open_store: OpenStore, redis_client: redis.Redis, unique: str) -> None:
    """A claim is one key `{prefix}{namespace}:{id}` with a msgpack array, version first, and an expiry."""
    store = await open_store()
    claim = a_claim(unique, namespace="pay", claimant="w", payload_fingerprint=b"\x01")
    await store.claim(claim, MINUTE)
    key = f"dedup:pay:{unique}"
    assert msgpack.unpackb(redis_client.get(key)) == [
        *(1, "token-of-sixteen", "w", claim.claim_time_ms, claim.expire_time_ms, 1, b"\x01", 0, b"")
    ]
    assert 59_000 < redis_client.pttl(key) <= 60_000


async def test_raw_layout_and_the_original_see_each_other(
    open_store: OpenStore, redis_client: redis.Redis, unique: str
) -> None:
    """A flag set by the original service is a duplicate here, and its SET NX fails against a claim of this service."""
    store = await open_store(layout="raw")
    service = service_over(store)
    theirs = f"lucky_box:{unique}:405:daily:2025-11-28"
    assert redis_client.set(theirs, b"\xc3", nx=True, ex=60)
    answer = await service.claim(ClaimRequest(theirs))
    assert answer.outcome is ClaimOutcome.DUPLICATE
    assert (answer.transaction.claimant, answer.transaction.claim_time_ms) == ("", None)

    ours = f"lucky_box:{unique}:406:daily:2025-11-28"
    assert (await service.claim(ClaimRequest(ours))).outcome is ClaimOutcome.CLAIMED
    assert redis_client.set(ours, b"\xc3", nx=True, ex=60) is None
    redis_client.delete(theirs, ours)


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
async def test_an_empty_foreign_value_is_a_duplicate(
    open_store: OpenStore, redis_client: redis.Redis, unique: str, layout: str
) -> None:
    """A key with an empty value is held by an unknown holder, and the other entries of its batch get their own answers.

    Protection: an empty reply is a value, and only nil means that the claim was stored.
    """
    store = await open_store(layout=layout)
    service = service_over(store)
    key = f"dedup:default:{unique}" if layout == "prefixed" else unique
    redis_client.set(key, b"", px=30_000)
    names = [f"{unique}-before", unique, f"{unique}-after"]
    answers = await service.claim_all([ClaimRequest(name) for name in names])
    outcomes = [answer.outcome if isinstance(answer, ClaimAnswer) else answer for answer in answers]
    assert outcomes == [ClaimOutcome.CLAIMED, ClaimOutcome.DUPLICATE, ClaimOutcome.CLAIMED]
    single = await service.claim(ClaimRequest(unique))
    assert (single.outcome, single.transaction.claim_token) == (ClaimOutcome.DUPLICATE, None)
    found = await service.get("default", unique)
    assert (found.claim_token, found.expire_time_ms) == (None, redis_client.pexpiretime(key))
    assert redis_client.get(key) == b""
    for name in names[::2]:
        assert await store.get("default", name) is not None
    redis_client.delete(*names)


@pytest.mark.parametrize("begin", [b"plain", b"\x99\x01"], ids=["text", "array"])
async def test_a_long_foreign_value_is_a_duplicate_and_is_not_read(
    open_store: OpenStore, redis_server: RedisProcess, redis_client: redis.Redis, unique: str, begin: bytes
) -> None:
    """A value of 80 MiB is held by an unknown holder, and less than 64 KiB of it reaches the service.

    Every caller shares one connection, so others would wait for the rest. Protection: Redis compares the length first.
    """
    redis_client.setrange(unique, 80 * 1024 * 1024 - 1, b"!")
    redis_client.setrange(unique, 0, begin)
    redis_client.pexpire(unique, 600_000)
    async with FaultProxy(redis_server.port) as proxy:
        service = service_over(await open_store(proxy.url, layout="raw"))
        by_ttl = ClaimRequest(unique, claim_token=TOKEN)
        by_time = by_ttl._replace(expiry=RequestedExpiry(time_ms=system_clock_ms() + 60_000))
        waiting = by_ttl._replace(wait_ms=300)
        answers = [await service.claim(request) for request in (by_ttl, by_time, waiting)]
        answers += await service.claim_all([by_ttl, by_time])  # type: ignore[arg-type]
        assert [answer.outcome for answer in answers] == [ClaimOutcome.DUPLICATE] * 5
        found = await service.get("default", unique)
        assert (found.claim_token, found.expire_time_ms) == (None, redis_client.pexpiretime(unique))
        holder = HolderRequest(unique, claim_token=TOKEN)
        for change in (service.complete, service.extend, service.release):
            assert not await change(holder)
        await service.close()
        assert proxy.bytes_downstream < 64 * 1024
    # The scripts of the changes have not copied it either.
    assert redis_client.info("memory")["used_memory_lua"] < 40 * 1024 * 1024
    assert redis_client.strlen(unique) == 80 * 1024 * 1024
    redis_client.delete(unique)


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
async def test_the_longest_value_of_this_service_is_read(
    open_store: OpenStore, redis_client: redis.Redis, unique: str, layout: str
) -> None:
    """A value with the largest result and every field at its limit is still recognised, and is then at its holder's."""
    store = await open_store(layout=layout)
    service = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)), max_result_bytes=1_048_576)
    request = ClaimRequest(
        unique.ljust(512, "x"), claim_token="t" * 64, claimant="c" * 256, payload_fingerprint=bytes(64)
    )
    assert (await service.claim(request)).outcome is ClaimOutcome.CLAIMED
    holder = HolderRequest(request.transaction_id, claim_token="t" * 64, result=bytes(1_048_576))
    completed = await service.complete(holder)
    assert completed is not None
    assert await service.complete(holder) == completed
    assert (await service.claim(request)).transaction == completed
    assert await service.get("default", request.transaction_id) == completed
    [key] = redis_client.scan_iter(f"*{unique}*", count=10_000)
    assert redis_client.strlen(key) < MAX_VALUE_BYTES
    redis_client.delete(key)


async def test_a_foreign_claim_is_looked_up_with_its_expiry(
    open_store: OpenStore, redis_client: redis.Redis, unique: str
) -> None:
    """A look-up of a claim by an unknown holder returns its expiry, or none for a key without an expiry."""
    store = await open_store(layout="raw")
    redis_client.set(unique, b"\xc3", px=30_000)
    found = await store.get("default", unique)
    assert found is not None
    assert found.expire_time_ms == redis_client.pexpiretime(unique)
    redis_client.set(unique, b"\xc3")
    found = await store.get("default", unique)
    assert found is not None
    assert found.expire_time_ms is None
    redis_client.delete(unique)


async def test_raw_layout_has_one_namespace(open_store: OpenStore, unique: str) -> None:
    """In the raw layout another namespace is refused: its keys would collide with those of the default one."""
    service = service_over(await open_store(layout="raw"))
    with pytest.raises(InvalidRequest, match="namespace"):
        await service.claim(ClaimRequest(unique, namespace="pay"))
    with pytest.raises(InvalidRequest, match="namespace"):
        await service.get("pay", unique)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(msgpack.packb([2, "x"]), "VALUE_VERSION_UNKNOWN"), (msgpack.packb([1, "too short"]), "VALUE_DAMAGED")],
)
async def test_an_unreadable_value_is_neither_go_nor_duplicate(
    open_store: OpenStore, redis_client: redis.Redis, unique: str, value: bytes, reason: str
) -> None:
    """A value of another version, or a damaged one, fails the claim and is left unchanged."""
    store = await open_store()
    redis_client.set(f"dedup:default:{unique}", value, px=60_000)
    with pytest.raises(UnreadableValue) as caught:
        await store.claim(a_claim(unique), MINUTE)
    assert caught.value.reason == reason
    assert redis_client.get(f"dedup:default:{unique}") == value


async def test_a_key_of_another_type_is_left_alone(
    open_store: OpenStore, redis_client: redis.Redis, unique: str
) -> None:
    """A hash under the key of a transaction fails claim and look-up, and is left unchanged."""
    store = await open_store()
    key = f"dedup:default:{unique}"
    redis_client.hset(key, "field", "value")
    redis_client.expire(key, 60)
    for call in (store.claim(a_claim(unique), MINUTE), store.get("default", unique)):
        with pytest.raises(UnreadableValue) as caught:
            await call
        assert caught.value.reason == "KEY_OF_ANOTHER_TYPE"
    assert redis_client.hgetall(key) == {b"field": b"value"}


async def test_forgotten_scripts_are_loaded_again(
    open_store: OpenStore, redis_client: redis.Redis, unique: str
) -> None:
    """After SCRIPT FLUSH a change still works, and is carried out once."""
    service = service_over(await open_store())
    await service.claim(ClaimRequest(unique, claim_token=TOKEN))
    holder = HolderRequest(unique, claim_token=TOKEN)
    for change in (service.extend, service.complete, service.complete):
        redis_client.script_flush()
        assert await change(holder) is not None
    redis_client.script_flush()
    assert not await service.release(holder)
    assert len(redis_client.script_exists(COMPLETE.sha, EXTEND.sha, RELEASE.sha)) == 3


async def test_fields_of_a_newer_version_survive_a_change(
    open_store: OpenStore, redis_client: redis.Redis, unique: str
) -> None:
    """Extending and completing keep the fields that a newer writer added at the end of the value."""
    service = service_over(await open_store())
    await service.claim(ClaimRequest(unique, claim_token=TOKEN, payload_fingerprint=b"\xff" * 64))
    key = f"dedup:default:{unique}"
    newer = [*msgpack.unpackb(redis_client.get(key)), "added", b"\xfe", 7]
    redis_client.set(key, msgpack.packb(newer), keepttl=True)
    holder = HolderRequest(unique, claim_token=TOKEN, result=b"paid", expiry=RequestedExpiry(70_000))
    assert await service.extend(holder) is not None
    assert await service.complete(holder) is not None
    fields = msgpack.unpackb(redis_client.get(key))
    assert fields[9:] == ["added", b"\xfe", 7]
    assert (fields[5], fields[8]) == (2, b"paid")
    assert 60_000 < redis_client.pttl(key) <= 70_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (msgpack.packb([2, TOKEN]), "VALUE_VERSION_UNKNOWN"),
        (msgpack.packb([1, TOKEN] + [0] * 20), "VALUE_VERSION_UNKNOWN"),
        (msgpack.packb([1, TOKEN]), "VALUE_DAMAGED"),
        (msgpack.packb([1, TOKEN, "", 1, 2, 1, b"x" * 9])[:-3], "VALUE_DAMAGED"),
        (b"\xc3", None),
        (b"plain", None),
        (b"", None),
        (b"\x91", None),
        (msgpack.packb(["1", TOKEN]), None),
    ],
)
async def test_a_change_leaves_an_unreadable_value_alone(
    open_store: OpenStore, redis_client: redis.Redis, unique: str, value: bytes, reason: str | None
) -> None:
    """Values of another version fail a change, foreign values are NOT_HELD, and neither is changed."""
    service = service_over(await open_store())
    key = f"dedup:default:{unique}"
    redis_client.set(key, value, px=60_000)
    holder = HolderRequest(unique, claim_token=TOKEN)
    for change in (service.complete, service.extend, service.release):
        if reason is None:
            assert not await change(holder)
        else:
            with pytest.raises(UnreadableValue) as caught:
                await change(holder)
            assert caught.value.reason == reason
    assert redis_client.get(key) == value


async def test_the_connection_sends_nothing_by_itself(
    open_store: OpenStore, redis_server: RedisProcess, unique: str
) -> None:
    """A connection sends INFO and ROLE, and then only commands of the store: no HELLO, no notifications.

    Protection: the explicit protocol and the options of redis-py that are off; its defaults send HELLO and CLIENT.
    """
    async with FaultProxy(redis_server.port) as proxy:
        store = await open_store(proxy.url)
        assert await store.claim(a_claim(unique), MINUTE) is None
        assert await store.claim(a_claim(unique), MINUTE) is not None
        sent = proxy.sent_upstream.split(b"\r\n")
        # A command begins with the number of its parts and the length of its name.
        names = [sent[at + 2] for at, line in enumerate(sent) if line.startswith(b"*")]
        assert names == [b"INFO", b"ROLE", b"SET", b"SET"]


async def test_a_lost_reply_is_doubt_and_the_same_token_resolves_it(
    open_store: OpenStore, redis_server: RedisProcess, unique: str
) -> None:
    """After a lost reply the outcome is unknown; a retry with the token is then CLAIMED, another one DUPLICATE.

    Protection: no client retries (a resent SET NX would read its own value back), and the token in the value.
    """
    async with FaultProxy(redis_server.port) as proxy:
        service = service_over(await open_store(proxy.url))
        request = ClaimRequest(unique, claim_token="token-of-sixteen")
        proxy.swallow_replies = True
        with pytest.raises(StoreUnavailable) as caught:
            await service.claim(request)
        assert (caught.value.reason, caught.value.applied) == ("STORE_CONNECTION_LOST", Applied.UNKNOWN)
        assert bytes(proxy.sent_upstream).count(b"\r\nSET\r\n") == 1
        proxy.swallow_replies = False
        other = await answered(service, request._replace(claim_token="another-token-16"))
        again = await answered(service, request)
    assert other is ClaimOutcome.DUPLICATE
    assert again is ClaimOutcome.CLAIMED


async def answered(service: ClaimService, request: ClaimRequest) -> ClaimOutcome:
    """Return the outcome of a claim, once the store can be reached again."""
    outcomes: list[ClaimOutcome] = []

    async def claimed() -> bool:
        try:
            outcomes.append((await service.claim(request)).outcome)
        except StoreUnavailable:
            return False
        return True

    await eventually(claimed, what="an answer")
    return outcomes[-1]


async def test_an_overdue_reply_is_doubt_and_ends_the_connection(
    open_store: OpenStore, redis_server: RedisProcess, unique: str
) -> None:
    """If Redis does not answer in time the outcome is unknown to every caller, and no late reply answers a call.

    Protection: the watchdog over the oldest command, and a connection that ends with it.
    """
    async with FaultProxy(redis_server.port) as proxy:
        service = service_over(await open_store(proxy.url, timeout_ms=300))
        proxy.hold_replies.clear()
        requests = [ClaimRequest(f"{unique}-{number}", claim_token=f"token-number-{number:04}") for number in range(20)]
        results = await asyncio.gather(*(service.claim(request) for request in requests), return_exceptions=True)
        assert {(type(e), getattr(e, "reason", ""), getattr(e, "applied", "")) for e in results} == {
            (StoreUnavailable, "STORE_TIMEOUT", Applied.UNKNOWN)
        }
        proxy.hold_replies.set()
        assert await answered(service, ClaimRequest(f"{unique}-new")) is ClaimOutcome.CLAIMED
        for request in requests:
            assert await answered(service, request) is ClaimOutcome.CLAIMED


async def test_stray_bytes_never_answer_a_claim(open_store: OpenStore, redis_server: RedisProcess, unique: str) -> None:
    """Unsolicited bytes end the connection; Redis answers the next claim on another one.

    Protection: the channel ends on a reply to no command.
    """
    async with FaultProxy(redis_server.port) as proxy:
        service = service_over(await open_store(proxy.url))
        assert await answered(service, ClaimRequest(unique)) is ClaimOutcome.CLAIMED
        proxy.inject(b"$-1\r\n")

        async def reconnected() -> bool:
            return proxy.connections == 2

        await eventually(reconnected, what="a new connection")
        assert await answered(service, ClaimRequest(unique)) is ClaimOutcome.DUPLICATE


async def test_nonsense_from_redis_ends_the_connection(
    open_store: OpenStore, redis_server: RedisProcess, unique: str
) -> None:
    """Bytes outside the protocol of Redis fail the waiting callers as unknown, and never answer a call."""
    async with FaultProxy(redis_server.port) as proxy:
        store = await open_store(proxy.url)
        proxy.hold_replies.clear()
        waiting = asyncio.create_task(store.claim(a_claim(unique), MINUTE))

        async def sent() -> bool:
            return b"\r\nSET\r\n" in proxy.sent_upstream

        await eventually(sent, what="the command")
        proxy.inject(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(StoreUnavailable) as caught:
            await waiting
        assert (caught.value.reason, caught.value.applied) == ("STORE_PROTOCOL_ERROR", Applied.UNKNOWN)
        proxy.hold_replies.set()


async def test_random_cancels_cost_no_connection_and_mix_nothing_up(
    open_store: OpenStore, redis_server: RedisProcess, unique: str
) -> None:
    """Of 3,000 claims a random third is cancelled: every other answer reaches its own caller, over one connection.

    Protection: replies to cancelled callers are read in their turn.
    """
    async with FaultProxy(redis_server.port) as proxy:
        store = await open_store(proxy.url)
        chance = random.Random(20251128)

        async def claim(number: int) -> None:
            mine = a_claim(f"{unique}-{number}", token=f"token-number-{number:04}")
            held = mine._replace(claim_token="another-token-16")
            assert await store.claim(mine, MINUTE) is None
            assert await store.claim(held, MINUTE) == mine

        tasks: list[asyncio.Task[None]] = []
        for number in range(3_000):
            tasks.append(asyncio.create_task(claim(number)))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            if chance.random() < 0.35:
                chance.choice(tasks[-50:]).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = [result for result in results if isinstance(result, asyncio.CancelledError)]
        assert [result for result in results if result is not None and result not in cancelled] == []
        assert len(cancelled) > 500
        assert proxy.connections == 1


async def test_too_many_unanswered_commands_are_refused_unsent(
    open_store: OpenStore, redis_server: RedisProcess, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit of unanswered commands a claim is refused at once, certainly not applied.

    Protection: the bounded queue of the channel.
    """
    monkeypatch.setattr(channel_module, "MAX_UNANSWERED", 10)
    async with FaultProxy(redis_server.port) as proxy:
        store = await open_store(proxy.url)
        proxy.hold_replies.clear()
        claims = [asyncio.create_task(store.claim(a_claim(f"{unique}-{n}"), MINUTE)) for n in range(11)]
        done, waiting = await asyncio.wait(claims, return_when=asyncio.FIRST_COMPLETED)
        error = done.pop().exception()
        assert isinstance(error, StoreUnavailable)
        assert (error.reason, error.applied, len(waiting)) == ("STORE_QUEUE_FULL", Applied.NO, 10)
        proxy.hold_replies.set()
        assert await asyncio.gather(*waiting) == [None] * 10


async def test_a_check_reaches_redis_past_a_full_queue(
    open_store: OpenStore, redis_server: RedisProcess, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check is not refused because of waiting claims, and is answered once Redis answers.

    Protection: the check may pass the limit of the queue.
    """
    monkeypatch.setattr(channel_module, "MAX_UNANSWERED", 10)
    async with FaultProxy(redis_server.port) as proxy:
        store = await open_store(proxy.url)
        proxy.hold_replies.clear()
        claims = [asyncio.create_task(store.claim(a_claim(f"{unique}-{n}"), MINUTE)) for n in range(10)]
        await asyncio.sleep(0)
        check = asyncio.create_task(store.check())
        await asyncio.sleep(0)
        assert not check.done()
        proxy.hold_replies.set()
        assert await check == []
        assert await asyncio.gather(*claims) == [None] * 10


def unanswered(store: RedisStore) -> int:
    """Return the number of commands that wait for a reply from the only Redis of a store."""
    [(_, link)] = store._nodes.masters()
    assert link.channel is not None
    return len(link.channel._unanswered)


def full_batches(service: ClaimService, unique: str, count: int) -> list[asyncio.Task[list[ClaimAnswer | Exception]]]:
    """Begin `count` batches of 1,000 claims each."""
    requests = [[ClaimRequest(f"{unique}-{n}-{k}") for k in range(1_000)] for n in range(count)]
    return [asyncio.create_task(service.claim_all(batch)) for batch in requests]


async def test_batches_leave_the_queue_to_single_claims(
    open_store: OpenStore, own_redis: RedisProcess, unique: str
) -> None:
    """Of 30 batches of 1,000 claims a part waits for Redis, a single claim follows it at once, and all are claimed.

    Protection: batches reach the store in slices, a few at a time.
    """
    own_redis.start()
    async with FaultProxy(own_redis.port) as proxy:
        store = await open_store(proxy.url, timeout_ms=60_000)
        service = service_over(store)
        proxy.hold_replies.clear()
        batches = full_batches(service, unique, 30)

        async def sent() -> bool:
            return unanswered(store) == 1_000

        await eventually(sent, what="the first slices")
        single = asyncio.create_task(service.claim(ClaimRequest(f"{unique}-single")))
        await asyncio.sleep(0)
        assert unanswered(store) == 1_001
        proxy.hold_replies.set()
        answer = await single
        assert answer.outcome is ClaimOutcome.CLAIMED
        assert sum(batch.done() for batch in batches) < 30
        outcomes = {
            one.outcome if isinstance(one, ClaimAnswer) else one
            for answers in await asyncio.gather(*batches)
            for one in answers
        }
        assert outcomes == {ClaimOutcome.CLAIMED}


async def test_waiting_batches_end_with_the_store(open_store: OpenStore, own_redis: RedisProcess, unique: str) -> None:
    """When the store closes, the slices at Redis are unknown, and the waiting ones are refused and never sent."""
    own_redis.start()
    async with FaultProxy(own_redis.port) as proxy:
        store = await open_store(proxy.url, timeout_ms=60_000)
        service = service_over(store)
        proxy.hold_replies.clear()
        batches = full_batches(service, unique, 3)

        async def sent() -> bool:
            return proxy.sent_upstream.count(b"\r\nSET\r\n") == 1_000

        await eventually(sent, what="the first slices")
        await store.close()
        answers = [one for answers in await asyncio.gather(*batches) for one in answers]
        ends = Counter(one.applied for one in answers if isinstance(one, StoreUnavailable))
        assert ends == {Applied.UNKNOWN: 1_000, Applied.NO: 2_000}
    with redis.Redis(port=own_redis.port) as client:
        assert client.dbsize() <= 1_000


async def test_a_redis_that_comes_later_is_used_by_itself(
    open_store: OpenStore, own_redis: RedisProcess, unique: str
) -> None:
    """A store opens while Redis is down, refuses claims as certainly not applied, and serves once Redis runs."""
    port = free_port()
    store = await open_store(f"redis://127.0.0.1:{port}")
    with pytest.raises(StoreUnavailable) as caught:
        await store.claim(a_claim(unique), MINUTE)
    assert (caught.value.reason, caught.value.applied) == ("STORE_UNREACHABLE", Applied.NO)
    own_redis.start(port)
    assert await answered(service_over(store), ClaimRequest(unique)) is ClaimOutcome.CLAIMED


def store_over(locator: FixedServer) -> RedisStore:
    """Return a store whose link asks this locator."""
    link = RedisLink(locator, timeout_ms=5_000)
    return RedisStore(OneServer(link), prefixed_layout("dedup:"), "a test", canary=RedisCanary(b"canary:"))


async def test_a_bug_while_connecting_leaves_no_caller_waiting(redis_server: RedisProcess, unique: str) -> None:
    """When connecting fails unexpectedly, callers are refused, and the link tries again.

    Protection: the keeper of the connection outlives any exception of an attempt.
    """
    target = parse_redis_url(redis_server.url)
    attempts = 0

    class Forgetful(FixedServer):
        async def locate(self) -> RedisTarget:
            nonlocal attempts
            attempts += 1
            if attempts <= 2:
                raise KeyError("hunter2")
            return await super().locate()

    store = store_over(Forgetful(target))
    await store.open()
    with pytest.raises(StoreUnavailable) as caught:
        await store.claim(a_claim(unique), MINUTE)
    assert (caught.value.reason, caught.value.applied) == ("STORE_UNREACHABLE", Applied.NO)
    assert "hunter2" not in str(caught.value)
    assert await answered(service_over(store), ClaimRequest(unique)) is ClaimOutcome.CLAIMED
    await store.close()


async def test_closing_ends_also_when_a_cancellation_is_swallowed(redis_server: RedisProcess) -> None:
    """A store closes even if an attempt to connect swallows its cancellation and succeeds.

    Protection: the keeper of the connection is cancelled until it has ended.
    """
    target = parse_redis_url(redis_server.url)
    connecting = asyncio.Event()

    class Swallowing(FixedServer):
        async def locate(self) -> RedisTarget:
            connecting.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return await super().locate()

    store = store_over(Swallowing(target))
    opening = asyncio.create_task(store.open())
    await connecting.wait()
    await store.close()
    await opening


async def test_a_restarted_redis_is_used_again(open_store: OpenStore, own_redis: RedisProcess, unique: str) -> None:
    """After a restart of Redis claims are served again without help."""
    own_redis.start()
    service = service_over(await open_store(own_redis.url))
    assert await answered(service, ClaimRequest(f"{unique}-1")) is ClaimOutcome.CLAIMED
    own_redis.stop()
    own_redis.start(own_redis.port)
    assert await answered(service, ClaimRequest(f"{unique}-2")) is ClaimOutcome.CLAIMED


async def test_a_flush_is_noticed(open_store: OpenStore, own_redis: RedisProcess) -> None:
    """After FLUSHALL one check reports that claims were lost, and the next ones report nothing.

    Protection: the canary.
    """
    own_redis.start()
    store = await open_store(own_redis.url)
    notices: list[StoreNotice] = []

    async def noticed() -> bool:
        notices.extend(await store.check())
        return bool(notices)

    for _ in range(3):
        assert not await noticed()
    with redis.Redis(port=own_redis.port) as admin:
        admin.flushall()
    await eventually(noticed, what="the notice")
    assert [(notice.event, notice.forgot) for notice in notices] == [("claims_forgotten", True)]
    for _ in range(3):
        assert not await store.check()


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ({"maxmemory": "1"}, "STORE_OUT_OF_MEMORY"),
        ({"min-replicas-to-write": "1"}, "STORE_TOO_FEW_REPLICAS"),
    ],
)
async def test_a_refused_claim_was_not_applied(
    open_store: OpenStore, own_redis: RedisProcess, unique: str, configuration: dict[str, str], reason: str
) -> None:
    """A Redis without memory or replicas refuses a claim, which is then certainly not applied."""
    own_redis.start()
    store = await open_store(own_redis.url)
    with redis.Redis(port=own_redis.port) as admin:
        for name, value in configuration.items():
            admin.config_set(name, value)
    with pytest.raises(StoreUnavailable) as caught:
        await store.claim(a_claim(unique), MINUTE)
    assert (caught.value.reason, caught.value.applied) == (reason, Applied.NO)


async def test_a_read_only_replica_refuses_and_the_connection_is_replaced(
    open_store: OpenStore, own_redis: RedisProcess, unique: str
) -> None:
    """A primary that became a replica refuses claims; they are served by a new connection to a primary.

    Protection: READONLY retires the connection.
    """
    own_redis.start()
    async with FaultProxy(own_redis.port) as proxy:
        store = await open_store(proxy.url)
        with redis.Redis(port=own_redis.port) as admin:
            admin.replicaof("127.0.0.1", free_port())
            with pytest.raises(StoreUnavailable) as caught:
                await store.claim(a_claim(unique), MINUTE)
            assert (caught.value.reason, caught.value.applied) == ("STORE_READ_ONLY", Applied.NO)
            admin.replicaof("NO", "ONE")
        assert await answered(service_over(store), ClaimRequest(unique)) is ClaimOutcome.CLAIMED
        assert proxy.connections >= 2


async def test_user_password_and_database_come_from_the_url(
    open_store: OpenStore, own_redis: RedisProcess, unique: str
) -> None:
    """User name, password (percent-encoded) and database of the URL are used; a wrong password is reported."""
    own_redis.start()
    with redis.Redis(port=own_redis.port, db=3) as admin:
        admin.execute_command(
            *(
                "ACL",
                "SETUSER",
                "dedup",
                "on",
                ">p@ss/word",
                "~dedup:*",
                "+set",
                "+get",
                "+strlen",
                "+del",
                "+eval",
                "+evalsha",
                "+pexpiretime",
                "+pexpireat",
                "+select",
                "+time",
            )
        )
        store = await open_store(f"redis://dedup:p%40ss%2Fword@127.0.0.1:{own_redis.port}/3")
        await store.check()
        assert await store.claim(a_claim(unique), MINUTE) is None
        assert admin.exists(f"dedup:default:{unique}")
        holder = HolderRequest(unique, claim_token=TOKEN)
        assert await service_over(store).extend(holder)
        assert await service_over(store).complete(holder)
        assert "p@ss" not in store.description

        wrong = await open_store(f"redis://dedup:wrong@127.0.0.1:{own_redis.port}/3")
        with pytest.raises(StoreUnavailable) as caught:
            await wrong.check()
        assert caught.value.reason == "STORE_NOT_AUTHENTICATED"
        assert "wrong@" not in str(caught.value)

        admin.execute_command("ACL", "SETUSER", "dedup", "-set")
        with pytest.raises(StoreUnavailable) as caught:
            await store.claim(a_claim(f"{unique}-2"), MINUTE)
        assert (caught.value.reason, caught.value.applied) == ("STORE_NOT_PERMITTED", Applied.NO)


async def test_claims_travel_over_tls(open_store: OpenStore, tls_redis: tuple[RedisProcess, Path], unique: str) -> None:
    """`rediss://` works with the certificate of the authority, and fails without it."""
    server, authority = tls_redis
    store = await open_store(f"rediss://127.0.0.1:{server.tls_port}/0?ssl_ca_certs={authority}")
    service = service_over(store)
    assert await answered(service, ClaimRequest(unique)) is ClaimOutcome.CLAIMED
    assert await answered(service, ClaimRequest(unique)) is ClaimOutcome.DUPLICATE
    untrusting = await open_store(f"rediss://127.0.0.1:{server.tls_port}/0")
    with pytest.raises(StoreUnavailable) as caught:
        await untrusting.check()
    assert caught.value.reason == "STORE_UNREACHABLE"


async def protocol_error_of(call: Awaitable[object]) -> tuple[Reason, Applied]:
    """Return reason and `applied` of a failed call whose message names the remedy."""
    with pytest.raises(StoreUnavailable) as caught:
        await call
    assert "proxy" in str(caught.value)
    return caught.value.reason, caught.value.applied


@pytest.mark.parametrize("reply", [b":1700000000\r\n", b"*0\r\n", b"*1\r\n*0\r\n", b"*1\r\n-ERR inside\r\n"])
async def test_a_malformed_reply_to_the_check_makes_the_store_unavailable(open_store: OpenStore, reply: bytes) -> None:
    """A malformed reply to the write of the check fails it as a protocol error.

    Protection: any other exception would end the task that checks the store, and its last state would stay.
    """
    async with ScriptedRedis(says(reply)) as server:
        store = await open_store(server.url)
        reason, _ = await protocol_error_of(store.check())
        assert reason is Reason.STORE_PROTOCOL_ERROR


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"$-1\r\n", b"*0\r\n", b"$2\r\n77\r\n"])
async def test_a_malformed_expiry_makes_the_store_unavailable(open_store: OpenStore, unique: str, reply: bytes) -> None:
    """A malformed reply to PEXPIRETIME fails the look-up of a foreign claim as a protocol error."""
    async with ScriptedRedis(says(b"$-1\r\n"), get=says(b"$1\r\nx\r\n"), pexpiretime=says(reply)) as server:
        store = await open_store(server.url)
        assert (await protocol_error_of(store.get("default", unique)))[0] is Reason.STORE_PROTOCOL_ERROR


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"$-1\r\n", b"*0\r\n", b"$1\r\n1\r\n"])
async def test_a_malformed_reply_to_wait_is_doubt(unique: str, reply: bytes) -> None:
    """After a malformed reply to WAIT it is unknown whether replicas have the claim."""
    async with ScriptedRedis(says(b"$-1\r\n"), wait=says(reply)) as server:
        store = make_store(StoreConfig(server.url, min_replicas=1))
        await store.open()
        failure = await protocol_error_of(store.claim(a_claim(unique), MINUTE))
        await store.close()
    assert failure == (Reason.STORE_PROTOCOL_ERROR, Applied.UNKNOWN)


async def serve_info(info: bytes) -> asyncio.Server:
    """Serve a Redis that answers INFO with `info` and nothing else: a version that cannot be installed here."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(b"$%d\r\n%b\r\n" % (len(info), info))
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        (b"# Server\r\nredis_version:6.2.14\r\nredis_mode:standalone\r\n", "use Redis 7.0 or newer"),
        (b"# Server\r\nredis_version:7.0.15\r\nredis_mode:sentinel\r\n", "name the Redis server itself"),
    ],
)
async def test_a_server_that_can_never_serve_is_refused_at_once(
    open_store: OpenStore, info: bytes, sentence: str
) -> None:
    """A Redis that is too old, or a Sentinel, is refused at start-up with a sentence that names the remedy."""
    async with await serve_info(info) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(StoreRefused, match=sentence):
            await open_store(f"redis://127.0.0.1:{port}")

"""Claims in a real Redis Cluster: the promises hold while slots move and nodes die, without intervention."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest
import redis
import trustme
from redis.crc import key_slot

from dedup_service.claims import (
    Applied,
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    Completion,
    Policies,
    Policy,
    Release,
    StoreRefused,
    StoreUnavailable,
    Transaction,
)
from dedup_service.claims.store import Severity
from dedup_service.stores.redis.cluster import ClusterNodes, SlotRange, _slot_ranges
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.redis.url import RedisTarget
from dedup_service.stores.registry import StoreConfig, examine_store, make_store
from tests.support.claims import MINUTE, a_claim, lasting
from tests.support.cluster import ClusterDeployment, ClusterNode
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess

MINE = "token-of-the-first"
OTHER = "token-of-another"
IDS = 60

OpenStore = Callable[..., Awaitable[RedisStore]]


@pytest.fixture
async def open_store() -> AsyncIterator[OpenStore]:
    """Opens stores by URL, and closes them at the end."""
    async with contextlib.AsyncExitStack() as opened:

        async def open_it(url: str, **settings: int) -> RedisStore:
            store = make_store(StoreConfig(url, **settings))  # type: ignore[arg-type]
            assert isinstance(store, RedisStore)
            opened.push_async_callback(store.close)
            await store.open()
            return store

        yield open_it


@pytest.fixture
def six_nodes(tmp_path: Path) -> Iterator[ClusterDeployment]:
    """Three masters with a replica each, for one test only."""
    deployment = ClusterDeployment(tmp_path)
    try:
        yield deployment.start()
    finally:
        deployment.stop()


def key_of(transaction_id: str) -> bytes:
    """Return the key of a transaction."""
    return f"dedup:default:{transaction_id}".encode()


def ids_of(unique: str) -> list[str]:
    """Return the ids of a test, spread over all nodes."""
    return [f"{unique}-{number}" for number in range(IDS)]


async def answered(store: RedisStore, claim: Transaction) -> Transaction | None:
    """Repeat a claim until it is answered, and return the answer."""
    answers: list[Transaction | None] = []

    async def claimed() -> bool:
        with contextlib.suppress(StoreUnavailable):
            answers.append(await store.claim(claim, MINUTE))
        return bool(answers)

    await eventually(claimed, what="an answer")
    return answers[0]


class Claimers:
    """Claims the ids of a test with two tokens during the context, and counts answers and errors."""

    def __init__(self, store: RedisStore, ids: list[str]) -> None:
        self._store = store
        self._ids = ids
        self._over = asyncio.Event()
        self.holders: Counter[str | None] = Counter()
        self.errors: Counter[tuple[str, Applied]] = Counter()

    async def __aenter__(self) -> Self:
        """Begin."""
        self._tasks = [asyncio.create_task(self._claim_on(token)) for token in (MINE, OTHER) * 3]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def more(self, answers: int) -> None:
        """Return after that many more answers."""
        until = self.holders.total() + answers

        async def enough() -> bool:
            return self.holders.total() >= until

        await eventually(enough, what="the claimers to go on")

    async def _claim_on(self, token: str) -> None:
        while not self._over.is_set():
            for transaction_id in self._ids:
                try:
                    holder = await self._store.claim(a_claim(transaction_id, token=token), MINUTE)
                    self.holders[holder.claim_token if holder else None] += 1
                except StoreUnavailable as error:
                    self.errors[error.reason, error.applied] += 1
            await asyncio.sleep(0.005)


def replicate(deployment: ClusterDeployment) -> None:
    """Return when every replica has the writes its master acknowledged."""
    for master in deployment.masters:
        offset = str(master.ask("INFO", "replication")).split("'master_repl_offset': ")[1].split(",")[0]

        def acknowledged(master: ClusterNode = master, offset: str = offset) -> bool:
            slave = master.ask("INFO", "replication")
            assert isinstance(slave, dict)
            return int(slave["slave0"]["offset"]) >= int(offset)

        wait_until(acknowledged, what="the replica")


async def test_claims_go_to_the_node_of_their_key(
    open_store: OpenStore, masters: ClusterDeployment, unique: str
) -> None:
    """Each id is claimed once, on the master that holds its slot, and no other node receives it.

    Protection: the key chooses the node.
    """
    store = await open_store(masters.url)
    service = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)))
    for node in masters.masters:
        node.ask("CONFIG", "RESETSTAT")
    answers = await asyncio.gather(*(service.claim(ClaimRequest(transaction_id)) for transaction_id in ids_of(unique)))
    assert [answer.outcome for answer in answers] == [ClaimOutcome.CLAIMED] * IDS
    again = await asyncio.gather(*(service.claim(ClaimRequest(transaction_id)) for transaction_id in ids_of(unique)))
    assert [answer.outcome for answer in again] == [ClaimOutcome.DUPLICATE] * IDS
    where: Counter[int] = Counter()
    for node in masters.masters:
        with redis.Redis(port=node.port, protocol=2) as client:
            where[node.port] = sum(1 for _ in client.scan_iter(f"dedup:default:{unique}-*"))
        stats = node.ask("INFO", "commandstats")
        assert isinstance(stats, dict)
        # Nothing was sent to a node that does not hold it.
        assert stats["cmdstat_set"]["rejected_calls"] == 0
    assert where.total() == IDS
    assert all(where.values())


async def test_the_whole_life_of_a_claim(open_store: OpenStore, masters: ClusterDeployment, unique: str) -> None:
    """Completions, releases and look-ups reach the node of the key, and load their scripts there."""
    store = await open_store(masters.url)
    for transaction_id in ids_of(unique):
        claim = a_claim(transaction_id, token=MINE)
        assert await store.claim(claim, MINUTE) is None
        found = await store.get("default", transaction_id)
        assert found is not None
        assert found.claim_token == MINE
        completion = Completion("default", transaction_id, MINE, b"paid", 1, lasting(60_000))
        completed = await store.complete(completion)
        assert completed is not None
        assert completed.result == b"paid"
        assert not await store.release(Release("default", transaction_id, MINE))


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
async def test_an_empty_foreign_value_is_a_duplicate(masters: ClusterDeployment, unique: str, layout: str) -> None:
    """Empty foreign values on each master are duplicates, and the other entries of the batch are claimed.

    Protection: an empty reply is a value, and only nil means that the claim was stored.
    """
    store = make_store(StoreConfig(masters.url, layout))
    await store.open()
    foreign, free = ids_of(f"{unique}-foreign"), ids_of(f"{unique}-free")
    with redis.RedisCluster("127.0.0.1", masters.masters[0].port, protocol=2) as client:
        for transaction_id in foreign:
            client.set(key_of(transaction_id) if layout == "prefixed" else transaction_id, b"", px=60_000)
    mixed = [transaction_id for pair in zip(foreign, free, strict=True) for transaction_id in pair]
    service = ClaimService(store, Policies(Policy(60_000, 60_000, 60_000)))
    answers = await service.claim_all([ClaimRequest(transaction_id) for transaction_id in mixed])
    outcomes = [answer.outcome if isinstance(answer, ClaimAnswer) else answer for answer in answers]
    assert outcomes == [ClaimOutcome.DUPLICATE, ClaimOutcome.CLAIMED] * IDS
    await store.close()


async def test_ids_with_braces_stay_apart(open_store: OpenStore, masters: ClusterDeployment, unique: str) -> None:
    """A hash tag in an id chooses the node and nothing else."""
    store = await open_store(masters.url)
    for transaction_id in (f"{{{unique}}}a", f"{{{unique}}}b", f"{unique}{{}}", f"{unique}}}{{"):
        assert await store.claim(a_claim(transaction_id), MINUTE) is None


async def test_moving_slots_make_no_second_winner(
    open_store: OpenStore, six_nodes: ClusterDeployment, unique: str
) -> None:
    """While slots move to a new node and back, each claim keeps its holder, and no call fails.

    Protection: MOVED and ASK are followed, since neither server has carried the redirected command out.
    """
    store = await open_store(six_nodes.url)
    ids = ids_of(unique)
    for transaction_id in ids:
        assert await store.claim(a_claim(transaction_id, token=MINE), MINUTE) is None
    new = await asyncio.to_thread(six_nodes.add_master)
    source = six_nodes.masters[0]
    slots = sorted({slot for name in ids if (slot := key_slot(key_of(name))) < 5462})
    assert len(slots) > 5
    async with Claimers(store, ids) as claimers:
        await claimers.more(200)
        await asyncio.to_thread(six_nodes.move, slots, source, new)
        await claimers.more(200)
        await asyncio.to_thread(six_nodes.move, slots, new, source)
        await claimers.more(400)
    assert set(claimers.holders) == {MINE}
    assert not claimers.errors
    assert await store.claim(a_claim(f"{unique}-new"), MINUTE) is None


async def test_a_slot_between_two_nodes_takes_claims_once(
    open_store: OpenStore, masters: ClusterDeployment, unique: str
) -> None:
    """During the migration of a slot new ids are claimed at the target by ASKING, and existing ones at the source.

    Protection: ASKING directly precedes the redirected command.
    """
    store = await open_store(masters.url)
    source, target = masters.masters[:2]
    ids = [f"{{{unique}-{n}}}" for n in range(100) if key_slot(key_of(f"{{{unique}-{n}}}")) < 5462][:1]
    slot = key_slot(key_of(ids[0]))
    old, new = (f"{ids[0]}-{age}" for age in ("old", "new"))
    assert await store.claim(a_claim(old, token=MINE), MINUTE) is None
    source_id, target_id = source.node_id, target.node_id
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    try:
        crowd = [store.claim(a_claim(new, token=f"{OTHER}-{number}"), MINUTE) for number in range(50)]
        answers = await asyncio.gather(*crowd)
        assert answers.count(None) == 1
        assert len({answer.claim_token for answer in answers if answer is not None}) == 1
        held = await store.claim(a_claim(old, token=OTHER), MINUTE)
        assert held is not None
        assert held.claim_token == MINE
        with redis.Redis(port=target.port, protocol=2) as client:
            assert client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
    finally:
        await asyncio.to_thread(masters.move, [slot], source, target)
        await asyncio.to_thread(masters.move, [slot], target, source)


async def test_a_new_master_is_kept_while_its_first_slot_is_handed_over(
    open_store: OpenStore, tmp_path: Path, unique: str
) -> None:
    """A master missing from the slot map keeps its connection while ASK points at it.

    Protection: links to the targets of recent redirections are kept.
    """
    deployment = ClusterDeployment(tmp_path, replicas=False)
    try:
        await asyncio.to_thread(deployment.start)
        store = await open_store(deployment.url)
        new = await asyncio.to_thread(deployment.add_master)
        source = deployment.masters[0]
        transaction_id = next(name for name in ids_of(unique) if key_slot(key_of(name)) < 5462)
        slot = key_slot(key_of(transaction_id))
        new.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.node_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", new.node_id)
        assert await store.claim(a_claim(transaction_id, token=MINE), MINUTE) is None
        [link] = [link for server, link in store._nodes._links.items() if server.port == new.port]  # type: ignore[attr-defined]
        channel = link.channel

        def maps_read() -> int:
            found = [node.ask("INFO", "commandstats") for node in deployment.masters]
            stats = [stat for stat in found if isinstance(stat, dict)]
            return sum(stat["cmdstat_cluster|slots"]["calls"] for stat in stats if "cmdstat_cluster|slots" in stat)

        before = maps_read()
        await asyncio.to_thread(wait_until, lambda: maps_read() >= before + 3, what="the map to be read again")
        holder = await store.claim(a_claim(transaction_id, token=OTHER), MINUTE)
        assert holder is not None
        assert holder.claim_token == MINE
        assert channel is not None
        assert link.channel is channel
    finally:
        deployment.stop()


async def test_an_isolated_node_is_not_trusted(
    open_store: OpenStore, masters: ClusterDeployment, tmp_path: Path, unique: str
) -> None:
    """A node with slots but without a working cluster is skipped for the next one of the URL.

    Protection: the cluster_state of a node is checked.
    """
    lone = ClusterNode(tmp_path / "lone").start()
    try:
        lone.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16000)
        store = await open_store(f"redis+cluster://127.0.0.1:{lone.port},127.0.0.1:{masters.masters[0].port}")
        for transaction_id in ids_of(unique):
            assert await store.claim(a_claim(transaction_id), MINUTE) is None
        assert lone.ask("DBSIZE") == 0
    finally:
        lone.stop()


async def test_a_killed_node_is_replaced_without_help(
    open_store: OpenStore, six_nodes: ClusterDeployment, unique: str
) -> None:
    """After a master was killed its replica serves with the same holders; other masters serve meanwhile.

    Protection: the slot map is refreshed, and errors never become answers.
    """
    store = await open_store(six_nodes.url)
    ids = ids_of(unique)
    for transaction_id in ids:
        assert await store.claim(a_claim(transaction_id, token=MINE), MINUTE) is None
    await asyncio.to_thread(replicate, six_nodes)
    async with Claimers(store, ids) as claimers:
        await claimers.more(200)
        six_nodes.masters[0].stop()
        for transaction_id in ids:
            holder = await answered(store, a_claim(transaction_id, token=OTHER))
            assert holder is not None
            assert holder.claim_token == MINE
        await claimers.more(200)
    assert set(claimers.holders) == {MINE}
    assert claimers.errors
    await store.check()
    assert await answered(store, a_claim(f"{unique}-new")) is None


async def test_a_bug_in_a_refresh_does_not_end_the_refreshes(
    open_store: OpenStore, masters: ClusterDeployment, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an unexpected exception the slot map is refreshed again, also if it happened at start-up.

    Protection: the keeper of the map outlives any exception of a refresh.
    """
    refreshes = 0
    adopt = ClusterNodes._adopt

    def fails_twice(nodes: ClusterNodes, ranges: Sequence[SlotRange]) -> None:
        nonlocal refreshes
        refreshes += 1
        if refreshes <= 2:
            raise KeyError("hunter2")
        adopt(nodes, ranges)

    monkeypatch.setattr(ClusterNodes, "_adopt", fails_twice)
    store = await open_store(masters.url)
    with pytest.raises(StoreUnavailable) as caught:
        await store.claim(a_claim(unique), MINUTE)
    assert (caught.value.reason, caught.value.applied) == ("STORE_UNREACHABLE", Applied.NO)
    assert "hunter2" not in str(caught.value)
    assert await answered(store, a_claim(unique)) is None


@pytest.mark.parametrize(
    "reply",
    [
        [],
        [[0, 5]],
        [[b"0", b"5", [b"host", 1]]],
        [[0, 99_999, [b"host", 6379]]],
        [[0, 5, [b"host", b"port"]]],
        [[0, 5, [b"\xff", 6379]]],
        7,
    ],
)
def test_a_malformed_slot_map_is_an_error_of_its_node(reply: object) -> None:
    """A malformed map raises ValueError, after which the next node is asked."""
    with pytest.raises(ValueError, match="slot"):
        _slot_ranges(reply, RedisTarget(host="one"))


async def test_an_unreachable_cluster_applied_nothing(
    open_store: OpenStore, start_redis: Callable[..., RedisProcess], unique: str
) -> None:
    """While no node answers, claims certainly were not applied; a single server is refused with a remedy."""
    server = start_redis()
    with pytest.raises(StoreRefused, match="is not a node of a cluster: write redis://"):
        await open_store(f"redis+cluster://127.0.0.1:{server.port}")
    url = f"redis+cluster://127.0.0.1:{server.port}"
    server.stop()
    store = await open_store(url)
    with pytest.raises(StoreUnavailable) as caught:
        await store.claim(a_claim(unique), MINUTE)
    assert (caught.value.reason, caught.value.applied) == ("CLUSTER_UNREACHABLE", Applied.NO)
    with pytest.raises(StoreUnavailable):
        await store.check()


async def test_a_node_by_the_url_of_a_single_server_is_refused_by_key(
    open_store: OpenStore, masters: ClusterDeployment, unique: str
) -> None:
    """The plain URL of one node serves only the keys of that node; the error names the remedy."""
    store = await open_store(masters.masters[0].url)
    refused = next(name for name in ids_of(unique) if key_slot(key_of(name)) > 5462)
    with pytest.raises(StoreUnavailable) as caught:
        await store.claim(a_claim(refused), MINUTE)
    assert (caught.value.reason, "redis+cluster://" in str(caught.value)) == ("STORE_MOVED", True)


async def test_over_tls(open_store: OpenStore, tmp_path: Path, unique: str) -> None:
    """`rediss+cluster://` trusts nodes certified by the given authority, and none without it."""
    authority = trustme.CA()
    authority_file, key_file = tmp_path / "ca.pem", tmp_path / "server.pem"
    authority.cert_pem.write_to_path(authority_file)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(key_file)
    options = {
        "tls-cert-file": str(key_file),
        "tls-key-file": str(key_file),
        "tls-ca-cert-file": str(authority_file),
        "tls-auth-clients": "no",
        "tls-cluster": "yes",
        "tls-replication": "yes",
    }
    arguments = (part for name, value in options.items() for part in (f"--{name}", value))
    deployment = ClusterDeployment(tmp_path, *arguments, replicas=False, tls=True)
    try:
        await asyncio.to_thread(deployment.start)
        # A handshake takes its time on a loaded machine.
        store = await open_store(f"{deployment.url}?ssl_ca_certs={authority_file}", timeout_ms=20_000)
        for transaction_id in ids_of(unique):
            assert await store.claim(a_claim(transaction_id), MINUTE) is None
        untrusting = await open_store(deployment.url)
        with pytest.raises(StoreUnavailable) as caught:
            await untrusting.claim(a_claim(unique), MINUTE)
        assert caught.value.reason == "CLUSTER_UNREACHABLE"
    finally:
        deployment.stop()


async def test_the_doctor_examines_every_master(masters: ClusterDeployment) -> None:
    """The cluster and each master are examined, and findings shared by all masters appear once."""
    masters.masters[1].ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        findings = await examine_store(StoreConfig(masters.url))
    finally:
        masters.masters[1].ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    by_check = Counter(finding.check for finding in findings)
    assert by_check["coverage"] == by_check["version"] == by_check["rights"] == 1
    assert "cluster" not in by_check
    [evicting] = [f for f in findings if f.check == "eviction" and f.severity is Severity.WARNING]
    assert evicting.message.startswith(f"127.0.0.1:{masters.masters[1].port}: maxmemory-policy is allkeys-lru")


@pytest.mark.parametrize("all_or_nothing", ["yes", "no"])
async def test_the_doctor_finds_uncovered_slots(masters: ClusterDeployment, all_or_nothing: str) -> None:
    """A slot without a master is critical, even if the cluster serves without it and reports to be ok."""
    for node in masters.masters:
        node.ask("CONFIG", "SET", "cluster-require-full-coverage", all_or_nothing)
    masters.masters[0].ask("CLUSTER", "DELSLOTS", 0)
    try:
        [coverage] = [f for f in await examine_store(StoreConfig(masters.url)) if f.check == "coverage"]
    finally:
        masters.masters[0].ask("CLUSTER", "ADDSLOTS", 0)
        for node in masters.masters:
            node.ask("CONFIG", "SET", "cluster-require-full-coverage", "yes")
        wait_until(masters.in_order, what="the cluster to be in order")
    assert coverage.severity is Severity.CRITICAL
    assert "16383 of 16384" in coverage.message

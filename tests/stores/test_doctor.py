"""The doctor on real servers, each in the state that a check detects. Protection: in each case that check."""

import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from dedup_service.claims import StoreRefused, StoreUnavailable
from dedup_service.claims.store import Finding, Severity
from dedup_service.stores.redis.doctor import examine_redis
from dedup_service.stores.redis.findings import TimeSample, judge_info, judge_time
from dedup_service.stores.redis.url import parse_redis_url
from dedup_service.stores.registry import StoreConfig, examine_store
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, free_port
from tests.support.sentinel import SentinelProcess, sentinel_url

OK, INFO, WARNING, CRITICAL = Severity.OK, Severity.INFO, Severity.WARNING, Severity.CRITICAL
EVERY_RIGHT = (
    "+set",
    "+get",
    "+strlen",
    "+del",
    "+eval",
    "+evalsha",
    "+pexpiretime",
    "+pexpireat",
    "+time",
    "+select",
    "+info",
    "+config|get",
)

StartRedis = Callable[..., RedisProcess]


async def examined(
    url: str, *, layout: str = "prefixed", prefix: str = "dedup:", min_replicas: int = 0
) -> list[Finding]:
    """Return the findings at a store."""
    return await examine_store(StoreConfig(url, layout, prefix, 5_000, min_replicas))


def of(check: str, findings: list[Finding]) -> Finding:
    """Return the one finding of a check."""
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


def user_with(server: RedisProcess, *rules: str) -> str:
    """Give the server a user with these rules alone, and return the URL that names it."""
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">secret-word", *rules)
    return f"redis://limited:secret-word@127.0.0.1:{server.port}/0"


@pytest.mark.parametrize(
    ("options", "check", "severity", "remedy"),
    [
        (("--maxmemory-policy", "noeviction", "--maxmemory", "50mb"), "eviction", OK, ""),
        (("--maxmemory-policy", "allkeys-lru"), "eviction", WARNING, "CONFIG SET maxmemory-policy noeviction"),
        (
            ("--maxmemory-policy", "allkeys-lru", "--maxmemory", "50mb"),
            "eviction",
            CRITICAL,
            "CONFIG SET maxmemory-policy noeviction",
        ),
        (
            ("--maxmemory-policy", "volatile-ttl", "--maxmemory", "50mb"),
            "eviction",
            CRITICAL,
            "CONFIG SET maxmemory-policy noeviction",
        ),
        ((), "persistence", CRITICAL, "appendonly yes"),
        (("--save", "3600 1"), "persistence", WARNING, "appendonly yes"),
        (("--appendonly", "yes", "--appendfsync", "no"), "persistence", WARNING, "appendfsync everysec"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "persistence", INFO, "appendfsync always"),
        (("--appendonly", "yes", "--appendfsync", "always"), "persistence", OK, ""),
        ((), "evicted", OK, ""),
        ((), "cluster", OK, ""),
        ((), "version", OK, ""),
        ((), "role", OK, ""),
        ((), "replicas", INFO, ""),
        ((), "clock", OK, ""),
        ((), "latency", OK, ""),
        ((), "rights", OK, ""),
    ],
)
async def test_each_configuration_has_its_severity(
    start_redis: StartRedis, options: tuple[str, ...], check: str, severity: Severity, remedy: str
) -> None:
    """Each state of a server has its severity, and each fault comes with a command that repairs it."""
    finding = of(check, await examined(start_redis(*options).url))
    assert finding.severity is severity
    assert finding.remedy.startswith(remedy) if not remedy else remedy in finding.remedy
    assert finding.severity < WARNING or finding.remedy


async def test_a_node_of_a_cluster_is_critical(start_redis: StartRedis) -> None:
    """The plain URL of a cluster node is one critical finding, without a second one for its refusals."""
    # By default the cluster bus port is 10,000 above, which may not exist.
    findings = await examined(start_redis("--cluster-enabled", "yes", "--cluster-port", str(free_port())).url)
    assert of("cluster", findings).severity is CRITICAL
    assert "redis+cluster://" in of("cluster", findings).remedy
    assert of("rights", findings).severity is OK


async def test_evicted_keys_are_found(start_redis: StartRedis) -> None:
    """Evicted keys are a warning with their number, even after the policy was corrected."""
    server = start_redis("--maxmemory-policy", "allkeys-lru", "--maxmemory", "4mb")
    with redis.Redis(port=server.port) as admin:
        for number in range(100):
            admin.set(f"big-{number}", "x" * 100_000, ex=60)
        admin.config_set("maxmemory-policy", "noeviction")
        evicted = admin.info("stats")["evicted_keys"]
    finding = of("evicted", await examined(server.url))
    assert evicted > 0
    assert (finding.severity, f"evicted {evicted} keys" in finding.message) == (WARNING, True)


async def test_fewer_replicas_than_claims_ask_for_are_critical(start_redis: StartRedis) -> None:
    """DEDUP_MIN_REPLICAS without a replica is critical: every claim would fail."""
    finding = of("replicas", await examined(start_redis().url, min_replicas=1))
    assert (finding.severity, "DEDUP_MIN_REPLICAS" in finding.message) == (CRITICAL, True)


async def test_the_remedy_for_eviction_works(start_redis: StartRedis) -> None:
    """The command of the remedy, run verbatim, resolves the finding."""
    server = start_redis("--maxmemory-policy", "allkeys-lru", "--maxmemory", "50mb")
    remedy = of("eviction", await examined(server.url)).remedy
    with redis.Redis(port=server.port) as admin:
        admin.execute_command(*remedy.partition(",")[0].split())
    assert of("eviction", await examined(server.url)).severity is OK


async def test_replicas_need_a_floor_for_writes_and_take_no_claims(start_redis: StartRedis) -> None:
    """A primary with replicas is warned of until min-replicas-to-write is set, and a replica is critical."""
    primary = start_redis()
    replica = start_redis("--replicaof", "127.0.0.1", str(primary.port), "--repl-diskless-sync-delay", "0")
    with redis.Redis(port=primary.port, protocol=2) as admin, redis.Redis(port=replica.port) as second:
        wait_until(lambda: second.info("replication")["master_link_status"] == "up", what="the replica to follow")
        wait_until(lambda: admin.info("replication")["connected_slaves"] == 1, what="the primary to count it")
        findings = await examined(primary.url)
        assert of("replicas", findings).severity is WARNING
        assert "min-replicas-to-write 1" in of("replicas", findings).remedy
        assert "empties its replicas" in of("persistence", findings).message
        admin.config_set("min-replicas-to-write", 1)
        assert of("replicas", await examined(primary.url)).severity is OK
    findings = await examined(replica.url)
    assert of("role", findings).severity is CRITICAL
    assert f"127.0.0.1:{primary.port}" in of("role", findings).remedy
    assert not [finding for finding in findings if finding.check == "write"]


@pytest.mark.parametrize("right", ["set", "get", "strlen", "del", "eval", "evalsha", "pexpiretime", "time"])
async def test_every_missing_right_is_found_by_its_name(start_redis: StartRedis, right: str) -> None:
    """A missing right is found with the ACL command that, run verbatim, grants it."""
    server = start_redis()
    url = user_with(server, "~dedup:*", *EVERY_RIGHT, f"-{right}")
    finding = of("rights", await examined(url))
    assert (finding.severity, finding.remedy) == (CRITICAL, f"ACL SETUSER limited +{right}")
    with redis.Redis(port=server.port) as admin:
        admin.execute_command(*finding.remedy.split())
    assert of("rights", await examined(url)).severity is OK


async def test_all_missing_rights_are_found_at_once(start_redis: StartRedis) -> None:
    """A user without any right gets one finding for each of them in one examination."""
    findings = await examined(user_with(start_redis(), "~dedup:*"))
    remedies = {finding.remedy for finding in findings if finding.check == "rights"}
    commands = ("set", "get", "strlen", "del", "eval", "evalsha", "pexpiretime", "pexpireat", "time")
    assert remedies == {f"ACL SETUSER limited +{command}" for command in commands}
    assert of("clock", findings).severity is INFO


async def test_a_missing_right_to_the_database_is_found(start_redis: StartRedis) -> None:
    """A URL with a database whose user may not SELECT is critical, not a crash."""
    url = user_with(start_redis(), "~dedup:*", *EVERY_RIGHT, "-select")
    findings = await examined(f"{url[:-1]}3")
    assert [(finding.check, finding.remedy) for finding in findings] == [("rights", "ACL SETUSER limited +select")]


async def test_keys_outside_the_pattern_of_the_user_are_found(start_redis: StartRedis) -> None:
    """A key pattern that does not cover the prefix is critical; in the raw layout it may cover the ids."""
    url = user_with(start_redis(), "~dedup:*", *EVERY_RIGHT)
    assert of("rights", await examined(url)).severity is OK
    finding = of("rights", await examined(url, prefix="pay:"))
    assert (finding.severity, finding.remedy) == (CRITICAL, "ACL SETUSER limited ~pay:*")
    assert of("rights", await examined(url, layout="raw")).severity is INFO


async def test_without_info_and_config_the_rest_is_still_examined(start_redis: StartRedis) -> None:
    """A refused INFO or CONFIG is an INFO finding that names the right, and the rest is examined."""
    server = start_redis("--appendonly", "yes")
    findings = await examined(user_with(server, "~dedup:*", *EVERY_RIGHT, "-info", "-config|get"))
    assert (of("info", findings).severity, of("info", findings).remedy) == (INFO, "ACL SETUSER limited +info")
    assert of("rights", findings).severity is OK
    assert of("clock", findings).severity is OK
    findings = await examined(user_with(server, "~dedup:*", *EVERY_RIGHT, "-config|get"))
    assert of("persistence", findings).severity is INFO
    assert "ACL SETUSER limited +config|get" in of("persistence", findings).remedy
    findings = await examined(user_with(start_redis(), "~dedup:*", *EVERY_RIGHT, "-config|get"))
    assert of("persistence", findings).severity is WARNING


async def test_a_server_that_refuses_writes_is_critical(start_redis: StartRedis) -> None:
    """A Redis without memory for one more key is critical."""
    server = start_redis()
    with redis.Redis(port=server.port) as admin:
        admin.config_set("maxmemory", 1)
    finding = of("write", await examined(server.url))
    assert finding.severity is CRITICAL
    assert finding.remedy == "see docs/errors.md and the log of Redis"
    assert (Path(__file__).parents[2] / "docs/errors.md").is_file()
    assert "memory" in finding.message


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
async def test_nothing_is_left_behind(start_redis: StartRedis, layout: str) -> None:
    """An examination leaves no key; without the right to DEL the scratch key expires by itself."""
    server = start_redis()
    limited = user_with(server, "~*", *EVERY_RIGHT, "-del")
    with redis.Redis(port=server.port) as admin:
        await examined(server.url, layout=layout)
        assert admin.dbsize() == 0
        await examined(limited, layout=layout)
        (key,) = admin.keys()
        assert 0 < admin.pttl(key) <= 10_000

        async def gone() -> bool:
            return not [client for client in admin.client_list() if client["user"] == "limited"]

        await eventually(gone, what="the connection to be closed")


@pytest.mark.parametrize(("ahead_s", "severity"), [(0.0, OK), (0.5, WARNING), (-0.5, WARNING), (5.0, CRITICAL)])
async def test_clocks_that_differ_are_found(start_redis: StartRedis, ahead_s: float, severity: Severity) -> None:
    """More than 100 ms between the clocks is a warning and more than a second critical, in either direction."""
    target = parse_redis_url(start_redis().url)
    findings = await examine_redis(target, prefixed_layout("dedup:"), 5_000, lambda: time.time() - ahead_s)
    assert of("clock", findings).severity is severity


def test_a_slow_answer_is_not_skew() -> None:
    """A difference within half a round trip is not skew, and a slow round trip is a warning."""
    findings = judge_time([TimeSample(took_s=0.6, ahead_s=0.3), TimeSample(took_s=0.8, ahead_s=0.4)])
    assert of("clock", findings).severity is OK
    assert of("latency", findings).severity is WARNING
    findings = judge_time([TimeSample(0.001, 0), TimeSample(0.001, 0), TimeSample(0.5, 0.25)])
    assert of("latency", findings).severity is OK
    assert "slowest 500.0 ms" in of("latency", findings).message


@pytest.mark.parametrize(
    ("info", "severity", "words"),
    [
        ({"redis_version": "6.2.14"}, CRITICAL, "6.2.14"),
        ({"redis_version": "7.0.0"}, OK, "Redis 7.0.0"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.1"}, OK, "Valkey 8.1.1"),
        ({}, INFO, "which version"),
    ],
)
def test_the_version_is_judged(info: dict[str, str], severity: Severity, words: str) -> None:
    """Older than 7.0 is critical, Valkey is named, and an unknown version is an INFO finding."""
    finding = of("version", judge_info(info))
    assert finding.severity is severity
    assert words in finding.message


async def test_an_unreachable_store_cannot_be_examined(start_redis: StartRedis) -> None:
    """An unreachable server and a refused password raise; no message contains the password."""
    with pytest.raises(StoreUnavailable) as caught:
        await examined(f"redis://127.0.0.1:{free_port()}")
    assert caught.value.reason == "STORE_UNREACHABLE"
    with pytest.raises(StoreUnavailable) as caught:
        await examined(f"redis://limited:wrong-word@127.0.0.1:{start_redis().port}")
    assert caught.value.reason == "STORE_NOT_AUTHENTICATED"
    assert "wrong-word" not in str(caught.value)


async def test_a_server_that_stops_answering_ends_the_examination(start_redis: StartRedis) -> None:
    """An examination of a server that never answers ends at the store timeout."""
    server = start_redis()
    server.pause()
    with pytest.raises(StoreUnavailable) as caught:
        await examine_store(StoreConfig(server.url, timeout_ms=50))
    assert caught.value.reason == "STORE_UNREACHABLE"


async def test_the_master_that_sentinels_name_is_examined(start_redis: StartRedis, tmp_path: Path) -> None:
    """With Sentinel the current master is examined; a name unknown to the Sentinels is refused."""
    server = start_redis("--maxmemory-policy", "allkeys-lru", "--maxmemory", "50mb")
    sentinel = SentinelProcess(tmp_path / "sentinel", server.port)
    try:
        sentinel.start()
        assert of("eviction", await examined(sentinel_url(sentinel.port))).severity is CRITICAL
        with pytest.raises(StoreRefused):
            await examined(sentinel_url(sentinel.port, rest="/another"))
    finally:
        sentinel.stop()


async def test_the_embedded_store_is_examined_without_being_created(tmp_path: Path) -> None:
    """A path where the file can be created is OK, with an INFO finding on its scope, and nothing is created."""
    path = tmp_path / "new" / "claims.db"
    findings = await examined(f"sqlite://{path}")
    assert {finding.check: finding.severity for finding in findings} == {
        "scope": INFO,
        "writable": OK,
        "disk_space": OK,
    }
    assert not path.parent.exists()


async def test_an_impossible_path_is_critical(tmp_path: Path) -> None:
    """A folder in place of the file, and a file in place of its folder, are critical."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "claims.db", tmp_path / "folder"):
        assert of("writable", await examined(f"sqlite://{path}")).severity is CRITICAL


async def test_an_unwritable_path_is_critical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and its folder must be writable, since SQLite keeps its log beside the file."""
    path = tmp_path / "claims.db"
    path.write_text("")
    # Tests may run as root, which may write everywhere.
    for closed in (path, tmp_path):
        monkeypatch.setattr(os, "access", lambda place, _mode, closed=closed: place != closed)
        finding = of("writable", await examined(f"sqlite://{path}"))
        assert (finding.severity, finding.remedy) == (CRITICAL, f"chown or chmod u+w {closed}")


async def test_a_nearly_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than 100 MiB of free space is a warning that names the folder."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil has it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 99 * 1024 * 1024))
    finding = of("disk_space", await examined(f"sqlite://{tmp_path / 'claims.db'}"))
    assert finding.severity is WARNING
    assert str(tmp_path) in finding.message

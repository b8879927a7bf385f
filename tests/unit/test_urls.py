"""Store URLs: valid and invalid ones. No error repeats a password."""

from pathlib import Path
from typing import Any

import pytest

from dedup_service.stores.redis.url import (
    RedisTarget,
    SentinelTarget,
    parse_cluster_url,
    parse_redis_url,
    parse_sentinel_url,
)
from dedup_service.stores.registry import StoreConfig, make_store, trace_attributes
from dedup_service.stores.sqlite.url import parse_sqlite_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("redis://cache", RedisTarget(host="cache")),
        ("redis://cache:7000/3", RedisTarget(host="cache", port=7000, db=3)),
        ("redis://:p%40ss@[::1]:7000", RedisTarget(host="::1", port=7000, password="p@ss")),
        ("rediss://u:p@cache/0", RedisTarget(host="cache", username="u", password="p", tls=True)),
        (
            f"rediss://cache?ssl_ca_certs={__file__}&ssl_certfile={__file__}&ssl_keyfile={__file__}",
            RedisTarget(
                host="cache",
                tls=True,
                tls_files={"ssl_ca_certs": __file__, "ssl_certfile": __file__, "ssl_keyfile": __file__},
            ),
        ),
        ("unix:///run/redis.sock", RedisTarget(socket_path="/run/redis.sock")),
        ("unix://u:p@/run/r%20s.sock?db=2", RedisTarget(socket_path="/run/r s.sock", db=2, username="u", password="p")),
    ],
)
def test_good_urls(url: str, target: RedisTarget) -> None:
    """Host, port, database, user, password, socket path and TLS files are parsed."""
    assert parse_redis_url(url) == target
    assert "p@ss" not in str(target)
    assert "p@ss" not in repr(target)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://:hunter2@", "names no host"),
        ("redis://:hunter2@cache/zero", "names the database 'zero'"),
        ("redis://:hunter2@cache:99999", "cannot be read"),
        ("redis://:hunter2@cache:0", "the port from 1"),
        ("redis://:hunter2@one:6379,two:6379", "cannot be read"),
        ("redis://:hunter2", "'@' between a password and the host"),
        ("redis://user:hunter2/0", "'@' between a password and the host"),
        ("redis://:p/hunter2@cache", "%2F"),
        ("redis://u:1/hunter2@cache", "%2F"),
        ("redis://u:1?hunter2@cache", "%3F"),
        ("redis://:hunter2@x@cache", "%40"),
        ("redis://:hunter 2@cache", "a space"),
        ("rediss://u:1?hunter2", "its query"),
        ("redis://:hunter2@cache?retry_on_timeout=1", "'retry_on_timeout'"),
        ("redis://:hunter2@cache?db=1", "'db'"),
        ("rediss://:hunter2@cache?ssl_cert_reqs=none", "'ssl_cert_reqs'"),
        ("rediss://:hunter2@cache?ssl_ca_certs=/nowhere.pem", "'/nowhere.pem' as ssl_ca_certs"),
        ("redis://:hunter2@cache#x", "%23"),
        ("unix://:hunter2@host/run/redis.sock", "names no host"),
        ("unix://:hunter2@/", "absolute path"),
        ("unix:///run/redis.sock?db=1&protocol=3", "'protocol'"),
        (
            "mysql://:hunter2@host",
            "redis:, rediss:, unix:, redis+sentinel:, rediss+sentinel:, redis+cluster:, rediss+cluster:, sqlite:",
        ),
        ("hunter2", "must begin"),
        ("redis+sentinel://:hunter2@/mymaster", "names no Sentinel"),
        ("redis+sentinel://:hunter2@one,two", "names no master"),
        ("redis+sentinel://:hunter2@one/my%2Fmaster", "names no master"),
        ("redis+sentinel://:hunter2@one/mymaster/zero", "names the database 'zero'"),
        ("redis+sentinel://:hunter2@one/mymaster/0/1", "names the database '0/1'"),
        ("redis+sentinel://:hunter2@one,,two/mymaster", "each host"),
        ("redis+sentinel://:hunter2@one,two:hunter2/mymaster", "each host"),
        ("redis+sentinel://:hunter2@one,:hunter2@two/mymaster", "once"),
        ("redis+sentinel://:hunter2@::1/mymaster", "[IPv6 address]"),
        ("redis+sentinel://:hunter2@one/mymaster?sentinel_username=u", "without a sentinel_password"),
        ("redis+sentinel://one/m?sentinel_password=hunter2&sentinel_password=hunter2", "twice"),
        ("redis+sentinel://one/m?sentinel_password=hunter2&ssl_ca_certs=/x", "'ssl_ca_certs'"),
        ("rediss+sentinel://one/m?sentinel_password=hunter2&ssl_ca_certs=/nowhere", "'/nowhere' as ssl_ca_certs"),
        ("redis+sentinel://one/m?sentinel_password=hunter2@x", "%40"),
        ("redis+cluster://:hunter2@", "names no node"),
        ("redis+cluster://:hunter2@one,two/1", "database 0 alone"),
        ("redis+cluster://:hunter2@one,,two", "each host"),
        ("redis+cluster://:hunter2@one?ssl_ca_certs=/x", "'ssl_ca_certs'"),
        ("sqlite://host/hunter2.db", "names no host"),
        ("sqlite:", "names a file"),
        ("sqlite:///dir/?mode=memory", "names a file"),
    ],
)
def test_bad_urls(url: str, words: str) -> None:
    """An invalid URL is refused with a sentence without a password; options of the driver are refused."""
    with pytest.raises(ValueError, match="URL") as caught:
        make_store(StoreConfig(url, timeout_ms=1_000))
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_sentinel_urls() -> None:
    """The Sentinels, the name and database of the master, and both kinds of credentials are parsed."""
    plain = parse_sentinel_url("redis+sentinel://one,[::1]:7000/mymaster")
    sentinels = (RedisTarget(host="one", port=26379), RedisTarget(host="::1", port=7000))
    assert plain == SentinelTarget(sentinels, "mymaster", RedisTarget())
    assert str(plain) == '"mymaster" by Sentinel one:26379,[::1]:7000'

    full = parse_sentinel_url(
        f"rediss+sentinel://u:p%40ss@one/pay.main/3?sentinel_username=s&sentinel_password=q%40s+s"
        f"&ssl_ca_certs={__file__}"
    )
    tls: dict[str, Any] = {"tls": True, "tls_files": {"ssl_ca_certs": __file__}}
    assert full == SentinelTarget(
        (RedisTarget(host="one", port=26379, username="s", password="q@s+s", **tls),),
        "pay.main",
        RedisTarget(db=3, username="u", password="p@ss", **tls),
    )
    for shown in (str(full), repr(full)):
        assert "p@ss" not in shown
        assert "q@s" not in shown


def test_cluster_urls() -> None:
    """Each node is listed once, with the user and password, and shown without them."""
    cluster = parse_cluster_url("redis+cluster://u:p%40ss@one,two:7001,one:6379/0")
    nodes = (("one", 6379), ("two", 7001))
    assert cluster.nodes == tuple(RedisTarget(host=h, port=p, username="u", password="p@ss") for h, p in nodes)
    assert str(cluster) == "by one:6379,two:7001"
    assert parse_cluster_url(f"rediss+cluster://one?ssl_ca_certs={__file__}").nodes[0].tls
    assert "p@ss" not in repr(cluster)


def test_no_replicas_behind_a_file() -> None:
    """Durable mode over the embedded store is refused, since it has no replicas."""
    with pytest.raises(ValueError, match="DEDUP_MIN_REPLICAS"):
        make_store(StoreConfig("sqlite:claims.db", min_replicas=1))


COMMANDS = ["claim", "claim_all", "get", "complete", "release", "extend"]


@pytest.mark.parametrize(
    ("url", "attributes", "operations"),
    [
        (
            "rediss://u:hunter2@cache:7000/3",
            {"db.system.name": "redis", "db.namespace": "3", "server.address": "cache", "server.port": 7000},
            COMMANDS,
        ),
        (
            "unix:///run/redis.sock",
            {"db.system.name": "redis", "db.namespace": "0", "server.address": "/run/redis.sock"},
            COMMANDS,
        ),
        ("redis+sentinel://one,two/mymaster/3", {"db.system.name": "redis"}, COMMANDS),
        ("redis+cluster://one,two", {"db.system.name": "redis"}, COMMANDS),
        ("sqlite:claims.db", {"db.system.name": "sqlite"}, []),
    ],
)
def test_trace_attributes(url: str, attributes: dict[str, str | int], operations: list[str]) -> None:
    """Spans name the system, the server where it is known beforehand, and the command of each operation."""
    of_store, of_operations = trace_attributes(StoreConfig(url))
    assert of_store == attributes
    assert list(of_operations) == operations
    if operations:
        assert of_operations["claim"] == {"db.operation.name": "SET"}
        release = {"db.operation.name": "EVALSHA", "db.stored_procedure.name": "release"}
        assert of_operations["release"] == release


def test_sqlite_paths() -> None:
    """Three slashes start an absolute path, none a relative one."""
    assert parse_sqlite_url("sqlite:///var/lib/claims.db") == Path("/var/lib/claims.db")
    assert parse_sqlite_url("sqlite:claims.db") == Path("claims.db")

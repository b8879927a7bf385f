"""Store URLs: what they may say, and that no error repeats a password."""

from pathlib import Path

import pytest

from dedup_service.stores import make_store, sqlite_path
from dedup_service.stores.redis_url import RedisTarget, parse_redis_url


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
    """Host, port, database, user, password, socket path and TLS files are read from their places."""
    assert parse_redis_url(url) == target
    assert "p@ss" not in str(target)
    assert "p@ss" not in repr(target)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://:hunter2@", "names no host"),
        ("redis://:hunter2@cache/zero", "names the database 'zero'"),
        ("redis://:hunter2@cache:99999", "cannot be read"),
        ("redis://:hunter2@cache?retry_on_timeout=1", "'retry_on_timeout'"),
        ("redis://:hunter2@cache?db=1", "'db'"),
        ("rediss://:hunter2@cache?ssl_cert_reqs=none", "'ssl_cert_reqs'"),
        ("rediss://:hunter2@cache?ssl_ca_certs=/nowhere.pem", "'/nowhere.pem' as ssl_ca_certs"),
        ("redis://:hunter2@cache#x", "%23"),
        ("unix://:hunter2@host/run/redis.sock", "names no host"),
        ("unix://:hunter2@/", "absolute path"),
        ("unix:///run/redis.sock?db=1&protocol=3", "'protocol'"),
        ("mysql://:hunter2@host", "must begin with one of redis:, rediss:, unix:, sqlite:"),
        ("hunter2", "must begin"),
        ("sqlite://host/hunter2.db", "names no host"),
        ("sqlite:", "names a file"),
        ("sqlite:///dir/?mode=memory", "names a file"),
    ],
)
def test_bad_urls(url: str, words: str) -> None:
    """What a URL may not say is refused with a sentence that shows no password; driver options are not let through."""
    with pytest.raises(ValueError, match="URL") as caught:
        make_store(url, key_layout="prefixed", key_prefix="dedup:", timeout_ms=1_000)
    assert words in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_sqlite_paths() -> None:
    """Three slashes begin an absolute path, none a relative one."""
    assert sqlite_path("sqlite:///var/lib/claims.db") == Path("/var/lib/claims.db")
    assert sqlite_path("sqlite:claims.db") == Path("claims.db")

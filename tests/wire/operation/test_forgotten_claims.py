"""What Redis has forgotten is noticed, logged, counted, and told with the health of the service."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command

StartRedis = Callable[..., RedisProcess]
StartService = Callable[..., ServiceProcess]


def health_of(service: ServiceProcess) -> dict[str, Any]:
    """Return what `healthcheck --json` says."""
    health: dict[str, Any] = json.loads(run_command("healthcheck", "--target", service.target, "--json").stdout)
    return health


def counting(service: ServiceProcess, redis_server: RedisProcess, pattern: str = "dedup:~canary:*") -> None:
    """Return when the service has kept its count in Redis twice, so that losing it can be noticed."""
    with redis.Redis(port=redis_server.port, protocol=2) as client:

        def counted() -> bool:
            keys = list(client.scan_iter(pattern))
            return bool(keys) and int(client.get(keys[0]) or 0) >= 2

        wait_until(counted, what="the canary")
        assert all(client.pttl(key) > 0 for key in client.scan_iter(pattern))
    assert service.events("store_became_ready")


def forgotten(service: ServiceProcess, times: int = 1) -> None:
    """Return when the service has noticed that."""
    wait_until(lambda: len(service.events("claims_forgotten")) >= times, what="the notice")


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
def test_a_flush_is_noticed(start_redis: StartRedis, start_service: StartService, layout: str) -> None:
    """FLUSHALL is one warning, one count in the details of the health, and nothing that stops the service.

    Protection: the canary.
    """
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url, "--key-layout", layout)
    counting(service, redis_server, "*canary*")
    assert health_of(service) == {"status": "SERVING", "store_forgotten": 0, "store_restarts": 0}
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
    forgotten(service)
    health = health_of(service)
    assert (health["status"], health["store_forgotten"], health["store_restarts"]) == ("SERVING", 1, 0)
    assert health["store_last_forgotten"].endswith("+00:00")
    shown = run_command("healthcheck", "--target", service.target)
    assert (shown.returncode, "forgotten claims 1 time," in shown.stdout) == (0, True)
    [line] = service.events("claims_forgotten")
    assert line["level"] == "warning"
    assert "can be claimed again" in line["message"]


def test_an_empty_restart_is_noticed(start_redis: StartRedis, start_service: StartService) -> None:
    """A Redis that comes back empty is a restart and a loss. Protection: the canary, and the run_id."""
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url)
    counting(service, redis_server)
    redis_server.stop()
    redis_server.start(redis_server.port)
    forgotten(service)
    assert len(service.events("store_restarted")) == 1
    health = health_of(service)
    assert (health["store_forgotten"], health["store_restarts"]) == (1, 1)


def test_a_restart_that_lost_nothing_is_a_restart_alone(start_redis: StartRedis, start_service: StartService) -> None:
    """With an append-only file the run_id changes and nothing is missing. Protection: what is found is compared."""
    redis_server = start_redis("--appendonly", "yes", "--appendfsync", "always")
    service = start_service("--store-url", redis_server.url)
    counting(service, redis_server)
    redis_server.stop()
    redis_server.start(redis_server.port)
    wait_until(lambda: service.events("store_restarted"), what="the notice")
    counting(service, redis_server)
    health = health_of(service)
    assert (health["store_forgotten"], health["store_restarts"]) == (0, 1)


def test_an_older_state_is_noticed(start_redis: StartRedis, start_service: StartService) -> None:
    """A restart from an old snapshot is a loss, although the canary is there. Protection: it counts."""
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url)
    counting(service, redis_server)
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        client.save()
        [key] = client.scan_iter("dedup:~canary:*")
        saved = int(client.get(key) or 0)
        wait_until(lambda: int(client.get(key) or 0) > saved + 1, what="the canary to go on")
    redis_server.stop()
    redis_server.start(redis_server.port)
    forgotten(service)
    assert "its state is older than" in service.events("claims_forgotten")[0]["message"]


def test_every_instance_notices(start_redis: StartRedis, start_service: StartService) -> None:
    """Each of two services notices the flush, whichever looks first. Protection: a canary of its own for each."""
    redis_server = start_redis()
    services = [start_service("--store-url", redis_server.url) for _ in range(2)]
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        wait_until(lambda: len(list(client.scan_iter("dedup:~canary:*"))) == 2, what="both canaries")
        client.flushall()
    for service in services:
        forgotten(service)


def test_a_canary_that_is_forbidden_says_so_once(start_redis: StartRedis, start_service: StartService) -> None:
    """A user whose key pattern leaves the canary out is served, and the log says once what goes unnoticed."""
    redis_server = start_redis()
    with redis.Redis(port=redis_server.port, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~dedup:default:*", "+@all")
    service = start_service("--store-url", f"redis://limited:pw@127.0.0.1:{redis_server.port}")
    wait_until(lambda: service.events("canary_write_refused"), what="the notice")
    with redis.Redis(port=redis_server.port, protocol=2) as admin:
        calls = admin.info("commandstats")["cmdstat_time"]["calls"]
        wait_until(lambda: admin.info("commandstats")["cmdstat_time"]["calls"] >= calls + 3, what="further checks")
    assert len(service.events("canary_write_refused")) == 1
    assert health_of(service)["status"] == "SERVING"

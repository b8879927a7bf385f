"""Data loss in Redis is detected, logged, counted, and reported with the health status."""

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
    """Return the output of `healthcheck --json`."""
    health: dict[str, Any] = json.loads(run_command("healthcheck", "--target", service.target, "--json").stdout)
    return health


def wait_for_canary(service: ServiceProcess, redis_server: RedisProcess, pattern: str = "dedup:~canary:*") -> None:
    """Wait until the service has counted to two in Redis, so that it can detect the loss of the counter."""
    with redis.Redis(port=redis_server.port, protocol=2) as client:

        def counted() -> bool:
            keys = list(client.scan_iter(pattern))
            return bool(keys) and int(client.get(keys[0]) or 0) >= 2

        wait_until(counted, what="the canary")
        assert all(client.pttl(key) > 0 for key in client.scan_iter(pattern))
    wait_until(lambda: service.events("store_became_ready"), what="the store_became_ready event")


def wait_for_loss(service: ServiceProcess, times: int = 1) -> None:
    """Wait until the service has detected a data loss."""
    wait_until(lambda: len(service.events("claims_forgotten")) >= times, what="the claims_forgotten event")


@pytest.mark.parametrize("layout", ["prefixed", "raw"])
def test_a_flush_is_detected(start_redis: StartRedis, start_service: StartService, layout: str) -> None:
    """FLUSHALL causes one warning and one count in the health details; the service keeps serving.

    Protection: the canary.
    """
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url, "--key-layout", layout)
    wait_for_canary(service, redis_server, "*canary*")
    assert health_of(service) == {"status": "SERVING", "store_forgotten": 0, "store_restarts": 0}
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
    wait_for_loss(service)
    health = health_of(service)
    assert (health["status"], health["store_forgotten"], health["store_restarts"]) == ("SERVING", 1, 0)
    assert health["store_last_forgotten"].endswith("+00:00")
    shown = run_command("healthcheck", "--target", service.target)
    assert (shown.returncode, "forgotten claims 1 time," in shown.stdout) == (0, True)
    [line] = service.events("claims_forgotten")
    assert line["level"] == "warning"
    assert "can be claimed again" in line["message"]


def test_a_restart_without_data_is_detected(start_redis: StartRedis, start_service: StartService) -> None:
    """A Redis that restarts empty counts as a restart and a loss.

    Protections: the canary and the run_id.
    """
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url)
    wait_for_canary(service, redis_server)
    redis_server.stop()
    redis_server.start(redis_server.port)
    wait_for_loss(service)
    wait_until(lambda: service.events("store_restarted"), what="the store_restarted event")
    health = health_of(service)
    assert (health["store_forgotten"], health["store_restarts"]) == (1, 1)


def test_a_restart_without_loss_counts_only_as_a_restart(start_redis: StartRedis, start_service: StartService) -> None:
    """With an append-only file the run_id changes and no data is lost.

    Protection: the stored counter is compared with the expected one.
    """
    redis_server = start_redis("--appendonly", "yes", "--appendfsync", "always")
    service = start_service("--store-url", redis_server.url)
    wait_for_canary(service, redis_server)
    redis_server.stop()
    redis_server.start(redis_server.port)
    wait_until(lambda: service.events("store_restarted"), what="the store_restarted event")
    wait_for_canary(service, redis_server)
    health = health_of(service)
    assert (health["store_forgotten"], health["store_restarts"]) == (0, 1)


def test_a_restart_from_an_old_snapshot_is_detected(start_redis: StartRedis, start_service: StartService) -> None:
    """A restart from an old snapshot is a loss, although the canary key exists.

    Protection: the canary is a counter.
    """
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url)
    wait_for_canary(service, redis_server)
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        client.save()
        [key] = client.scan_iter("dedup:~canary:*")
        saved = int(client.get(key) or 0)
        wait_until(lambda: int(client.get(key) or 0) > saved + 1, what="the canary to advance")
    redis_server.stop()
    redis_server.start(redis_server.port)
    wait_for_loss(service)
    assert "its state is older than" in service.events("claims_forgotten")[0]["message"]


def test_every_instance_detects_the_loss(start_redis: StartRedis, start_service: StartService) -> None:
    """Each of two services detects a flush.

    Protection: each instance has its own canary.
    """
    redis_server = start_redis()
    services = [start_service("--store-url", redis_server.url) for _ in range(2)]
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        wait_until(lambda: len(list(client.scan_iter("dedup:~canary:*"))) == 2, what="both canaries")
        client.flushall()
    for service in services:
        wait_for_loss(service)


def test_a_refused_canary_write_is_logged_once(start_redis: StartRedis, start_service: StartService) -> None:
    """If the Redis user may not write the canary, the service serves and logs once that losses go undetected."""
    redis_server = start_redis()
    with redis.Redis(port=redis_server.port, protocol=2) as admin:
        admin.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~dedup:default:*", "+@all")
    service = start_service("--store-url", f"redis://limited:pw@127.0.0.1:{redis_server.port}")
    wait_until(lambda: service.events("canary_write_refused"), what="the canary_write_refused event")
    with redis.Redis(port=redis_server.port, protocol=2) as admin:
        calls = admin.info("commandstats")["cmdstat_set"]["calls"]
        wait_until(lambda: admin.info("commandstats")["cmdstat_set"]["calls"] >= calls + 3, what="further checks")
    assert len(service.events("canary_write_refused")) == 1
    assert health_of(service)["status"] == "SERVING"

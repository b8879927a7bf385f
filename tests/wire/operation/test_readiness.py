"""Health as probes see it while the store answers strangely, or answers and refuses claims."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.disks import fill, small_disk
from tests.support.errors import refused
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess
from tests.support.refusals import APP, REFUSALS, allow_app
from tests.support.scripted_redis import ScriptedRedis

pytestmark = pytest.mark.every_engine

StartRedis = Callable[..., RedisProcess]
StartService = Callable[..., ServiceProcess]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Probe:
    """Asks for the health of a service, and claims."""

    def __init__(self, service: ServiceProcess, channel: grpc.Channel) -> None:
        self._service = service
        self._health = health_pb2_grpc.HealthStub(channel)
        self._stub = dedup_pb2_grpc.DedupServiceStub(channel)

    def turns(self, status: int, reason: str = "") -> None:
        """Return when readiness has this status, for the given reason; liveness stays SERVING."""
        wait_until(lambda: self._status("readiness") == status, 60, f"readiness {status}")
        assert self._status("") == self._status("dedup.v1.DedupService") == status
        assert self._status("liveness") == SERVING
        if reason:
            # The line is written after the status, and read by a thread.
            wait_until(lambda: self._reason() == reason, 60, f"the log line with {reason}")

    def is_claimed(self, transaction_id: str) -> bool:
        """Claim, and return whether the answer is CLAIMED."""
        return self._claim(transaction_id).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED

    def refusal(self, transaction_id: str) -> str:
        """Claim, and return the reason of the refusal."""
        return refused(lambda: self._claim(transaction_id)).reason

    def _claim(self, transaction_id: str) -> dedup_pb2.ClaimTransactionResponse:
        request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id)
        return self._stub.ClaimTransaction(request, timeout=30)

    def _reason(self) -> str:
        lines = self._service.events("store_became_unavailable")
        return str(lines[-1]["reason"]) if lines else ""

    def _status(self, name: str) -> int:
        return int(self._health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30).status)


@contextlib.contextmanager
def probing(service: ServiceProcess) -> Iterator[Probe]:
    """Yield a probe of a service."""
    with service.channel() as channel:
        yield Probe(service, channel)


def test_readiness_follows_every_refusal_of_redis(
    start_redis: StartRedis, start_service: StartService, unique: str
) -> None:
    """While Redis answers and refuses claims, health is NOT_SERVING although nobody claims, and recovers by itself.

    Protection: the check writes as a claim does.
    """
    server = start_redis()
    with redis.Redis(port=server.port, protocol=2) as admin:
        allow_app(admin)
        service = start_service("--store-url", f"redis://{APP}@127.0.0.1:{server.port}/0")
        with probing(service) as probe:
            for refusal in REFUSALS:
                probe.turns(SERVING)
                with refusal.applied_to(admin):
                    probe.turns(NOT_SERVING, refusal.reason)
                    assert probe.refusal(f"{unique}-{refusal.name}") == refusal.reason
            probe.turns(SERVING)
            assert probe.is_claimed(unique)


def test_readiness_follows_the_replicas_of_durable_mode(start_redis: StartRedis, start_service: StartService) -> None:
    """In durable mode health is NOT_SERVING until enough replicas follow."""
    server = start_redis("--repl-diskless-sync-delay", "0")
    service = start_service("--store-url", server.url, "--min-replicas", "1")
    with probing(service) as probe:
        probe.turns(NOT_SERVING, "STORE_NOT_REPLICATED")
        replica = start_redis("--replicaof", "127.0.0.1", str(server.port))
        probe.turns(SERVING)
        replica.stop()
        probe.turns(NOT_SERVING, "STORE_NOT_REPLICATED")


def test_readiness_ignores_the_bad_keys_of_a_caller(
    start_redis: StartRedis, start_service: StartService, unique: str
) -> None:
    """Claims of a key that the Redis user may not write, or that has another type, leave health at SERVING."""
    server = start_redis()
    with redis.Redis(port=server.port, protocol=2) as admin:
        allow_app(admin)
        admin.execute_command("ACL", "SETUSER", "app", "resetkeys", "~paid:*", "~dedup-canary*")
        admin.hset("paid:hash", "field", "value")
        arguments = ("--store-url", f"redis://{APP}@127.0.0.1:{server.port}/0", "--key-layout", "raw")
        service = start_service(*arguments)
        checks = int(admin.info("commandstats")["cmdstat_set"]["calls"])
        with probing(service) as probe:
            probe.turns(SERVING)
            assert probe.refusal(unique) == "STORE_NOT_PERMITTED"
            assert probe.refusal("paid:hash") == "KEY_OF_ANOTHER_TYPE"

            def checked() -> bool:
                assert probe.refusal(unique)
                return int(admin.info("commandstats")["cmdstat_set"]["calls"]) >= checks + 4

            wait_until(checked, 60, "further checks")
            probe.turns(SERVING)
    assert not service.events("store_became_unavailable")


def test_readiness_follows_a_full_disk(start_service: StartService, tmp_path: Path, unique: str) -> None:
    """While the disk of the embedded store is full, health is NOT_SERVING; with free space it recovers by itself.

    Protection: the check writes and syncs the file.
    """
    with small_disk(tmp_path) as disk:
        service = start_service("--store-url", f"sqlite://{disk / 'claims.db'}")
        with probing(service) as probe:
            probe.turns(SERVING)
            assert probe.is_claimed(f"{unique}-before")
            filler = fill(disk)
            probe.turns(NOT_SERVING, "STORE_FULL")
            assert probe.refusal(f"{unique}-during") == "STORE_FULL"
            filler.unlink()
            probe.turns(SERVING)
            assert probe.is_claimed(f"{unique}-after")
        service.kill()


async def test_readiness_survives_malformed_replies(start_service: StartService) -> None:
    """Malformed replies to the check neither prevent the start nor freeze health, and end without a traceback.

    Protections: the check of the reply, and a watch that survives every exception.
    """
    replies = {"now": b"*0\r\n"}

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(replies["now"])

    async with ScriptedRedis(reply) as server:
        service = await asyncio.to_thread(start_service, "--store-url", server.url)
        with probing(service) as probe:
            await asyncio.to_thread(probe.turns, NOT_SERVING, "STORE_PROTOCOL_ERROR")
            for broken in (b"*1\r\n*0\r\n", b":1\r\n"):
                replies["now"] = b"$-1\r\n"
                await asyncio.to_thread(probe.turns, SERVING)
                replies["now"] = broken
                await asyncio.to_thread(probe.turns, NOT_SERVING, "STORE_PROTOCOL_ERROR")
        assert await asyncio.to_thread(service.stop) == 0
    assert not [line for line in service.stderr_lines if not line.startswith("{")]

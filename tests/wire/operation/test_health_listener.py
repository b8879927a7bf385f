"""The health listener: liveness is independent of the store, readiness follows it, and nothing else is served."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.certificates import Authority
from tests.support.errors import refused
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command

Start = Callable[..., ServiceProcess]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
READY_NAMES = ("", "dedup.v1.DedupService", "readiness")


def health_target(service: ServiceProcess) -> str:
    """Return the address of the health listener."""
    address: str = service.events("health_listener_started")[0]["addresses"][0]
    return address.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - read, not bound


def health_of(target: str, name: str) -> int:
    """Return the status of one name."""
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)


def readiness(target: str) -> set[int]:
    """Return the distinct statuses of all readiness names."""
    return {health_of(target, name) for name in READY_NAMES}


def test_readiness_follows_redis_and_liveness_does_not(
    start_service: Start, start_redis: Callable[..., RedisProcess]
) -> None:
    """While Redis hangs the service is live and not ready on both listeners; it becomes ready again by itself.

    Protections: liveness does not check the store, and readiness keeps checking it.
    """
    server = start_redis()
    service = start_service("--health-listen", "127.0.0.1:0", "--store-url", server.url, "--store-timeout", "300ms")
    for target in (health_target(service), service.target):
        assert readiness(target) == {SERVING}
    server.pause()
    for target in (health_target(service), service.target):
        wait_until(lambda target=target: readiness(target) == {NOT_SERVING}, what="not ready")  # type: ignore[misc]
        assert health_of(target, "liveness") == SERVING
    server.resume()
    for target in (health_target(service), service.target):
        wait_until(lambda target=target: readiness(target) == {SERVING}, what="ready again")  # type: ignore[misc]
        assert health_of(target, "liveness") == SERVING


def test_the_service_is_live_before_redis_starts(start_service: Start) -> None:
    """A service that starts before its Redis is live, so no liveness probe restarts it."""
    service = start_service("--health-listen", "127.0.0.1:0", "--store-url", "redis://127.0.0.1:1")
    assert health_of(health_target(service), "liveness") == SERVING
    assert readiness(health_target(service)) == {NOT_SERVING}


def test_process_readiness_does_not_follow_redis(start_service: Start, unique: str) -> None:
    """With DEDUP_READINESS=process an outage of Redis does not make the pod unready; claims still fail."""
    service = start_service(
        *("--health-listen", "127.0.0.1:0", "--store-url", "redis://127.0.0.1:1", "--readiness", "process")
    )
    assert readiness(health_target(service)) == {SERVING}
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        answer = refused(lambda: stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id=unique)))
    assert answer.reason == "STORE_UNREACHABLE"


def test_the_health_listener_serves_only_health(start_service: Start, tmp_path: Path, unique: str) -> None:
    """The health listener serves neither claims nor reflection, so it may listen on every address of a pod."""
    service = start_service(
        *("--health-listen", "0.0.0.0:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}", "--reflection", "on")
    )
    with grpc.insecure_channel(health_target(service)) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        answer = refused(lambda: stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id=unique)))
        assert answer.code is grpc.StatusCode.UNIMPLEMENTED
        reflect: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        assert refused(lambda: next(reflect(iter([b""])))).code is grpc.StatusCode.UNIMPLEMENTED
    assert not service.events("unauthenticated_listener_opened")


def test_health_probes_need_no_certificate(start_grpcio: Start, tmp_path: Path) -> None:
    """Probes need no client certificate under mutual TLS, and `healthcheck` uses the health listener by itself."""
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    service = start_grpcio(
        *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
        *("--health-listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}"),
    )
    environment = {"DEDUP_LISTEN": service.target, "DEDUP_HEALTH_LISTEN": health_target(service)}
    for arguments in ((), ("--service", "liveness")):
        checked = run_command("healthcheck", *arguments, environment=environment)
        assert (checked.returncode, checked.stdout) == (0, "SERVING\n")


@pytest.mark.parametrize("mode", ["store", "process"])
async def test_a_draining_service_is_live_but_not_ready(
    start_service: Start, redis_server: RedisProcess, unique: str, mode: str
) -> None:
    """From SIGTERM until it exits, the service is NOT_SERVING for readiness and SERVING for liveness.

    Protection: the health listener outlives the drain.
    """
    async with FaultProxy(redis_server.port) as proxy:
        arguments = ("--store-url", proxy.url, "--store-timeout", "20s", "--shutdown-grace", "20s", "--readiness", mode)
        service = await asyncio.to_thread(start_service, "--health-listen", "127.0.0.1:0", *arguments)
        async with grpc.aio.insecure_channel(service.target) as channel:
            proxy.hold_replies.clear()
            request = dedup_pb2.ClaimTransactionRequest(transaction_id=unique)
            call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request)

            async def sent() -> bool:
                return unique.encode() in proxy.sent_upstream

            async def not_ready() -> bool:
                return await asyncio.to_thread(readiness, health_target(service)) == {NOT_SERVING}

            await eventually(sent, what="the command to be sent")
            service.signal(signal.SIGTERM)
            await eventually(not_ready, what="not ready")
            assert await asyncio.to_thread(health_of, health_target(service), "liveness") == SERVING
            proxy.hold_replies.set()
            assert (await call).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        assert await asyncio.to_thread(service.wait) == 0

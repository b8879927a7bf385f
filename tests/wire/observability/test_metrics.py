"""Prometheus metrics of one process and of several workers."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
import redis

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.errors import refused
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command
from tests.support.scrapes import Scrape, scraped_text
from tests.support.workers import channels_to_each, pids

StartService = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest
METHODS = ("BatchClaimTransactions", "ClaimTransaction", "CompleteTransaction")

POLICIES = """
[namespaces.pay]
[namespaces.trial]
mode = "shadow"
"""


@pytest.fixture(params=["1", "2"])
def start_measured(
    request: pytest.FixtureRequest, start_service: StartService, redis_server: RedisProcess, tmp_path: Path
) -> StartService:
    """Starts a service with metrics and a policy file, as one process and with two workers."""
    policies = tmp_path / "policies.toml"
    policies.write_text(POLICIES)

    def start(url: str = redis_server.url, *arguments: str) -> ServiceProcess:
        always = ("--metrics-listen", "127.0.0.1:0", "--workers", request.param, "--policy-file", str(policies))
        return start_service("--store-url", url, *always, *arguments)

    return start


def each_stub(service: ServiceProcess) -> list[dedup_pb2_grpc.DedupServiceStub]:
    """Return a stub of each process of the service."""
    workers = len(pids(service))
    channels = list(channels_to_each(service, workers).values()) if workers else [service.channel()]
    return [dedup_pb2_grpc.DedupServiceStub(channel) for channel in channels]


def calls(scrape: Scrape, name: str, **labels: str) -> float:
    """Return the sum over METHODS, without the GetTransaction calls that identify the workers."""
    return sum(scrape.total(name, grpc_method=method, **labels) for method in METHODS)


def test_metrics_add_up_over_all_workers(start_measured: StartService, unique: str) -> None:
    """Every call, claim, replay, shadow duplicate and store operation is counted once, summed over all workers.

    Protection: the supervisor adds up the workers' metric files.
    """
    service = start_measured()
    stubs = each_stub(service)
    for number in range(20):
        for turn, stub in enumerate(stubs):
            token = f"{unique}-{turn}"
            request = Claim(transaction_id=f"{unique}-{number}", claim_token=token, namespace="pay")
            stub.ClaimTransaction(request)
            stub.ClaimTransaction(request)
            stub.ClaimTransaction(Claim(transaction_id=f"{unique}-{number}", namespace="trial"))
    batch = [Claim(transaction_id=f"{unique}-b{number}") for number in range(5)]
    stubs[-1].BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=[*batch, Claim()]))
    invalid = refused(lambda: stubs[0].ClaimTransaction(Claim()))
    assert invalid.code is grpc.StatusCode.INVALID_ARGUMENT
    many = 20 * len(stubs)
    scrape = Scrape(service)
    assert calls(scrape, "grpc_server_started_total") == 3 * many + 2
    assert calls(scrape, "grpc_server_handled_total") == 3 * many + 2
    assert calls(scrape, "grpc_server_handling_seconds_count") == 3 * many + 2
    assert calls(scrape, "grpc_server_handled_total", grpc_code="OK") == 3 * many + 1
    assert calls(scrape, "grpc_server_handled_total", grpc_code="InvalidArgument") == 1
    assert scrape.total("dedup_claims_total", namespace="pay", outcome="CLAIMED") == 40
    assert scrape.total("dedup_claims_total", namespace="pay", outcome="DUPLICATE") == 2 * many - 40
    assert scrape.total("dedup_claim_replays_total", namespace="pay") == 20
    assert scrape.total("dedup_shadow_duplicates_total", namespace="trial") == many - 20
    assert scrape.total("dedup_claims_total", namespace="trial", outcome="CLAIMED") == many
    assert scrape.total("dedup_claims_total", namespace="default", outcome="CLAIMED") == 5
    assert scrape.total("dedup_claims_total", namespace="default", outcome="ERROR") == 2
    assert scrape.total("dedup_store_seconds_count", operation="claim") == 3 * many
    assert scrape.total("dedup_store_seconds_count", operation="claim_all") == 1
    assert scrape.total("dedup_store_connections") == len(stubs)
    assert scrape.total("dedup_store_ready") == 1
    assert scrape.total("dedup_build_info") == 1
    assert scrape.total("dedup_workers") == (2 if len(stubs) == 2 else 0)


def test_labels_have_bounded_cardinality_and_no_ids(start_measured: StartService, unique: str) -> None:
    """A namespace missing from the policy file is `other` until a reload adds it, and no label contains an id."""
    service = start_measured()
    secrets = {name: f"{name}-{unique}" for name in ("id", "token", "claimant", "result")}
    for stub in each_stub(service):
        for namespace in ("made-up", f"n{unique}", "pay", ""):
            request = Claim(
                transaction_id=secrets["id"],
                namespace=namespace,
                claim_token=secrets["token"],
                claimant=secrets["claimant"],
            )
            stub.ClaimTransaction(request)
        invalid = Claim(transaction_id=secrets["id"], namespace="No Name")
        assert stub.ClaimTransaction.future(invalid).code() is grpc.StatusCode.INVALID_ARGUMENT
    scrape = Scrape(service)
    known = {"default", "pay", "trial", "other"}
    assert scrape.values("namespace") == known
    assert scrape.total("dedup_claims_total", namespace="other") == 3 * scrape.total(
        "dedup_claims_total", namespace="pay"
    )
    policy_file = Path(service.events("policy_loaded")[0]["file"])
    policy_file.write_text(POLICIES + "[namespaces.made-up]\n")
    service.signal(signal.SIGHUP)
    workers = len(pids(service)) or 1
    wait_until(lambda: len(service.events("policy_loaded")) == 2 * workers, what="the new policies")
    with service.channel() as channel:
        dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id=unique, namespace="made-up"))
    assert Scrape(service).values("namespace") == known | {"made-up"}
    text = scraped_text(service)
    assert unique not in text


async def test_store_failures_are_counted(
    start_measured: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """Metrics show unknown outcomes by reason, reconnects, readiness and in-flight calls during an outage."""
    async with FaultProxy(redis_server.port) as proxy:
        service = await asyncio.to_thread(start_measured, proxy.url, "--store-timeout", "3s")
        before = await asyncio.to_thread(Scrape, service)
        assert before.total("dedup_calls_in_flight") == 0
        processes = before.total("dedup_store_connections")
        assert processes == (len(pids(service)) or 1)
        proxy.hold_replies.clear()
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            entries = [Claim(transaction_id=f"{unique}-b{number}") for number in range(3)]
            batch = stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=entries))
            claim = stub.ClaimTransaction(Claim(transaction_id=unique))

            async def seen(name: str, value: float) -> bool:
                return (await asyncio.to_thread(Scrape, service)).total(name) == value

            await eventually(lambda: seen("dedup_calls_in_flight", 2), what="the calls")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await claim
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert len((await batch).entries) == 3
            await eventually(lambda: seen("dedup_store_ready", 0), what="the outage")
            proxy.hold_replies.set()
            await eventually(lambda: seen("dedup_store_ready", 1), what="the store")
            await eventually(lambda: seen("dedup_calls_in_flight", 0), what="the calls to end")
        after = await asyncio.to_thread(Scrape, service)
        assert after.total("dedup_unknown_outcomes_total", reason="STORE_TIMEOUT") == 4
        assert after.total("dedup_unknown_outcomes_total") == 4
        assert after.total("dedup_claims_total", outcome="ERROR") == 4
        # Another worker may have been answered just in time.
        assert 1 <= after.total("dedup_store_reconnects_total") <= processes
        assert after.total("dedup_store_connections") == processes


def test_forgotten_claims_are_counted(start_service: StartService, start_redis: Callable[..., RedisProcess]) -> None:
    """The metrics count a flush of Redis as one loss and a restart as one restart."""
    redis_server = start_redis()
    service = start_service("--store-url", redis_server.url, "--metrics-listen", "127.0.0.1:0")
    with redis.Redis(port=redis_server.port, protocol=2) as client:

        def counted() -> bool:
            return any(int(client.get(key) or 0) >= 2 for key in client.scan_iter("dedup:~canary:*"))

        wait_until(counted, what="the canary")
        client.flushall()
    wait_until(lambda: Scrape(service).total("dedup_store_forgotten_total") == 1, what="the loss")
    redis_server.stop()
    redis_server.start(redis_server.port)
    wait_until(lambda: Scrape(service).total("dedup_store_restarts_total") == 1, what="the restart")


def test_counters_survive_a_killed_worker(start_service: StartService, redis_server: RedisProcess, unique: str) -> None:
    """After kill -9 of a worker its counters stay and its successor continues them; its gauges are dropped.

    Protection: a successor takes the number of the dead worker and with it the metric files.
    """
    service = start_service("--workers", "2", "--store-url", redis_server.url, "--metrics-listen", "127.0.0.1:0")

    def claim_everywhere(turn: int) -> None:
        for number, stub in enumerate(each_stub(service)):
            for attempt in range(10):
                stub.ClaimTransaction(Claim(transaction_id=f"{unique}-{turn}-{number}-{attempt}"))

    def claimed() -> float:
        return Scrape(service).total("dedup_claims_total", outcome="CLAIMED")

    claim_everywhere(1)
    assert claimed() == 20
    os.kill(pids(service)[1], signal.SIGKILL)
    wait_until(lambda: len(service.events("worker_ready")) == 3, what="the new worker")
    assert claimed() == 20
    claim_everywhere(2)
    assert claimed() == 40
    scrape = Scrape(service)
    assert scrape.total("dedup_worker_restarts_total") == 1
    assert (scrape.total("dedup_workers"), scrape.total("dedup_store_connections")) == (2, 2)
    # This gauge is updated only periodically.
    wait_until(lambda: Scrape(service).total("dedup_calls_in_flight") == 0, what="no in-flight call")


def test_the_metric_files_are_private_and_are_removed_at_exit(
    start_service: StartService, redis_server: RedisProcess
) -> None:
    """Only its owner can access the folder of the metric files, and the service removes it at exit."""
    # tmp_path may be too long for the path of the native engine's socket, which is in this folder too.
    with TemporaryDirectory() as temporary:
        service = start_service(
            *("--workers", "2", "--store-url", redis_server.url, "--metrics-listen", "127.0.0.1:0"),
            environment={"TMPDIR": temporary},
        )
        [folder] = Path(temporary).glob("dedup-metrics-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert list(folder.iterdir())
        assert service.stop() == 0
        assert not folder.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_metrics_port_in_use_prevents_start_up(redis_server: RedisProcess, workers: str) -> None:
    """The service exits with 1, and the error names the setting."""
    address = f"127.0.0.1:{redis_server.port}"
    given = ("--listen", "127.0.0.1:0", "--store-url", redis_server.url, "--workers", workers)
    ended = run_command("serve", *given, "--metrics-listen", address)
    assert ended.returncode == 1
    sentence = f"dedup-service: DEDUP_METRICS_LISTEN (--metrics-listen): cannot listen on {address}: Address already in"
    assert sentence in ended.stderr


def test_prometheus_client_is_imported_only_for_metrics(
    start_service: StartService, redis_server: RedisProcess
) -> None:
    """Neither the command line nor the server imports prometheus_client without `--metrics-listen`."""
    script = "import dedup_service.cli, dedup_service.server.process, sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    service: Any = start_service("--store-url", redis_server.url)
    assert not service.events("metrics_listener_started")

"""The commands in the documentation print what their pages show, against a real Redis in the described state."""

import subprocess
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command
from tests.support.sentinel import SentinelDeployment
from tests.support.walkthrough import Reader, runs_here, sections

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("command-line", "configuration", "errors", "runbook")),
    *(ROOT / "docs" / f"{name}.md" for name in ("concepts", "faq", "index", "security", "stores")),
]
SECTIONS = {f"{page.relative_to(ROOT)}#{anchor}": blocks for page in PAGES for anchor, blocks in sections(page).items()}


@dataclass
class Stage:
    """The environment of one section: a folder, a Redis, and a service over it."""

    folder: Path
    redis: RedisProcess
    serve: Callable[..., ServiceProcess]
    names: dict[str, str] = field(default_factory=dict)
    service: ServiceProcess | None = None

    def start(self, *arguments: str, store_url: str = "") -> ServiceProcess:
        """Start the service that the pages call 127.0.0.1:50051 and wait until it is SERVING."""
        self.service = self.serve("--store-url", store_url or self.redis.url, *arguments)
        self.names |= {"127.0.0.1:50051": self.service.target, "127.0.0.1:6379": f"127.0.0.1:{self.redis.port}"}
        self.wait_for("SERVING")
        return self.service

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that the pages tell the reader to set."""
        assert self.service is not None
        return {
            "DEDUP_TARGET": self.service.target,
            "DEDUP_STORE_URL": self.redis.url,
            "SERVICE_PID": str(self.service.pid),
        }

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the client against the service."""
        assert self.service is not None
        return run_command(*arguments, "--target", self.service.target)

    def wait_for(self, status: str) -> None:
        """Wait until the service has this health status."""
        assert self.service is not None
        with self.service.channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def has_status() -> bool:
                reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
                return bool(reply.status == health_pb2.HealthCheckResponse.ServingStatus.Value(status))

            wait_until(has_status, what=status)

    def redis_cli(self, *arguments: str) -> str:
        """Run a Redis command and return its output."""
        command = ["redis-cli", "-p", str(self.redis.port), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


Setup = Callable[[Stage], Generator[None, None, None]]


def plain(stage: Stage) -> Generator[None, None, None]:
    """A healthy service."""
    stage.start()
    while True:
        yield


def on_one_host(stage: Stage) -> Generator[None, None, None]:
    """The service of `make run`, over the embedded store."""
    stage.start(store_url=f"sqlite://{stage.folder / 'claims.db'}")
    while True:
        yield


def with_an_order_file(stage: Stage) -> Generator[None, None, None]:
    """A file of orders to claim."""
    stage.start()
    second = '{"transaction_id": "order-2", "ttl": "90s", "claimant": "import", "payload_fingerprint": "c2hhMjU2"}'
    (stage.folder / "orders").write_text(f"order-1\n{second}\norder-1\n")
    yield


def with_a_stopped_service(stage: Stage) -> Generator[None, None, None]:
    """A service that was killed."""
    service = stage.start()
    service.kill()
    yield


def with_a_payload_mismatch(stage: Stage) -> Generator[None, None, None]:
    """A log of one id claimed with two fingerprints."""
    service = stage.start()
    assert stage.ask("claim", "order-1234", "--fingerprint", "aaaa").returncode == 0
    assert stage.ask("claim", "order-1234", "--fingerprint", "bbbb").returncode == 4
    wait_until(lambda: len(service.events("call_finished")) == 2, what="the log")
    (stage.folder / "dedup.log").write_text("".join(service.stderr_lines))
    yield


def with_an_evicting_redis(stage: Stage) -> Generator[None, None, None]:
    """A Redis whose configuration allows eviction."""
    stage.redis_cli("config", "set", "maxmemory", "52428800")
    stage.redis_cli("config", "set", "maxmemory-policy", "allkeys-lru")
    stage.start()
    yield


def with_a_redis_outage(stage: Stage) -> Generator[None, None, None]:
    """A Redis that stops and then starts again."""
    stage.start()
    stage.redis.stop()
    stage.wait_for("NOT_SERVING")
    yield
    stage.redis.start(stage.redis.port)
    stage.wait_for("SERVING")
    yield


def with_a_flushed_redis(stage: Stage) -> Generator[None, None, None]:
    """A Redis that is flushed after the service wrote its canary."""
    service = stage.start()
    wait_until(lambda: stage.redis_cli("dbsize") != "0", what="the canary")
    stage.redis_cli("flushall")
    wait_until(lambda: service.events("claims_forgotten"), what="the claims_forgotten event")
    yield


def with_a_failover(stage: Stage) -> Generator[None, None, None]:
    """A master with a replica and three Sentinels."""
    (stage.folder / "sentinel").mkdir()
    deployment = SentinelDeployment(stage.folder / "sentinel")
    try:
        deployment.start()
        service = stage.start(store_url=deployment.url)
        stage.names["26379"] = str(deployment.sentinels[0].port)
        yield
        wait_until(lambda: service.events("store_moved"), what="the store_moved event")
        stage.wait_for("SERVING")
        yield
    finally:
        deployment.stop()


def with_a_hanging_redis(stage: Stage) -> Generator[None, None, None]:
    """A Redis that hangs and then answers; the store timeout is long, so that the caller times out first."""
    stage.start("--store-timeout", "1m")
    stage.redis.pause()
    yield
    stage.redis.resume()
    stage.wait_for("SERVING")
    yield


def at_the_in_flight_limit(stage: Stage) -> Generator[None, None, None]:
    """A service whose in-flight limit of 1 is used up by a claim that waits for a hanging Redis."""
    service = stage.start("--max-in-flight", "1", "--store-timeout", "10m")
    stage.redis.pause()
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        request = dedup_pb2.ClaimTransactionRequest(transaction_id="order-1234")
        hanging = stub.ClaimTransaction.future(request)

        def refused() -> bool:
            nonlocal hanging
            if hanging.done():
                # The claim collided with the look-up below and was itself rejected.
                hanging = stub.ClaimTransaction.future(request)
            try:
                stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id="order-1234"), timeout=1)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return False

        wait_until(refused, what="the claim to be in flight")
        yield
        hanging.cancel()
    stage.redis.resume()


def with_a_hot_id(stage: Stage) -> Generator[None, None, None]:
    """A log with one most frequent id."""
    service = stage.start()
    for _ in range(3):
        stage.ask("claim", "order-1234")
    wait_until(lambda: len(service.events("call_finished")) == 3, what="the log")
    (stage.folder / "dedup.log").write_text("".join(service.stderr_lines))
    yield


def with_a_stuck_claim(stage: Stage) -> Generator[None, None, None]:
    """A claim that is never completed."""
    stage.start()
    assert stage.ask("claim", "order-1234", "--claimant", "lucky-box-api").returncode == 0
    yield
    yield


def in_shadow_mode(stage: Stage) -> Generator[None, None, None]:
    """A namespace in shadow mode with a duplicate."""
    policies = stage.folder / "policies.toml"
    policies.write_text('[namespaces.pay]\nmode = "shadow"\n')
    service = stage.start("--policy-file", str(policies))
    for _ in range(2):
        assert stage.ask("claim", "order-1234", "--namespace", "pay").returncode == 0
    wait_until(lambda: len(service.events("call_finished")) == 2, what="the log")
    (stage.folder / "dedup.log").write_text("".join(service.stderr_lines))
    yield
    yield
    wait_until(lambda: len(service.events("policy_loaded")) == 2, what="the new policies")
    yield


def with_a_rolling_restart(stage: Stage) -> Generator[None, None, None]:
    """An instance that stops, and its successor."""
    service = stage.start()
    assert stage.ask("claim", "order-1234").returncode == 0
    yield
    assert service.wait() == 0
    stage.start()
    yield


def with_raw_keys(stage: Stage) -> Generator[None, None, None]:
    """A service with the raw key layout, next to services that use their own SETNX."""
    stage.start("--key-layout", "raw")
    yield
    yield


SETUPS: dict[str, Setup] = {
    "README.md#60-seconds-to-the-first-claim": on_one_host,
    "README.md#choose-your-client": plain,
    "docs/command-line.md#batches": with_an_order_file,
    "docs/command-line.md#the-doctor": with_an_evicting_redis,
    "docs/errors.md#example": plain,
    "docs/runbook.md#runbook": plain,
    "docs/runbook.md#service-down": with_a_stopped_service,
    "docs/runbook.md#payload-mismatch": with_a_payload_mismatch,
    "docs/runbook.md#store-unreachable": with_a_redis_outage,
    "docs/runbook.md#claims-forgotten": with_a_flushed_redis,
    "docs/runbook.md#failover": with_a_failover,
    "docs/runbook.md#unknown-outcomes": with_a_hanging_redis,
    "docs/runbook.md#slow-claims": plain,
    "docs/runbook.md#in-flight": at_the_in_flight_limit,
    "docs/runbook.md#hot-id": with_a_hot_id,
    "docs/runbook.md#stuck-claims": with_a_stuck_claim,
    "docs/runbook.md#shadow-duplicates": in_shadow_mode,
    "docs/runbook.md#redis-evicts": with_an_evicting_redis,
    "docs/runbook.md#rolling-restart": with_a_rolling_restart,
    "docs/runbook.md#rolling-migration-from-in-process-setnx": with_raw_keys,
}


@pytest.fixture
def serve() -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services and kills them after the test."""
    started: list[ServiceProcess] = []

    def start(*arguments: str) -> ServiceProcess:
        started.append(ServiceProcess(*arguments))
        return started[-1].start()

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_a_section_work(
    section: str, start_redis: Callable[..., RedisProcess], serve: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """Each command of a section, in order, prints what the page shows."""
    stage, reader = Stage(tmp_path, start_redis(), serve), Reader(tmp_path)
    setup = SETUPS[section](stage)
    for block in SECTIONS[section]:
        next(setup)
        for step in filter(runs_here, block):
            reader.follow(step, stage.names, stage.environment)
    setup.close()


def test_every_section_with_commands_has_a_setup() -> None:
    """A new section without a setup, or a setup of a removed section, fails this test."""
    assert set(SECTIONS) == set(SETUPS)

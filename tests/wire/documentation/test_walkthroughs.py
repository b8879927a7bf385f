"""Every command of the documentation does what its page says, against a real Redis in the state that it is about."""

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
    """What a section is tried on: a folder, a Redis, and a service in front of it."""

    folder: Path
    redis: RedisProcess
    serve: Callable[..., ServiceProcess]
    names: dict[str, str] = field(default_factory=dict)
    service: ServiceProcess | None = None

    def start(self, *arguments: str, store_url: str = "") -> ServiceProcess:
        """Start the service that the pages call 127.0.0.1:50051, and return when it answers its health check."""
        self.service = self.serve("--store-url", store_url or self.redis.url, *arguments)
        self.names |= {"127.0.0.1:50051": self.service.target, "127.0.0.1:6379": f"127.0.0.1:{self.redis.port}"}
        self.wait_for("SERVING")
        return self.service

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the pages tell their reader to set."""
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
        """Return when health says so."""
        assert self.service is not None
        with self.service.channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def says_so() -> bool:
                reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
                return bool(reply.status == health_pb2.HealthCheckResponse.ServingStatus.Value(status))

            wait_until(says_so, what=status)

    def redis_cli(self, *arguments: str) -> str:
        """Run a command of Redis, and return what it answers."""
        command = ["redis-cli", "-p", str(self.redis.port), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


Play = Callable[[Stage], Generator[None, None, None]]


def plain(stage: Stage) -> Generator[None, None, None]:
    """A service in order."""
    stage.start()
    while True:
        yield


def on_one_host(stage: Stage) -> Generator[None, None, None]:
    """The service of `make run`, over the embedded store."""
    stage.start(store_url=f"sqlite://{stage.folder / 'claims.db'}")
    while True:
        yield


def with_a_file_of_orders(stage: Stage) -> Generator[None, None, None]:
    """A file to claim from."""
    stage.start()
    second = '{"transaction_id": "order-2", "ttl": "90s", "claimant": "import", "payload_fingerprint": "c2hhMjU2"}'
    (stage.folder / "orders").write_text(f"order-1\n{second}\norder-1\n")
    yield


def that_ended(stage: Stage) -> Generator[None, None, None]:
    """No service where the pages say that there is one."""
    service = stage.start()
    service.kill()
    yield


def with_other_contents(stage: Stage) -> Generator[None, None, None]:
    """An id that comes with two fingerprints, and the log of that."""
    service = stage.start()
    assert stage.ask("claim", "order-1234", "--fingerprint", "aaaa").returncode == 0
    assert stage.ask("claim", "order-1234", "--fingerprint", "bbbb").returncode == 4
    wait_until(lambda: len(service.events("call_finished")) == 2, what="the log")
    (stage.folder / "dedup.log").write_text("".join(service.stderr_lines))
    yield


def that_evicts(stage: Stage) -> Generator[None, None, None]:
    """A Redis that may forget."""
    stage.redis_cli("config", "set", "maxmemory", "52428800")
    stage.redis_cli("config", "set", "maxmemory-policy", "allkeys-lru")
    stage.start()
    yield


def that_goes_and_returns(stage: Stage) -> Generator[None, None, None]:
    """A Redis that is away, and then is there again."""
    stage.start()
    stage.redis.stop()
    stage.wait_for("NOT_SERVING")
    yield
    stage.redis.start(stage.redis.port)
    stage.wait_for("SERVING")
    yield


def that_was_flushed(stage: Stage) -> Generator[None, None, None]:
    """A Redis that has lost everything once the service knew what it had."""
    service = stage.start()
    wait_until(lambda: stage.redis_cli("dbsize") != "0", what="the service to count on something")
    stage.redis_cli("flushall")
    wait_until(lambda: service.events("claims_forgotten"), what="the service to notice")
    yield


def that_fails_over(stage: Stage) -> Generator[None, None, None]:
    """A master with a replica and three Sentinels."""
    (stage.folder / "sentinel").mkdir()
    deployment = SentinelDeployment(stage.folder / "sentinel")
    try:
        deployment.start()
        service = stage.start(store_url=deployment.url)
        stage.names["26379"] = str(deployment.sentinels[0].port)
        yield
        wait_until(lambda: service.events("store_moved"), what="the service to follow")
        stage.wait_for("SERVING")
        yield
    finally:
        deployment.stop()


def that_hangs(stage: Stage) -> Generator[None, None, None]:
    """A Redis that does not answer, and then does; the service is patient, so that the caller gives up first."""
    stage.start("--store-timeout", "1m")
    stage.redis.pause()
    yield
    stage.redis.resume()
    stage.wait_for("SERVING")
    yield


def that_is_full(stage: Stage) -> Generator[None, None, None]:
    """A service whose one place is taken by a call that waits."""
    service = stage.start("--max-in-flight", "1")
    assert stage.ask("claim", "order-1234", "--ttl", "1h").returncode == 0
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        request = dedup_pb2.ClaimTransactionRequest(transaction_id="order-1234")
        request.wait.FromSeconds(100)
        waiting = stub.ClaimTransaction.future(request, timeout=110)

        def refused() -> bool:
            nonlocal waiting
            if waiting.done():
                # It met a look-up of this function, and was refused itself.
                waiting = stub.ClaimTransaction.future(request, timeout=110)
            try:
                stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id="order-1234"), timeout=10)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return False

        wait_until(refused, what="the waiting call to take its place")
        yield
        waiting.cancel()


def with_a_hot_id(stage: Stage) -> Generator[None, None, None]:
    """A log in which one id stands most often."""
    service = stage.start()
    for _ in range(3):
        stage.ask("claim", "order-1234")
    wait_until(lambda: len(service.events("call_finished")) == 3, what="the log")
    (stage.folder / "dedup.log").write_text("".join(service.stderr_lines))
    yield


def with_a_stuck_claim(stage: Stage) -> Generator[None, None, None]:
    """A claim that nobody completes."""
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
    wait_until(lambda: len(service.events("policy_loaded")) == 2, what="the new rules")
    yield


def that_is_replaced(stage: Stage) -> Generator[None, None, None]:
    """An instance that ends, and its successor."""
    service = stage.start()
    assert stage.ask("claim", "order-1234").returncode == 0
    yield
    assert service.wait() == 0
    stage.start()
    yield


def beside_old_code(stage: Stage) -> Generator[None, None, None]:
    """A service that shares the keys of services with a SETNX of their own."""
    stage.start("--key-layout", "raw")
    yield
    yield


PLAYS: dict[str, Play] = {
    "README.md#60-seconds-to-the-first-claim": on_one_host,
    "README.md#choose-your-client": plain,
    "docs/command-line.md#batches": with_a_file_of_orders,
    "docs/command-line.md#the-doctor": that_evicts,
    "docs/errors.md#what-an-error-looks-like": plain,
    "docs/runbook.md#runbook": plain,
    "docs/runbook.md#service-down": that_ended,
    "docs/runbook.md#payload-mismatch": with_other_contents,
    "docs/runbook.md#store-unreachable": that_goes_and_returns,
    "docs/runbook.md#claims-forgotten": that_was_flushed,
    "docs/runbook.md#failover": that_fails_over,
    "docs/runbook.md#unknown-outcomes": that_hangs,
    "docs/runbook.md#slow-claims": plain,
    "docs/runbook.md#in-flight": that_is_full,
    "docs/runbook.md#hot-id": with_a_hot_id,
    "docs/runbook.md#stuck-claims": with_a_stuck_claim,
    "docs/runbook.md#shadow-duplicates": in_shadow_mode,
    "docs/runbook.md#redis-evicts": that_evicts,
    "docs/runbook.md#rolling-restart": that_is_replaced,
    "docs/runbook.md#rolling-migration-from-in-process-setnx": beside_old_code,
}


@pytest.fixture
def serve() -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services, and ends them with the test."""
    started: list[ServiceProcess] = []

    def start(*arguments: str) -> ServiceProcess:
        started.append(ServiceProcess(*arguments))
        return started[-1].start()

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_can_be_walked(
    section: str, start_redis: Callable[..., RedisProcess], serve: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """Each of its commands, in order, prints what the page says."""
    stage, reader = Stage(tmp_path, start_redis(), serve), Reader(tmp_path)
    play = PLAYS[section](stage)
    for block in SECTIONS[section]:
        next(play)
        for step in filter(runs_here, block):
            reader.follow(step, stage.names, stage.environment)
    play.close()


def test_every_section_with_commands_is_known() -> None:
    """A section that nobody arranged anything for, or that is no more, is noticed."""
    assert set(SECTIONS) == set(PLAYS)

"""Several workers on one port: claims across workers, crashes, signals, and start-up errors."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess, free_port, run_command
from tests.support.workers import OWN_CONNECTION, channels_to_each, pids

StartService = Callable[..., ServiceProcess]
StartWorkers = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest
CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED
DUPLICATE = dedup_pb2.CLAIM_OUTCOME_DUPLICATE


@pytest.fixture(params=["redis", "sqlite"])
def store_url(request: pytest.FixtureRequest, redis_server: RedisProcess, tmp_path: Path) -> str:
    """A store that several processes share."""
    return redis_server.url if request.param == "redis" else f"sqlite://{tmp_path / 'claims.db'}"


@pytest.fixture
def start_workers(start_service: StartService, redis_server: RedisProcess) -> StartWorkers:
    """Starts two workers over Redis, with additional options."""

    def start(*arguments: str) -> ServiceProcess:
        return start_service("--workers", "2", "--store-url", redis_server.url, *arguments)

    return start


@pytest.fixture
def channels(start_workers: StartWorkers) -> Iterator[dict[int, grpc.Channel]]:
    """A channel to each of two workers, by worker number."""
    with ExitStack() as held:
        found = channels_to_each(start_workers())
        for channel in found.values():
            held.enter_context(channel)
        yield found


async def test_one_concurrent_claim_wins_across_workers(
    start_service: StartService, store_url: str, unique: str
) -> None:
    """Of concurrent claims of one id at both workers exactly one receives CLAIMED, over either store."""
    service = await asyncio.to_thread(start_service, "--workers", "2", "--store-url", store_url, "--log-sample", "1")
    channels = [grpc.aio.insecure_channel(service.target, options=OWN_CONNECTION) for _ in range(12)]
    stubs = [dedup_pb2_grpc.DedupServiceStub(channel) for channel in channels]
    answered: set[int] = set()
    for number in range(50):
        request = Claim(transaction_id=f"{unique}-{number}")
        replies = await asyncio.gather(*(stub.ClaimTransaction(request) for stub in stubs))
        assert Counter(reply.outcome for reply in replies) == {CLAIMED: 1, DUPLICATE: len(stubs) - 1}
        answered = {line["worker"] for line in service.events("call_finished")}
        if number >= 10 and answered == {1, 2}:
            break
    for channel in channels:
        await channel.close()
    assert answered == {1, 2}
    assert await asyncio.to_thread(service.stop) == 0


def test_a_waiter_receives_a_completion_from_another_worker(channels: dict[int, grpc.Channel], unique: str) -> None:
    """A call that waits at one worker receives the result when the holder completes at the other."""
    here, there = (dedup_pb2_grpc.DedupServiceStub(channels[number]) for number in (1, 2))
    held = here.ClaimTransaction(Claim(transaction_id=unique))
    request = Claim(transaction_id=unique)
    request.wait.FromSeconds(60)
    waiting = there.ClaimTransaction.future(request)
    completion = dedup_pb2.CompleteTransactionRequest(
        transaction_id=unique, claim_token=held.claim_token, result=b"paid"
    )
    assert here.CompleteTransaction(completion).outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
    reply = waiting.result(timeout=20)
    assert (reply.outcome, reply.transaction.result) == (DUPLICATE, b"paid")


class Load:
    """Callers that claim unique ids until stopped and retry failed calls with the same token.

    With `retry=False` a caller ends with its first failure. `codes` counts the status of every attempt, `outcomes` the
    final outcome of every claim.
    """

    def __init__(self, service: ServiceProcess, unique: str, *, retry: bool = True) -> None:
        self._service = service
        self._unique = unique
        self._retry = retry
        self._stopped = False
        self.codes: Counter[grpc.StatusCode] = Counter()
        self.outcomes: Counter[int] = Counter()

    async def caller(self, number: int) -> None:
        """Claim repeatedly over one connection."""
        async with grpc.aio.insecure_channel(self._service.target, options=OWN_CONNECTION) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            attempt = 0
            outcome = None
            while not self._stopped and outcome != dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED:
                attempt += 1
                name = f"{self._unique}-{number}-{attempt}"
                outcome = await self._claim(stub, Claim(transaction_id=name, claim_token=name))
                self.outcomes[outcome] += 1
                # Leaves processor time to the workers that start.
                await asyncio.sleep(0.05)

    async def _claim(self, stub: "dedup_pb2_grpc.DedupServiceAsyncStub", request: Claim) -> int:
        while True:
            try:
                reply = await stub.ClaimTransaction(request, timeout=20)
            except grpc.aio.AioRpcError as error:
                self.codes[error.code()] += 1
                if self._stopped or not self._retry:
                    return dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED
                await asyncio.sleep(0.01)
            else:
                self.codes[grpc.StatusCode.OK] += 1
                return reply.outcome

    async def grown(self, calls: int) -> None:
        """Wait until `calls` more calls were answered."""
        goal = self.codes[grpc.StatusCode.OK] + calls

        async def enough() -> bool:
            return self.codes[grpc.StatusCode.OK] >= goal

        await eventually(enough, what="load")

    def stop(self) -> None:
        """Let every caller end after its current call."""
        self._stopped = True


@pytest.mark.every_engine
async def test_a_killed_worker_is_restarted_without_losing_claims(start_workers: StartWorkers, unique: str) -> None:
    """After kill -9 of a worker under load a new one starts, and its callers' retries receive CLAIMED.

    Callers see only OK and UNAVAILABLE. Protections: the restart, and the token in the stored value.
    """
    service = await asyncio.to_thread(start_workers)
    load = Load(service, unique)
    callers = [asyncio.create_task(load.caller(number)) for number in range(16)]
    await load.grown(200)
    os.kill(pids(service)[1], signal.SIGKILL)

    async def restarted() -> bool:
        return len(service.events("worker_ready")) == 3

    await eventually(restarted, what="the new worker")
    await load.grown(200)
    load.stop()
    await asyncio.gather(*callers)
    assert set(load.codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert set(load.outcomes) == {CLAIMED}
    [death] = service.events("worker_died")
    assert (death["worker"], death["status"], death["restart_in_s"]) == (1, "killed by SIGKILL", 0)
    for channel in (await asyncio.to_thread(channels_to_each, service)).values():
        channel.close()
    assert await asyncio.to_thread(service.stop) == 0


@pytest.mark.every_engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_every_worker(start_workers: StartWorkers, unique: str, number: signal.Signals) -> None:
    """On SIGTERM or SIGINT under load every call is answered or UNAVAILABLE, and the supervisor exits last."""
    service = await asyncio.to_thread(start_workers)
    load = Load(service, unique, retry=False)
    callers = [asyncio.create_task(load.caller(number)) for number in range(16)]
    await load.grown(200)
    service.signal(number)
    await asyncio.gather(*callers)
    assert set(load.codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert await asyncio.to_thread(service.wait) == 0
    assert sorted(line["worker"] for line in service.events("server_stopped")) == [1, 2]
    assert service.logs[-1]["event"] == "supervisor_stopped"
    assert not [line for line in service.logs if line["level"] == "error"]


@pytest.mark.every_engine
async def test_sigusr2_replaces_workers_one_by_one(start_workers: StartWorkers, unique: str) -> None:
    """On SIGUSR2 under load new workers replace the old ones, and callers that retry lose no call.

    Callers see UNAVAILABLE while a worker drains, and CANCELLED for calls that gRPC had not yet dispatched when it
    stopped. Protection: a new worker serves before the old one drains.
    """
    service = await asyncio.to_thread(start_workers)
    load = Load(service, unique)
    callers = [asyncio.create_task(load.caller(number)) for number in range(16)]
    await load.grown(200)
    service.signal(signal.SIGUSR2)

    async def replaced() -> bool:
        return bool(service.events("workers_replaced"))

    await eventually(replaced, 60, what="the new workers")
    await load.grown(200)
    load.stop()
    await asyncio.gather(*callers)
    assert set(load.codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert set(load.outcomes) == {CLAIMED}
    turns = [
        (line["event"], line["worker"])
        for line in service.logs
        if line["event"] in ("worker_ready", "shutdown_started", "server_stopped")
    ]
    assert turns[2:] == [
        *(("worker_ready", 3), ("shutdown_started", 1), ("server_stopped", 1)),
        *(("worker_ready", 1), ("shutdown_started", 2), ("server_stopped", 2)),
    ]
    assert not service.events("worker_died")
    assert await asyncio.to_thread(service.stop) == 0


def test_sighup_reaches_every_worker(start_workers: StartWorkers, tmp_path: Path) -> None:
    """On SIGHUP to the supervisor each worker reloads the policy file."""
    policies = tmp_path / "policies.toml"
    policies.write_text("[namespaces.a]\n")
    service = start_workers("--policy-file", str(policies))
    policies.write_text("[namespaces.b]\n")
    service.signal(signal.SIGHUP)

    def loaded() -> list[int]:
        return sorted(line["worker"] for line in service.events("policy_loaded") if line["namespaces"] == ["b"])

    wait_until(lambda: loaded() == [1, 2], what="the new policies")


def test_workers_exit_when_their_supervisor_is_killed(start_workers: StartWorkers) -> None:
    """After SIGKILL of the supervisor its workers drain and exit.

    Protection: each worker detects that the pipe from the supervisor closed.
    """
    service = start_workers()
    # Returns once no process holds the log pipe open.
    service.kill()
    assert sorted(line["worker"] for line in service.events("server_stopped")) == [1, 2]


@pytest.mark.every_engine
def test_a_second_service_cannot_share_the_workers_port(start_workers: StartWorkers, tmp_path: Path) -> None:
    """Workers share their port with each other but not with another service.

    Protection: the probe without SO_REUSEPORT.
    """
    service = start_workers()
    sentence = f"dedup-service: cannot listen on {service.target}: Address already in use: does another server listen"
    arguments = ("serve", "--listen", service.target, "--store-url", f"sqlite://{tmp_path / 'x.db'}")
    for workers in ("1", "2"):
        ended = run_command(*arguments, "--workers", workers)
        assert ended.returncode == 1
        assert [line for line in ended.stderr.splitlines() if not line.startswith(("{", sentence))] == []
        assert sentence in ended.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("--policy-file", "/nowhere/policies.toml"), 2, "the policy file '/nowhere/policies.toml' is not usable"),
        (("--store-url", "sqlite:///dev/null/claims.db"), 1, "/dev/null/claims.db"),
        (("--store-url", "mysql://x"), 2, "DEDUP_STORE_URL (--store-url): the store URL must begin with one of"),
    ],
)
def test_a_failed_first_start_ends_the_service(
    redis_server: RedisProcess, workers: str, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    """If a worker cannot start, the service exits as a single process would: one sentence and the same exit code."""
    given = ("serve", "--listen", "127.0.0.1:0", "--store-url", redis_server.url, *arguments)
    ended = run_command(*given, "--workers", workers)
    assert ended.returncode == exit_code
    [sentence] = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert sentence.startswith("dedup-service: ")
    assert words in sentence


def test_failed_restarts_are_retried(start_workers: StartWorkers, tmp_path: Path) -> None:
    """A dead worker is retried until its invalid policy file is corrected; the other worker keeps serving.

    SIGUSR2 replaces no worker meanwhile. Protection: only a failure of the very first start ends the service.
    """
    policies = tmp_path / "policies.toml"
    policies.write_text("[namespaces.a]\n")
    service = start_workers("--policy-file", str(policies))
    policies.write_text("nonsense")
    service.signal(signal.SIGUSR2)
    wait_until(lambda: service.events("worker_replacement_failed"), what="the worker_replacement_failed event")
    assert "is not usable" in service.events("worker_replacement_failed")[0]["message"]
    assert not service.events("shutdown_started")
    os.kill(pids(service)[2], signal.SIGKILL)
    wait_until(lambda: len(service.events("worker_died")) >= 3, what="two failed restarts")
    deaths = service.events("worker_died")
    assert [line["restart_in_s"] for line in deaths[:3]] == [0, 0.25, 0.5]
    assert "is not usable" in deaths[1]["refusal"]
    policies.write_text("[namespaces.a]\n")
    wait_until(lambda: len(service.events("worker_ready")) == 3, what="the new worker")
    assert service.stop() == 0


def test_the_supervisor_imports_no_heavy_modules() -> None:
    """The supervisor imports neither gRPC, protobuf, a store driver, the settings nor the metrics library."""
    script = (
        "import dedup_service.cli, dedup_service.supervisor.process, json, sys; print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    modules = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    heavy = {
        "grpc",
        "google.protobuf",
        "redis",
        "hiredis",
        "msgpack",
        "prometheus_client",
        "dedup",
        "dedup_service.config.settings",
    }
    assert heavy & set(modules) == set()


def test_command_lines_do_not_contain_the_password(start_service: StartService, redis_server: RedisProcess) -> None:
    """Neither the supervisor nor a worker has the store URL on its command line."""
    url = redis_server.url.replace("redis://", "redis://default:s3cret@")
    service = start_service("--workers", "2", environment={"DEDUP_STORE_URL": url})
    processes = ",".join(map(str, (service.pid, *pids(service).values())))
    listed = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", processes], capture_output=True, check=True, text=True
    ).stdout
    assert len(listed.splitlines()) == 3
    assert "s3cret" not in listed


def test_the_banner_names_the_shared_port(redis_server: RedisProcess) -> None:
    """`--banner` is printed once, with the port that was chosen."""
    service = ServiceProcess("--workers", "2", "--banner", "--store-url", redis_server.url).start()
    assert service.stop() == 0
    assert service.stdout.count(f"is serving on {service.target}.") == 1
    assert not service.target.endswith(":0")


def test_workers_can_reuse_a_fixed_port_immediately(start_service: StartService, redis_server: RedisProcess) -> None:
    """Workers can listen on a fixed port right after a previous service on it exited."""
    address = f"127.0.0.1:{free_port()}"
    for workers in ("1", "2", "2"):
        service = start_service("--listen", address, "--workers", workers, "--store-url", redis_server.url)
        assert service.target == address
        with service.channel() as channel:
            look = dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction.future(
                dedup_pb2.GetTransactionRequest(transaction_id="unclaimed")
            )
            assert look.code() is grpc.StatusCode.NOT_FOUND
            # The side that closes first keeps the connection in TIME_WAIT: the server must close first here.
            assert service.stop() == 0

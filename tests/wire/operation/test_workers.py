"""Several workers on one port, as callers and operators meet them: shared calls, deaths, signals, and refusals."""

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
    """Starts two workers over Redis, or with options of the test's own."""

    def start(*arguments: str) -> ServiceProcess:
        return start_service("--workers", "2", "--store-url", redis_server.url, *arguments)

    return start


@pytest.fixture
def channels(start_workers: StartWorkers) -> Iterator[dict[int, grpc.Channel]]:
    """A channel to each of two workers."""
    with ExitStack() as held:
        found = channels_to_each(start_workers())
        for channel in found.values():
            held.enter_context(channel)
        yield found


async def test_exactly_one_of_concurrent_claims_wins_across_workers(
    start_service: StartService, store_url: str, unique: str
) -> None:
    """Of the claims of one id that reach both workers at the same time, exactly one is CLAIMED, over either store."""
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


def test_a_claim_that_waits_hears_of_an_end_in_another_worker(channels: dict[int, grpc.Channel], unique: str) -> None:
    """Who waits at one worker is told the result as soon as the holder completes at the other one."""
    here, there = (dedup_pb2_grpc.DedupServiceStub(channels[number]) for number in (1, 2))
    held = here.ClaimTransaction(Claim(transaction_id=unique))
    request = Claim(transaction_id=unique)
    request.wait.FromSeconds(60)
    waiting = there.ClaimTransaction.future(request)
    completion = dedup_pb2.CompleteTransactionRequest(
        transaction_id=unique, claim_token=held.claim_token, result=b"paid"
    )
    assert here.CompleteTransaction(completion).outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
    told = waiting.result(timeout=20)
    assert (told.outcome, told.transaction.result) == (DUPLICATE, b"paid")


class Load:
    """Callers that claim ids of their own until they are stopped, and repeat with the same token what fails.

    A caller that is not `patient` ends with its first failure instead. The proof is left to the test: `codes` of every
    try, and the `outcomes` that each logical call ended with.
    """

    def __init__(self, service: ServiceProcess, unique: str, *, patient: bool = True) -> None:
        self._service = service
        self._unique = unique
        self._patient = patient
        self._stopped = False
        self.codes: Counter[grpc.StatusCode] = Counter()
        self.outcomes: Counter[int] = Counter()

    async def caller(self, number: int) -> None:
        """Claim again and again over one connection."""
        async with grpc.aio.insecure_channel(self._service.target, options=OWN_CONNECTION) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            attempt = 0
            outcome = None
            while not self._stopped and outcome != dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED:
                attempt += 1
                name = f"{self._unique}-{number}-{attempt}"
                outcome = await self._claim(stub, Claim(transaction_id=name, claim_token=name))
                self.outcomes[outcome] += 1

    async def _claim(self, stub: "dedup_pb2_grpc.DedupServiceAsyncStub", request: Claim) -> int:
        while True:
            try:
                reply = await stub.ClaimTransaction(request, timeout=20)
            except grpc.aio.AioRpcError as error:
                self.codes[error.code()] += 1
                if self._stopped or not self._patient:
                    return dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED
                await asyncio.sleep(0.01)
            else:
                self.codes[grpc.StatusCode.OK] += 1
                return reply.outcome

    async def grown(self, calls: int) -> None:
        """Return when so many more calls were answered."""
        goal = self.codes[grpc.StatusCode.OK] + calls

        async def enough() -> bool:
            return self.codes[grpc.StatusCode.OK] >= goal

        await eventually(enough, what="load")

    def stop(self) -> None:
        """Let every caller end with the call that it is in."""
        self._stopped = True


@pytest.mark.every_engine
async def test_a_killed_worker_is_replaced_and_costs_only_its_own_calls(
    start_workers: StartWorkers, unique: str
) -> None:
    """After kill -9 of a worker under load another takes its place, and what its callers repeat is CLAIMED.

    Callers see nothing but answers and UNAVAILABLE. Protections: the restart, and the token in the stored value.
    """
    service = await asyncio.to_thread(start_workers)
    load = Load(service, unique)
    callers = [asyncio.create_task(load.caller(number)) for number in range(16)]
    await load.grown(500)
    os.kill(pids(service)[1], signal.SIGKILL)

    async def restarted() -> bool:
        return len(service.events("worker_ready")) == 3

    await eventually(restarted, what="the new worker")
    await load.grown(500)
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
    """At SIGTERM and SIGINT under load every call ends with an answer or UNAVAILABLE, and the supervisor ends last."""
    service = await asyncio.to_thread(start_workers)
    load = Load(service, unique, patient=False)
    callers = [asyncio.create_task(load.caller(number)) for number in range(16)]
    await load.grown(500)
    service.signal(number)
    await asyncio.gather(*callers)
    assert set(load.codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert await asyncio.to_thread(service.wait) == 0
    assert sorted(line["worker"] for line in service.events("server_stopped")) == [1, 2]
    assert service.logs[-1]["event"] == "supervisor_stopped"
    assert not [line for line in service.logs if line["level"] == "error"]


@pytest.mark.every_engine
async def test_workers_are_replaced_one_by_one_under_load(start_workers: StartWorkers, unique: str) -> None:
    """At SIGUSR2 new workers take over from the old ones, and callers that repeat with their token lose no call.

    They see UNAVAILABLE while a worker drains, and CANCELLED where gRPC had not handed a call over when it stopped.
    Protection: a new worker serves before the old one drains.
    """
    service = await asyncio.to_thread(start_workers)
    load = Load(service, unique)
    callers = [asyncio.create_task(load.caller(number)) for number in range(16)]
    await load.grown(500)
    service.signal(signal.SIGUSR2)

    async def replaced() -> bool:
        return bool(service.events("workers_replaced"))

    await eventually(replaced, 60, what="the new workers")
    await load.grown(500)
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
    """A changed policy file is read by each worker at one SIGHUP of the supervisor."""
    policies = tmp_path / "policies.toml"
    policies.write_text("[namespaces.a]\n")
    service = start_workers("--policy-file", str(policies))
    policies.write_text("[namespaces.b]\n")
    service.signal(signal.SIGHUP)

    def loaded() -> list[int]:
        return sorted(line["worker"] for line in service.events("policy_loaded") if line["namespaces"] == ["b"])

    wait_until(lambda: loaded() == [1, 2], what="the new policies")


def test_workers_end_when_their_supervisor_is_killed(start_workers: StartWorkers) -> None:
    """Workers whose supervisor got SIGKILL drain and end by themselves.

    Protection: the end of the pipe from the supervisor.
    """
    service = start_workers()
    # Returns when nobody holds the log any more.
    service.kill()
    assert sorted(line["worker"] for line in service.events("server_stopped")) == [1, 2]


@pytest.mark.every_engine
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_service_on_the_port_is_refused(start_workers: StartWorkers, tmp_path: Path, workers: str) -> None:
    """The port that workers share among themselves is not shared with another service, however many workers it has.

    Protection: the probe without SO_REUSEPORT.
    """
    service = start_workers()
    url = f"sqlite://{tmp_path / 'x.db'}"
    ended = run_command("serve", "--listen", service.target, "--store-url", url, "--workers", workers)
    sentence = f"dedup-service: cannot listen on {service.target}: Address already in use: does another server listen"
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
def test_workers_that_cannot_start_end_everything(
    redis_server: RedisProcess, workers: str, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    """What keeps one worker from starting ends the service as it would alone: one sentence, and the same exit code."""
    given = ("serve", "--listen", "127.0.0.1:0", "--store-url", redis_server.url, *arguments)
    ended = run_command(*given, "--workers", workers)
    assert ended.returncode == exit_code
    [sentence] = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert sentence.startswith("dedup-service: ")
    assert words in sentence


def test_a_worker_that_cannot_start_again_is_tried_again(start_workers: StartWorkers, tmp_path: Path) -> None:
    """With a policy file that was broken since, a dead worker comes back when it is mended; the other one goes on.

    At SIGUSR2 meanwhile nobody is replaced. Protection: only the first start of all ends the service.
    """
    policies = tmp_path / "policies.toml"
    policies.write_text("[namespaces.a]\n")
    service = start_workers("--policy-file", str(policies))
    policies.write_text("nonsense")
    service.signal(signal.SIGUSR2)
    wait_until(lambda: service.events("worker_replacement_failed"), what="the refusal")
    assert "is not usable" in service.events("worker_replacement_failed")[0]["message"]
    assert not service.events("shutdown_started")
    os.kill(pids(service)[2], signal.SIGKILL)
    wait_until(lambda: len(service.events("worker_died")) >= 3, what="two vain restarts")
    deaths = service.events("worker_died")
    assert [line["restart_in_s"] for line in deaths[:3]] == [0, 0.25, 0.5]
    assert "is not usable" in deaths[1]["refusal"]
    policies.write_text("[namespaces.a]\n")
    wait_until(lambda: len(service.events("worker_ready")) == 3, what="the new worker")
    assert service.stop() == 0


def test_the_supervisor_loads_no_grpc_and_no_driver() -> None:
    """What supervises the workers imports neither gRPC nor protobuf, a driver, the settings or the metrics library."""
    script = (
        "import dedup_service.cli, dedup_service.supervisor.process, json, sys; print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    modules = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    heavy = {"grpc", "google.protobuf", "redis", "hiredis", "msgpack", "pydantic", "prometheus_client", "dedup"}
    assert heavy & set(modules) == set()


def test_a_password_is_on_no_command_line(start_service: StartService, redis_server: RedisProcess) -> None:
    """Neither the supervisor nor a worker shows the store URL to the users of the host."""
    url = redis_server.url.replace("redis://", "redis://default:s3cret@")
    service = start_service("--workers", "2", environment={"DEDUP_STORE_URL": url})
    processes = ",".join(map(str, (service.pid, *pids(service).values())))
    listed = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", processes], capture_output=True, check=True, text=True
    ).stdout
    assert len(listed.splitlines()) == 3
    assert "s3cret" not in listed


def test_the_banner_names_the_shared_port(redis_server: RedisProcess) -> None:
    """`--banner` is printed once, with the port that was free."""
    service = ServiceProcess("--workers", "2", "--banner", "--store-url", redis_server.url).start()
    assert service.stop() == 0
    assert service.stdout.count(f"is serving on {service.target}.") == 1
    assert not service.target.endswith(":0")


def test_a_port_that_is_asked_for_by_number_is_the_one(start_service: StartService, redis_server: RedisProcess) -> None:
    """A fixed port is served by the workers, again right after an earlier service on it has ended."""
    address = f"127.0.0.1:{free_port()}"
    for workers in ("1", "2", "2"):
        service = start_service("--listen", address, "--workers", workers, "--store-url", redis_server.url)
        assert service.target == address
        with service.channel() as channel:
            look = dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction.future(
                dedup_pb2.GetTransactionRequest(transaction_id="nobody")
            )
            assert look.code() is grpc.StatusCode.NOT_FOUND
            # Whose end closes the connection first is the one that leaves it in TIME_WAIT.
            assert service.stop() == 0

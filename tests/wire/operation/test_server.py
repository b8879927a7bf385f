"""The server as operators see it: health, reflection, listeners, shutdown, outages, and logs."""

import asyncio
import hashlib
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from dedup_service.server.life_cycle import LAME_DUCK_S
from tests.support.errors import refused
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess, free_port, run_command

pytestmark = pytest.mark.every_engine

StartService = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(service: ServiceProcess, name: str) -> int:
    """Return the health status of one name."""
    with service.channel() as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    return int(reply.status)


def claim(service: ServiceProcess, transaction_id: str, **metadata: str) -> grpc.Call:
    """Claim over a new channel and return the finished call."""
    pairs = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    with service.channel() as channel:
        _, call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction.with_call(
            Claim(transaction_id=transaction_id), metadata=pairs
        )
    return call


def test_reflection_describes_the_service(service: ServiceProcess) -> None:
    """Tools without the proto file can list the service and its messages."""
    with service.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"dedup.v1.DedupService", "grpc.health.v1.Health"} <= set(database.get_services())
        file = database.FindFileContainingSymbol("dedup.v1.DedupService")
        assert file.name == "dedup/v1/dedup.proto"


def test_both_health_names_are_serving(service: ServiceProcess) -> None:
    """The server and the service are SERVING while the store answers."""
    assert health_of(service, "") == SERVING
    assert health_of(service, "dedup.v1.DedupService") == SERVING


def test_health_follows_redis(start_service: StartService, tmp_path: Path, unique: str) -> None:
    """Health is SERVING only while Redis answers, and recovers by itself.

    Protections: the continuous readiness check and the automatic reconnect.
    """
    port = free_port()
    service = start_service("--store-url", f"redis://127.0.0.1:{port}", "--store-timeout", "500ms")
    assert health_of(service, "") == health_of(service, "dedup.v1.DedupService") == NOT_SERVING
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        answer = refused(lambda: stub.ClaimTransaction(Claim(transaction_id=unique)))
    assert (answer.code, answer.reason, answer.applied) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNREACHABLE", "no")
    assert answer.retry_after_ms
    redis_server = RedisProcess(tmp_path).start(port)
    try:
        wait_until(lambda: health_of(service, "") == SERVING, what="SERVING")
        assert health_of(service, "dedup.v1.DedupService") == SERVING
        redis_server.pause()
        wait_until(lambda: health_of(service, "") == NOT_SERVING, what="NOT_SERVING")
        redis_server.resume()
        wait_until(lambda: health_of(service, "dedup.v1.DedupService") == SERVING, what="SERVING again")
        # Health changes before the log line is written.
        wait_until(lambda: len(service.events("store_became_ready")) == 2, what="the log line")
        assert len(service.events("store_became_unavailable")) == 2
    finally:
        redis_server.stop()


def test_a_port_in_use_prevents_start_up(service: ServiceProcess, tmp_path: Path, engine: EngineName) -> None:
    """A second server on the same port exits with an error instead of sharing the port.

    Protections: grpc.so_reuseport is off, and a probe before the bind explains the error. Either one is enough.
    """
    arguments = ("--engine", engine, "--listen", service.target, "--store-url", f"sqlite://{tmp_path / 'x.db'}")
    ended = run_command("serve", *arguments)
    assert ended.returncode == 1
    sentence = f"dedup-service: cannot listen on {service.target}: Address already in use: does another server"
    assert [line for line in ended.stderr.splitlines() if not line.startswith(("{", sentence))] == []
    assert sentence in ended.stderr


def test_a_unix_socket_has_mode_0660_and_is_not_taken_from_a_running_server(
    start_service: StartService, tmp_path: Path, unique: str, engine: EngineName
) -> None:
    """A second server does not take over the socket of a running server, but replaces that of a dead one.

    Protections: the umask around the bind, and the probe before it.
    """
    path = tmp_path / "dedup.sock"
    store = ("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    first = start_service("--listen", f"unix://{path}", *store)
    assert first.target == f"unix://{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    claim(first, unique)
    ended = run_command("serve", "--engine", engine, "--listen", f"unix://{path}", *store)
    assert (ended.returncode, "another server listens there" in ended.stderr) == (1, True)
    claim(first, f"{unique}-still-there")
    first.kill()
    assert path.exists()
    claim(start_service("--listen", f"unix://{path}", *store), f"{unique}-again")


@pytest.mark.parametrize("option", ["--listen", "--health-listen"])
def test_a_server_removes_its_own_socket_alone(start_service: StartService, tmp_path: Path, option: str) -> None:
    """At its end a server removes its socket, unless another server has taken over the path.

    Protections: gRPC, which removes any file at the path it bound, binds another one; and the inode is compared.
    """
    path = tmp_path / "dedup.sock"
    arguments = (option, f"unix://{path}", "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    first = start_service(*arguments)
    path.unlink()
    second = start_service(*arguments)
    assert first.stop() == 0
    with grpc.insecure_channel(f"unix://{path}") as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
    assert second.stop() == 0
    assert list(tmp_path.glob("*sock*")) == list(tmp_path.glob(".*")) == []


def test_a_file_at_the_socket_path_is_not_removed(tmp_path: Path, engine: EngineName) -> None:
    """A server does not start if a regular file has the path of its socket."""
    path = tmp_path / "precious"
    path.write_text("data")
    arguments = ("--engine", engine, "--listen", f"unix://{path}", "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    ended = run_command("serve", *arguments)
    assert (ended.returncode, "a file that is not a socket is in its place" in ended.stderr) == (1, True)
    assert path.read_text() == "data"


def test_all_listen_addresses_serve_the_same_claims(start_service: StartService, tmp_path: Path, unique: str) -> None:
    """A server can listen on a Unix socket and several ports at once."""
    path = tmp_path / "dedup.sock"
    listen = f"127.0.0.1:0,unix://{path},[::1]:0" if socket.has_ipv6 else f"127.0.0.1:0,unix://{path}"
    service = start_service("--listen", listen, "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    outcomes = []
    for address in service.addresses:
        with grpc.insecure_channel(address) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            outcomes.append(stub.ClaimTransaction(Claim(transaction_id=unique)).outcome)
    assert outcomes == [dedup_pb2.CLAIM_OUTCOME_CLAIMED] + [dedup_pb2.CLAIM_OUTCOME_DUPLICATE] * (len(outcomes) - 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_shutdown_under_load_answers_every_call(
    start_service: StartService, redis_server: RedisProcess, unique: str, number: signal.Signals
) -> None:
    """During shutdown in-flight calls are answered, later ones receive UNAVAILABLE, and the server exits with 0."""
    service = await asyncio.to_thread(start_service, "--store-url", redis_server.url, "--shutdown-grace", "5s")
    codes: list[grpc.StatusCode] = []

    async def caller(stub: "dedup_pb2_grpc.DedupServiceAsyncStub", caller_number: int) -> None:
        for attempt in range(10_000):
            try:
                request = Claim(transaction_id=f"{unique}-{caller_number}-{attempt}")
                reply = await stub.ClaimTransaction(request, timeout=20)
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
                return
            assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
            codes.append(grpc.StatusCode.OK)

    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        callers = [asyncio.create_task(caller(stub, caller_number)) for caller_number in range(32)]

        async def busy() -> bool:
            return len(codes) > 200

        await eventually(busy, what="load")
        service.signal(number)
        await asyncio.gather(*callers)
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert await asyncio.to_thread(service.wait) == 0
    refusals = [line for line in service.events("call_finished") if line["code"] != "OK"]
    assert {(line["reason"], line["applied"]) for line in refusals} == {("SERVER_STOPPING", "no")}
    assert [event["event"] for event in service.logs if event["event"] in ("shutdown_started", "server_stopped")] == [
        *("shutdown_started", "server_stopped"),
    ]


async def test_in_flight_calls_get_the_shutdown_grace(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """A claim in flight at SIGTERM is answered before the server exits.

    Protection: the server waits for in-flight calls and rejects new ones. Health is NOT_SERVING first.
    """
    async with FaultProxy(redis_server.port) as proxy:
        service = await asyncio.to_thread(
            start_service, "--store-url", proxy.url, "--store-timeout", "20s", "--shutdown-grace", "20s"
        )
        async with grpc.aio.insecure_channel(service.target) as channel:
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await health.read()).status == SERVING
            proxy.hold_replies.clear()
            call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id=unique))
            await eventually(lambda: _sent(proxy, unique), what="the command to be sent")
            service.signal(signal.SIGTERM)
            assert (await health.read()).status == NOT_SERVING
            begun = time.monotonic()
            while time.monotonic() < begun + 2 * LAME_DUCK_S:
                with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                    await dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id=unique))
                assert not call.done()
            health.cancel()
            proxy.hold_replies.set()
            assert (await call).outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
        assert await asyncio.to_thread(service.wait) == 0


@pytest.mark.parametrize("signals", [1, 2])
async def test_calls_left_after_the_grace_are_unknown(
    start_service: StartService, redis_server: RedisProcess, unique: str, signals: int
) -> None:
    """A claim that Redis never answers ends with `applied=unknown` after the grace or a second signal; the exit is 0.

    Protection: the store closes before gRPC stops; gRPC alone would only cancel the call.
    """
    async with FaultProxy(redis_server.port) as proxy:
        grace = "300ms" if signals == 1 else "60s"
        arguments = ("--store-url", proxy.url, "--store-timeout", "50s", "--shutdown-grace", grace)
        service = await asyncio.to_thread(start_service, *arguments)
        async with grpc.aio.insecure_channel(service.target) as channel:
            proxy.hold_replies.clear()
            call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id=unique))
            await eventually(lambda: _sent(proxy, unique), what="the command to be sent")
            service.signal(signal.SIGTERM)
            if signals == 2:
                # Two pending signals of the same number are delivered as one.
                await asyncio.to_thread(wait_until, lambda: service.events("shutdown_started"), what="the drain")
                service.signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            status = rpc_status.from_call(caught.value)
            info = error_details_pb2.ErrorInfo()
            assert status is not None
            assert status.details[0].Unpack(info)
            assert info.metadata["applied"] == "unknown"
        assert await asyncio.to_thread(service.wait) == 0


async def _sent(proxy: FaultProxy, transaction_id: str) -> bool:
    return transaction_id.encode() in proxy.sent_upstream


async def test_a_retry_after_a_killed_server_is_claimed_once(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """If a server is killed before it replies, a retry with the same token on another server receives CLAIMED.

    Protection: the caller's token in the stored value.
    """
    request = Claim(transaction_id=unique, claim_token="token-of-sixteen")
    async with FaultProxy(redis_server.port) as proxy:
        doomed = await asyncio.to_thread(start_service, "--store-url", proxy.url, "--store-timeout", "20s")
        async with grpc.aio.insecure_channel(doomed.target) as channel:
            proxy.hold_replies.clear()
            call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request)
            await eventually(lambda: _sent(proxy, unique), what="the command to be sent")
            await asyncio.to_thread(doomed.kill)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        proxy.hold_replies.set()
    other = await asyncio.to_thread(start_service, "--store-url", redis_server.url)
    with other.channel() as plain:
        stub = dedup_pb2_grpc.DedupServiceStub(plain)
        retried = stub.ClaimTransaction(request)
        assert (retried.outcome, retried.replayed) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, True)
        stranger = stub.ClaimTransaction(Claim(transaction_id=unique))
        assert stranger.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE


async def test_a_cancelled_call_is_logged_and_affects_no_other_call(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """Calls that end by deadline or cancellation are logged as such, and the next call gets its own reply."""
    async with FaultProxy(redis_server.port) as proxy:
        service = await asyncio.to_thread(start_service, "--store-url", proxy.url, "--store-timeout", "20s")
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            assert (await stub.ClaimTransaction(Claim(transaction_id=f"{unique}-0"))).outcome
            proxy.hold_replies.clear()
            late = stub.ClaimTransaction(Claim(transaction_id=f"{unique}-1"), timeout=0.3)
            gone = stub.ClaimTransaction(Claim(transaction_id=f"{unique}-2"))
            await eventually(lambda: _sent(proxy, f"{unique}-2"), what="the command to be sent")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await late
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            gone.cancel()

            async def logged() -> bool:
                return {"CANCELLED", "DEADLINE_EXCEEDED"} <= {line["code"] for line in service.events("call_finished")}

            await eventually(logged, what="the log lines")
            proxy.hold_replies.set()
            reply = await stub.ClaimTransaction(Claim(transaction_id=f"{unique}-3", claimant="me"))
            assert (reply.outcome, reply.transaction.claimant) == (dedup_pb2.CLAIM_OUTCOME_CLAIMED, "me")


def last_call(service: ServiceProcess, correlation_id: str) -> dict[str, object]:
    """Wait for the log line of a call and return it."""

    def found() -> list[dict[str, object]]:
        return [line for line in service.events("call_finished") if line["correlation_id"] == correlation_id]

    wait_until(found, what="the log line")
    return found()[-1]


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"x_correlation_id": "abc-1", "x_request_id": "no", "traceparent": f"00-{TRACE_ID}-{'1' * 16}-01"}, "abc-1"),
        ({"x_request_id": "req-2", "traceparent": f"00-{TRACE_ID}-{'1' * 16}-01"}, "req-2"),
        ({"traceparent": f"00-{TRACE_ID}-{'1' * 16}-01"}, TRACE_ID),
        ({"x_correlation_id": "x" * 129, "x_request_id": "req-3"}, "req-3"),
        ({"traceparent": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_callers_correlation_id_is_logged_and_returned(
    service: ServiceProcess, unique: str, metadata: dict[str, str], expected: str | None
) -> None:
    """The caller's id, or a generated one, is in the trailing metadata and in the log line of the call."""
    call = claim(service, unique, **metadata)
    returned = str(dict(call.trailing_metadata())["x-correlation-id"])
    assert returned == (expected or returned)
    assert len(returned) == 32 or expected
    line = last_call(service, returned)
    assert {
        "method": line["method"],
        "code": line["code"],
        "outcome": line["outcome"],
        "transaction": line["transaction"],
    } == {
        "method": "ClaimTransaction",
        "code": "OK",
        "outcome": "CLAIMED",
        "transaction": hashlib.sha256(unique.encode()).hexdigest()[:16],
    }
    assert line["started"]
    assert isinstance(line["duration_ms"], float)


def test_ids_and_tokens_stay_out_of_the_log(service: ServiceProcess, unique: str) -> None:
    """No log line contains a transaction id or a token, neither for a claim nor for an error."""
    request = Claim(transaction_id=unique, claim_token=f"secret-{unique}")
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        stub.ClaimTransaction(request)
        request.ttl.FromSeconds(0)
        call = stub.ClaimTransaction.future(request, metadata=(("x-correlation-id", unique[:8]),))
        assert call.exception() is not None
    line = last_call(service, unique[:8])
    assert (line["code"], line["reason"], line["applied"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "no")
    assert not [text for text in service.stderr_lines if unique in text]


def test_a_setting_logs_plain_transaction_ids(start_service: StartService, tmp_path: Path, unique: str) -> None:
    """With DEDUP_LOG_TRANSACTION_IDS=plain the log line contains the id itself."""
    service = start_service(
        "--store-url",
        f"sqlite://{tmp_path / 'claims.db'}",
        environment={"DEDUP_LOG_TRANSACTION_IDS": "plain"},
    )
    call = claim(service, unique)
    assert last_call(service, str(dict(call.trailing_metadata())["x-correlation-id"]))["transaction"] == unique


def test_without_a_store_url_the_embedded_store_is_used(tmp_path: Path, unique: str) -> None:
    """Claims are stored in the user's state folder, and start-up logs that only this host sees them."""
    service = ServiceProcess(environment={"XDG_STATE_HOME": str(tmp_path)}).start()
    try:
        claim(service, unique)
        assert "only this host" in service.events("embedded_store_used")[0]["message"]
        assert (tmp_path / "dedup-service" / "claims.db").is_file()
    finally:
        service.stop()


def test_only_failures_and_slow_calls_are_logged_without_sampling(redis_server: RedisProcess, unique: str) -> None:
    """With a sample rate of 0 a fast success has no log line and no correlation id; failures and slow calls do."""
    environment = {"DEDUP_LOG_SAMPLE": "0", "DEDUP_LOG_SLOW": "300ms", "DEDUP_STORE_URL": redis_server.url}
    service = ServiceProcess(environment=environment).start()
    try:
        with service.channel() as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            _, quick = stub.ClaimTransaction.with_call(dedup_pb2.ClaimTransactionRequest(transaction_id=unique))
            assert not quick.trailing_metadata()
            slow = dedup_pb2.ClaimTransactionRequest(transaction_id=unique)
            slow.wait.FromMilliseconds(500)
            stub.ClaimTransaction(slow)
            with pytest.raises(grpc.RpcError):
                stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest())
    finally:
        service.stop()
    assert [(call["code"], call.get("outcome")) for call in service.events("call_finished")] == [
        ("OK", "DUPLICATE"),
        ("INVALID_ARGUMENT", None),
    ]

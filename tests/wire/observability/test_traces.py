"""Exported traces: spans of calls and store commands, sampling, and export errors."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.collector import Collector
from tests.support.errors import refused
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, free_port, run_command
from tests.support.workers import channels_to_each

StartService = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-01")
UNSAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-00")


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A running OTLP collector."""
    with Collector() as listening:
        yield listening


def test_a_call_and_its_store_command_are_spans_of_the_callers_trace(
    start_service: StartService, redis_server: RedisProcess, collector: Collector, unique: str
) -> None:
    """The SET span is a child of the server span, which is a child of the caller's; the log has trace and span id."""
    service = start_service("--store-url", redis_server.url, environment=collector.environment)
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        for _ in range(2):
            stub.ClaimTransaction(Claim(transaction_id=unique), metadata=(SAMPLED, ("tracestate", "vendor=1")))
    wait_until(lambda: len(collector.servers()) == 2, what="the spans")
    first, second = collector.servers()
    assert (first.kind, first.trace_id, first.parent_id, first.error) == ("SERVER", TRACE, PARENT, None)
    assert first.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "dedup.v1.DedupService/ClaimTransaction",
        "rpc.response.status_code": "OK",
        "dedup.namespace": "default",
        "dedup.outcome": "CLAIMED",
    }
    assert second.attributes["dedup.outcome"] == "DUPLICATE"
    assert first.resource["service.name"] == "dedup-service"
    [store] = collector.children(first)
    assert (store.name, store.kind, store.trace_id, store.error) == ("SET", "CLIENT", TRACE, None)
    assert store.attributes == {
        "db.system.name": "redis",
        "db.operation.name": "SET",
        "db.namespace": "0",
        "server.address": "127.0.0.1",
        "server.port": redis_server.port,
    }
    assert service.stop() == 0
    lines = service.events("call_finished")
    assert [(line["trace_id"], line["span_id"]) for line in lines] == [(TRACE, first.span_id), (TRACE, second.span_id)]
    assert {line["correlation_id"] for line in lines} == {TRACE}


def test_every_rpc_has_one_store_span_and_spans_contain_no_secrets(
    start_service: StartService, redis_server: RedisProcess, collector: Collector, unique: str
) -> None:
    """Each rpc has one span with one store span; no id, token, claimant, result or unknown namespace is exported."""
    service = start_service("--store-url", redis_server.url, environment=collector.environment)
    token = f"token-{unique}"
    holder: dict[str, Any] = {"transaction_id": unique, "claim_token": token, "namespace": f"n{unique}"}
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        stub.ClaimTransaction(Claim(**holder, claimant=f"claimant-{unique}"))
        extend = dedup_pb2.ExtendTransactionRequest(**holder)
        extend.ttl.FromSeconds(90)
        stub.ExtendTransaction(extend)
        stub.CompleteTransaction(dedup_pb2.CompleteTransactionRequest(**holder, result=f"paid {unique}".encode()))
        stub.ReleaseTransaction(dedup_pb2.ReleaseTransactionRequest(**holder))
        stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique, namespace=f"n{unique}"))
        batch = [Claim(transaction_id=f"{unique}-{number}") for number in range(3)]
        stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=batch))
        bad = Claim(transaction_id=f"{unique}\n", namespace=f"No {unique}")
        assert refused(lambda: stub.ClaimTransaction(bad)).code is grpc.StatusCode.INVALID_ARGUMENT
    service.stop()
    commands = {
        "ClaimTransaction": "SET",
        "ExtendTransaction": "EVALSHA",
        "CompleteTransaction": "EVALSHA",
        "ReleaseTransaction": "EVALSHA",
        "GetTransaction": "GET",
        "BatchClaimTransactions": "PIPELINE SET",
    }
    for method, command in commands.items():
        span = collector.servers(method)[0]
        assert span.parent_id == ""
        assert [child.name for child in collector.children(span)] == [command]
        assert span.attributes.get("dedup.namespace", "other") == "other"
    assert collector.children(collector.servers("BatchClaimTransactions")[0])[0].attributes[
        "db.operation.batch.size"
    ] == len(batch)
    claimed, invalid = collector.servers()
    assert (invalid.attributes["rpc.response.status_code"], invalid.error) == ("INVALID_ARGUMENT", None)
    assert invalid.attributes["dedup.reason"] == "INVALID_REQUEST"
    assert not collector.children(invalid)
    assert claimed.trace_id != invalid.trace_id
    assert unique.encode() not in collector.raw


@pytest.mark.parametrize(
    ("sampler", "metadata"),
    [("", (UNSAMPLED,)), ("parentbased_always_off", ()), ("always_off", (SAMPLED,))],
)
def test_unsampled_calls_are_not_exported(
    start_service: StartService,
    collector: Collector,
    tmp_path: Path,
    sampler: str,
    metadata: tuple[tuple[str, str], ...],
) -> None:
    """The caller's sampled flag and the OTEL sampler variables apply; the log has the trace id in any case."""
    environment = collector.environment | {"OTEL_TRACES_SAMPLER": sampler}
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}", environment=environment)
    with service.channel() as channel:
        dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id="x"), metadata=metadata)
    assert service.stop() == 0
    assert not collector.spans
    [line] = service.events("call_finished")
    assert len(line["trace_id"]) == 32
    assert not metadata or line["trace_id"] == TRACE


async def test_a_store_timeout_marks_both_spans_as_errors(
    start_service: StartService, redis_server: RedisProcess, collector: Collector, unique: str
) -> None:
    """If Redis does not reply, the store span and the call span fail with the error reason as their description."""
    async with FaultProxy(redis_server.port) as proxy:
        arguments = ("--store-url", proxy.url, "--store-timeout", "500ms")
        service = await asyncio.to_thread(start_service, *arguments, environment=collector.environment)
        proxy.hold_replies.clear()
        async with grpc.aio.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ClaimTransaction(Claim(transaction_id=unique))
            batch = dedup_pb2.BatchClaimTransactionsRequest(requests=[Claim(transaction_id=f"{unique}-b")])
            await stub.BatchClaimTransactions(batch)
        proxy.hold_replies.set()
        await asyncio.to_thread(service.stop)
    [call] = collector.servers()
    assert (call.error, call.attributes["error.type"]) == ("STORE_TIMEOUT", "UNAVAILABLE")
    assert (call.attributes["dedup.reason"], call.attributes["dedup.applied"]) == ("STORE_TIMEOUT", "unknown")
    [store] = collector.children(call)
    assert (store.error, store.attributes["error.type"]) == ("STORE_TIMEOUT", "STORE_TIMEOUT")
    [batched] = collector.servers("BatchClaimTransactions")
    assert batched.error is None
    assert [(child.name, child.error is None) for child in collector.children(batched)] == [("SET", False)]


def test_polling_for_waiting_calls_creates_no_spans(
    start_service: StartService, redis_server: RedisProcess, collector: Collector, unique: str
) -> None:
    """A wait of any length has only the two store spans of its own claims.

    Protection: the shared poller starts outside the context of the first waiting call.
    """
    service = start_service("--store-url", redis_server.url, environment=collector.environment)
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        stub.ClaimTransaction(Claim(transaction_id=unique))
        waiting = Claim(transaction_id=unique)
        waiting.wait.FromMilliseconds(700)
        stub.ClaimTransaction(waiting)
    service.stop()
    _, waited = collector.servers()
    assert len(collector.spans) == 5
    assert [child.name for child in collector.children(waited)] == ["SET", "SET"]


def test_each_worker_exports_its_spans(
    start_service: StartService, redis_server: RedisProcess, collector: Collector, unique: str
) -> None:
    """Calls to each worker are exported, including spans that are still buffered at shutdown."""
    environment = collector.environment | {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_SERVICE_NAME": "lucky-box-dedup"}
    service = start_service("--workers", "2", "--store-url", redis_server.url, environment=environment)
    for number, channel in channels_to_each(service, 2).items():
        request = Claim(transaction_id=f"{unique}-{number}")
        dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, metadata=(SAMPLED,))
    assert not collector.spans
    assert service.stop() == 0
    calls = collector.servers()
    assert [call.trace_id for call in calls] == [TRACE, TRACE]
    assert [len(collector.children(call)) for call in calls] == [1, 1]
    assert {call.resource["service.name"] for call in calls} == {"lucky-box-dedup"}


def test_a_missing_collector_does_not_affect_calls(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """Without a collector calls succeed, the failed export is logged, and the service exits with 0."""
    environment = {"DEDUP_TRACES": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    service = start_service("--store-url", redis_server.url, environment=environment)
    with service.channel() as channel:
        reply = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id=unique))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    assert service.stop() == 0
    assert any("export" in line["event"] for line in service.logs)


def test_traces_without_the_package_are_an_error() -> None:
    """The server exits with 1 and one sentence that names the extra to install."""
    program = (
        "import sys; sys.modules['opentelemetry'] = None; sys.argv[1:] = ['serve', '--traces', 'otlp'];"
        "from dedup_service.cli import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert "DEDUP_TRACES (--traces): OpenTelemetry cannot be loaded" in run.stderr
    assert "install the extra `otel`, or set DEDUP_TRACES=off" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("variables", "code", "complaint"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, 2, "OTEL_EXPORTER_OTLP_PROTOCOL is http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, 1, "OpenTelemetry rejects its settings"),
    ],
)
def test_unsupported_otel_variables_are_an_error(
    redis_server: RedisProcess, variables: dict[str, str], code: int, complaint: str
) -> None:
    """An unsupported protocol, or a value that OpenTelemetry rejects, prevents start-up with one sentence."""
    environment = {"DEDUP_TRACES": "otlp", "DEDUP_STORE_URL": redis_server.url, **variables}
    ended = run_command("serve", "--listen", "127.0.0.1:0", environment=environment)
    assert ended.returncode == code
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr

"""Observers around calls and stores: nothing where they are off, and everything passes through where they are on."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any, cast

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from dedup_service.claims import (
    Applied,
    Caller,
    CheckFailed,
    ClaimAnswer,
    ClaimOutcome,
    ClaimStore,
    Reason,
    StoreNotice,
    StoreUnavailable,
    Transaction,
)
from dedup_service.observability import observers as module
from dedup_service.observability.calls import Call, CallLog, Failure
from dedup_service.observability.logs import LoggedIds, Logger
from dedup_service.observability.metrics import Metrics
from dedup_service.observability.observers import Observers, _ObservedStore
from dedup_service.observability.traces import CallTraces, StoreTraces, Traces
from tests.support.dict_store import DictStore

SERVICE = "dedup.v1.DedupService"
METHOD = "ClaimTransaction"
OPERATIONS = sorted(
    name for name, member in vars(ClaimStore).items() if inspect.iscoroutinefunction(member) and name[0] != "_"
)
NOT_OBSERVED = {"open", "close"}
DOWN = StoreUnavailable(Reason.STORE_TIMEOUT, "late", Applied.UNKNOWN)


class RecordingStore:
    """Has every method of the port: returns a value of its own for each, or raises `failure`."""

    description = "the store of the test"

    def __init__(self) -> None:
        self.received: list[tuple[str, tuple[Any, ...]]] = []
        self.failure: BaseException | None = None
        for name in OPERATIONS:
            setattr(self, name, self._operation(name))

    def _operation(self, name: str) -> Any:
        async def run(*arguments: Any) -> Any:
            self.received.append((name, arguments))
            if self.failure is not None:
                raise self.failure
            return self.result(name)

        return run

    @staticmethod
    def result(name: str) -> Any:
        """Return what the operation returns."""
        return [StoreNotice("store_restarted", name, forgot=True, restarted=True)] if name == "check" else f"({name})"


class RecordingObserver:
    """Keeps what it is told of the operations of a store."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, Any, BaseException | None]] = []

    def operation_started(self, operation: str, _: Sequence[Any], /) -> Any:
        """Keep the end of each operation."""
        return lambda result, failure: self.ends.append((operation, result, failure))


def arguments_of(operation: str) -> tuple[object, ...]:
    """Return distinct arguments, as many as the port declares."""
    count = len(inspect.signature(getattr(ClaimStore, operation)).parameters) - 1
    return ([],) if operation == "claim_all" else tuple(object() for _ in range(count))


def observed(store: RecordingStore, *observers: Any) -> ClaimStore:
    """Return the store with observers around it."""
    return cast("ClaimStore", _ObservedStore(cast("ClaimStore", store), observers))


def call_log() -> CallLog:
    """Return a log whose lines nobody reads."""
    return CallLog(cast("Logger", structlog.get_logger()), LoggedIds(plain=False))


@pytest.fixture
def metrics() -> Metrics:
    """Metrics in a registry of their own."""
    return Metrics(SERVICE, (METHOD,), {"version": "1"})


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return the value of a series."""
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """The finished spans."""
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: InMemorySpanExporter) -> Any:
    """A tracer that samples everything."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("test")


def test_the_store_itself_is_returned_where_nothing_is_on() -> None:
    """Without metrics and traces a claim pays for no observer."""
    store = DictStore()
    observers = Observers(call_log())
    assert observers.store(store, {}, {}) is store
    assert observers.connections is None


def test_the_log_alone_observes_calls_where_nothing_else_is_on() -> None:
    """Without metrics and traces no other object stands between the endpoint and the log."""
    log = call_log()
    assert Observers(log).calls(METHOD, dict) is log


async def test_metrics_and_traces_wrap_the_store(metrics: Metrics, tracer: Any) -> None:
    """Either of them puts an observer around the store."""

    class FakeTraces:
        def store(self, attributes: Any, commands: Any) -> StoreTraces:
            return StoreTraces(tracer, attributes, commands)

    store = DictStore()
    traces = cast("Traces", FakeTraces())
    for observers in (Observers(call_log(), metrics), Observers(call_log(), None, traces)):
        wrapped = observers.store(store, {}, {})
        assert wrapped is not store
        assert await wrapped.get("default", "x") is None


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_every_operation_of_the_port_passes_through(operation: str) -> None:
    """Arguments, result and exception are the store's, for every method of ClaimStore, also one added later."""
    store, observer = RecordingStore(), RecordingObserver()
    wrapped = observed(store, observer, observer)
    arguments = arguments_of(operation)
    result = await getattr(wrapped, operation)(*arguments)
    assert result == store.result(operation)
    assert store.received == [(operation, arguments)]
    store.failure = DOWN
    with pytest.raises(StoreUnavailable) as caught:
        await getattr(wrapped, operation)(*arguments)
    assert caught.value is DOWN
    expected = [(operation, result, None)] * 2 + [(operation, None, DOWN)] * 2
    assert observer.ends == ([] if operation in NOT_OBSERVED else expected)


def test_what_is_not_observed_is_the_stores_own() -> None:
    """Properties and further methods of a store are reached through its observers."""
    assert observed(RecordingStore(), RecordingObserver()).description == "the store of the test"
    assert set(module._OPERATIONS) == set(OPERATIONS) - NOT_OBSERVED


async def test_a_cancelled_operation_is_observed() -> None:
    """An observer learns of a cancellation, too, so that no span stays open."""
    store, observer = RecordingStore(), RecordingObserver()
    store.failure = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await observed(store, observer).get("default", "x")
    assert observer.ends == [("get", None, store.failure)]


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - NOT_OBSERVED - {"check"}))
async def test_metrics_time_every_operation(metrics: Metrics, operation: str) -> None:
    """Successful and failed operations are timed, under their name."""
    store = RecordingStore()
    wrapped = observed(store, metrics.store)
    await getattr(wrapped, operation)(*arguments_of(operation))
    store.failure = DOWN
    with pytest.raises(StoreUnavailable):
        await getattr(wrapped, operation)(*arguments_of(operation))
    assert sample(metrics, "dedup_store_seconds_count", operation=operation) == 2


async def test_metrics_follow_the_checks(metrics: Metrics) -> None:
    """The gauge of readiness follows the last check, and the notices of the store are counted."""
    store = RecordingStore()
    wrapped = observed(store, metrics.store)
    await wrapped.check()
    assert sample(metrics, "dedup_store_ready") == 1
    assert sample(metrics, "dedup_store_forgotten_total") == sample(metrics, "dedup_store_restarts_total") == 1
    store.failure = CheckFailed(DOWN, [StoreNotice("store_moved", "moved", restarted=True)])
    with pytest.raises(StoreUnavailable):
        await wrapped.check()
    assert sample(metrics, "dedup_store_ready") == 0
    assert (sample(metrics, "dedup_store_forgotten_total"), sample(metrics, "dedup_store_restarts_total")) == (1, 2)


def finished_call(code: str = "OK", failure: Failure | None = None, method: str = METHOD) -> Call:
    """Return a call that has ended."""
    call = Call(method, lambda: ())
    call.failure = failure
    call.end(code)
    return call


def answer(outcome: ClaimOutcome, *, replayed: bool = False, shadow: bool = False) -> ClaimAnswer:
    """Return the answer to a claim."""
    return ClaimAnswer(outcome, Transaction("pay", "x", "t" * 22, "", 1, 2), "t" * 22, replayed, shadow)


def test_metrics_count_calls_claims_and_doubts(metrics: Metrics) -> None:
    """Codes, outcomes by namespace, replays, shadow duplicates and unknown outcomes each have a series."""
    observer = metrics.calls(METHOD, lambda: {"pay"})
    rpc = {"grpc_type": "unary", "grpc_service": SERVICE, "grpc_method": METHOD}
    call = finished_call()
    observer.started(call)
    call.claims = [
        ("pay", answer(ClaimOutcome.CLAIMED, replayed=True)),
        ("pay", answer(ClaimOutcome.CLAIMED, shadow=True)),
        ("made-up-by-a-caller", answer(ClaimOutcome.DUPLICATE)),
        ("pay", None),
    ]
    call.failed_entries = [Failure(Reason.STORE_TIMEOUT, Applied.UNKNOWN), Failure(Reason.STORE_BUSY, Applied.NO)]
    observer.finished(call)
    observer.finished(finished_call("DEADLINE_EXCEEDED", Failure(Reason.DEADLINE_PASSED, Applied.UNKNOWN)))
    observer.finished(finished_call("UNAVAILABLE", Failure(Reason.STORE_MOVED, Applied.UNKNOWN)))
    assert sample(metrics, "grpc_server_started_total", **rpc) == 1
    assert sample(metrics, "grpc_server_handled_total", **rpc, grpc_code="OK") == 1
    assert sample(metrics, "grpc_server_handled_total", **rpc, grpc_code="DeadlineExceeded") == 1
    assert sample(metrics, "grpc_server_handling_seconds_count", **rpc) == 3
    claims = {
        (namespace, outcome): sample(metrics, "dedup_claims_total", namespace=namespace, outcome=outcome)
        for namespace in ("pay", "other")
        for outcome in ("CLAIMED", "DUPLICATE", "ERROR")
    }
    assert claims == {
        ("pay", "CLAIMED"): 2,
        ("pay", "DUPLICATE"): 0,
        ("pay", "ERROR"): 1,
        ("other", "CLAIMED"): 0,
        ("other", "DUPLICATE"): 1,
        ("other", "ERROR"): 0,
    }
    assert sample(metrics, "dedup_claims_total", namespace="made-up-by-a-caller", outcome="DUPLICATE") is None
    assert sample(metrics, "dedup_claim_replays_total", namespace="pay") == 1
    assert sample(metrics, "dedup_shadow_duplicates_total", namespace="pay") == 1
    assert sample(metrics, "dedup_unknown_outcomes_total", reason="STORE_TIMEOUT") == 1
    assert sample(metrics, "dedup_unknown_outcomes_total", reason="STORE_BUSY") == 0
    assert sample(metrics, "dedup_unknown_outcomes_total", reason="DEADLINE_PASSED") == 1
    assert sample(metrics, "dedup_unknown_outcomes_total", reason="OTHER") == 1


async def test_traces_see_result_and_failure_of_the_store(spans: InMemorySpanExporter, tracer: Any) -> None:
    """Each operation is a span below that of its call; a failure sets its reason and never its text."""
    store = RecordingStore()
    wrapped = observed(store, StoreTraces(tracer, {"db.system.name": "test"}, {"get": {"db.operation.name": "GET"}}))
    # Outside a sampled call there is no span.
    await wrapped.get("default", "x")
    assert not spans.get_finished_spans()
    with tracer.start_as_current_span("call"):
        await wrapped.get("default", "x")
        await wrapped.check()
        store.failure = DOWN
        with pytest.raises(StoreUnavailable):
            await wrapped.get("default", "x")
    good, bad, call = spans.get_finished_spans()
    assert [span.name for span in (good, bad, call)] == ["GET", "GET", "call"]
    assert good.parent is not None
    assert good.parent.span_id == call.context.span_id
    assert good.status.status_code is StatusCode.UNSET
    assert good.attributes == {"db.system.name": "test", "db.operation.name": "GET"}
    assert (bad.status.status_code, bad.status.description) == (StatusCode.ERROR, "STORE_TIMEOUT")
    assert bad.attributes is not None
    assert bad.attributes["error.type"] == "STORE_TIMEOUT"
    assert "late" not in bad.to_json()


def test_traces_see_the_end_of_a_call(spans: InMemorySpanExporter, tracer: Any) -> None:
    """The span of a call continues the caller's trace and has code, outcome, reason and `applied`, and no id."""
    observer = CallTraces(tracer, f"{SERVICE}/{METHOD}", lambda: {"pay"})
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    call = Call(METHOD, lambda: [("traceparent", f"00-{trace_id}-b7ad6b7169203331-01")])
    observer.started(call)
    call.transaction_id, call.namespace = "secret-id", "pay"
    call.failure = Failure(Reason.STORE_TIMEOUT, Applied.UNKNOWN)
    call.end("UNAVAILABLE")
    observer.finished(call)
    [span] = spans.get_finished_spans()
    assert call.trace == (trace_id, f"{span.context.span_id:016x}")
    attributes = dict(span.attributes or {})
    assert {name: attributes[name] for name in ("rpc.response.status_code", "dedup.namespace")} == {
        "rpc.response.status_code": "UNAVAILABLE",
        "dedup.namespace": "pay",
    }
    assert (attributes["dedup.reason"], attributes["dedup.applied"]) == ("STORE_TIMEOUT", "unknown")
    assert span.status.status_code is StatusCode.ERROR
    assert "secret-id" not in span.to_json()


def test_the_line_of_a_call_has_the_ids_of_its_span(metrics: Metrics, tracer: Any) -> None:
    """With traces on, a log line leads to its span."""

    class FakeTraces:
        def calls(self, method: str, known: Any) -> CallTraces:
            return CallTraces(tracer, method, known)

    with structlog.testing.capture_logs() as lines:
        observer = Observers(call_log(), metrics, cast("Traces", FakeTraces())).calls(METHOD, dict)
        call = finished_call()
        observer.started(call)
        observer.finished(call)
    [line] = lines
    assert call.trace is not None
    assert (line["trace_id"], line["span_id"]) == call.trace


LEVELS = {
    "OK": "info",
    "CANCELLED": "info",
    "INVALID_ARGUMENT": "info",
    "NOT_FOUND": "info",
    "UNAVAILABLE": "warning",
    "RESOURCE_EXHAUSTED": "warning",
    "FAILED_PRECONDITION": "warning",
    "DEADLINE_EXCEEDED": "warning",
    "UNAUTHENTICATED": "warning",
    "PERMISSION_DENIED": "warning",
    "INTERNAL": "error",
    "UNKNOWN": "error",
    "DATA_LOSS": "error",
}


@pytest.mark.parametrize(("code", "level"), LEVELS.items())
def test_the_level_of_a_call_follows_its_code(code: str, level: str) -> None:
    """A fault of the service is an error, an outage or refusal a warning, and the rest info."""
    with structlog.testing.capture_logs() as lines:
        call_log().finished(finished_call(code))
    assert [(line["event"], line["log_level"], line["code"]) for line in lines] == [("call_finished", level, code)]


@pytest.mark.parametrize(
    ("code", "sample_share", "slow_s", "logged"),
    [
        ("OK", 0.0, 60.0, False),
        ("OK", 1.0, 60.0, True),
        ("OK", 0.0, 0.0, True),
        ("INVALID_ARGUMENT", 0.0, 60.0, True),
    ],
)
def test_successes_are_sampled_and_failures_and_slow_calls_always_logged(
    code: str, sample_share: float, slow_s: float, *, logged: bool
) -> None:
    """`logged` says whether the call has a line, as the correlation id of an answer relies on it."""
    log = CallLog(cast("Logger", structlog.get_logger()), LoggedIds(plain=False), sample=sample_share, slow_s=slow_s)
    call = finished_call(code)
    with structlog.testing.capture_logs() as lines:
        log.finished(call)
    assert call.logged is logged
    assert bool(lines) is logged


def test_a_line_has_the_fields_of_the_call_and_no_plain_id() -> None:
    """The line has the hashed id, the caller, the failure and, for a bug, incident and exception."""
    bug = ValueError("a bug")
    call = finished_call("INTERNAL", Failure(Reason.INTERNAL, Applied.UNKNOWN, "1234", bug))
    call.transaction_id, call.caller = "secret-id", Caller("box")
    with structlog.testing.capture_logs() as lines:
        call_log().finished(call)
    [line] = lines
    assert {name: line[name] for name in ("method", "caller", "reason", "applied", "incident", "exc_info")} == {
        "method": METHOD,
        "caller": "box",
        "reason": "INTERNAL",
        "applied": "unknown",
        "incident": "1234",
        "exc_info": bug,
    }
    assert line["transaction"] == LoggedIds(plain=False).shown("secret-id")
    assert "secret-id" not in str(line)


def test_a_bug_in_an_entry_of_a_batch_has_its_own_line() -> None:
    """A batch that succeeds as a call still logs the cause of each incident, and only of those."""
    bug = ValueError("a bug")
    call = finished_call()
    call.failed_entries = [
        Failure(Reason.STORE_TIMEOUT, Applied.UNKNOWN),
        Failure(Reason.INTERNAL, Applied.UNKNOWN, "1234", bug),
    ]
    with structlog.testing.capture_logs() as lines:
        call_log().finished(call)
    assert lines[0] == {"event": "batch_entry_failed", "log_level": "error", "incident": "1234", "exc_info": bug}
    assert [line["event"] for line in lines[1:]] == ["call_finished"]

"""The Prometheus metrics of one process. Label values come from closed sets.

Imported lazily: metrics are optional.
"""

import os
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values

from dedup_service.claims import DEFAULT_NAMESPACE, Applied, CheckFailed, ClaimAnswer, Reason, StoreNotice
from dedup_service.observability.calls import Call, Failure

# Spelled as in the Prometheus interceptors of other languages, for common dashboards.
_CODES = {
    "OK": "OK",
    "CANCELLED": "Canceled",
    "UNKNOWN": "Unknown",
    "INVALID_ARGUMENT": "InvalidArgument",
    "DEADLINE_EXCEEDED": "DeadlineExceeded",
    "NOT_FOUND": "NotFound",
    "ALREADY_EXISTS": "AlreadyExists",
    "PERMISSION_DENIED": "PermissionDenied",
    "RESOURCE_EXHAUSTED": "ResourceExhausted",
    "FAILED_PRECONDITION": "FailedPrecondition",
    "ABORTED": "Aborted",
    "OUT_OF_RANGE": "OutOfRange",
    "UNIMPLEMENTED": "Unimplemented",
    "INTERNAL": "Internal",
    "UNAVAILABLE": "Unavailable",
    "DATA_LOSS": "DataLoss",
    "UNAUTHENTICATED": "Unauthenticated",
}

OTHER = "other"
"""The label of namespaces that the policy file does not name."""

# The contract's outcomes, and a failed claim.
_OUTCOMES = ("CLAIMED", "DUPLICATE", "PAYLOAD_MISMATCH", "ERROR")

# Reasons that usually leave the outcome unknown: their series exist before the first error. Others count as OTHER.
_DOUBTS = (
    *(Reason.DEADLINE_PASSED, Reason.INTERNAL, Reason.STORE_BUSY, Reason.STORE_CLOSED, Reason.STORE_CONNECTION_LOST),
    *(Reason.STORE_ERROR, Reason.STORE_FULL, Reason.STORE_IO_ERROR, Reason.STORE_NOT_REPLICATED),
    *(Reason.STORE_PROTOCOL_ERROR, Reason.STORE_STALLED, Reason.STORE_TIMEOUT),
)

_OPERATIONS = ("claim", "claim_all", "complete", "release", "extend", "get")

# An unhindered claim takes less than a millisecond; a waiting call may take minutes.
_CALL_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_STORE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

Add = Callable[[], None]


class Metrics:
    """All metrics of this process, in their own registry."""

    def __init__(self, service: str, methods: Iterable[str], build: Mapping[str, str]) -> None:
        # The workers' metric files lack the creation time of a series.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.store = StoreMetrics(self.registry)
        rpc = ["grpc_type", "grpc_service", "grpc_method"]
        started = self._counter("grpc_server_started", "Calls received.", *rpc)
        handled = self._counter("grpc_server_handled", "Calls finished, by status code.", *rpc, "grpc_code")
        seconds = Histogram(
            "grpc_server_handling_seconds",
            "Duration of calls, including the time they wait for other work to end.",
            rpc,
            buckets=_CALL_BUCKETS_S,
            registry=self.registry,
        )
        self.series = {
            method: (
                started.labels("unary", service, method).inc,
                {code: handled.labels("unary", service, method, label).inc for code, label in _CODES.items()},
                seconds.labels("unary", service, method).observe,
            )
            for method in methods
        }
        doubts = self._counter("dedup_unknown_outcomes", "Errors with `applied: unknown`, by reason.", "reason")
        self._doubts = {reason: doubts.labels(reason).inc for reason in (*_DOUBTS, "OTHER")}
        self._claims = self._counter("dedup_claims", "Claims, by outcome.", "namespace", "outcome")
        self._replays = self._counter(
            "dedup_claim_replays", "Retries that received CLAIMED again with their own token.", "namespace"
        )
        self._shadow_duplicates = self._counter(
            "dedup_shadow_duplicates", "Duplicates that shadow mode let through.", "namespace"
        )
        self.in_flight = Gauge(
            "dedup_calls_in_flight",
            "Calls in flight, without waiting claims.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.waiting = Gauge(
            "dedup_calls_waiting",
            "Claims that wait for work in progress.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        build_info = Gauge("dedup_build_info", "1.", list(build), multiprocess_mode="livemax", registry=self.registry)
        build_info.labels(*build.values()).set(1)
        self._namespaces: dict[str, _ClaimCounters] = {name: self._bind(name) for name in (DEFAULT_NAMESPACE, OTHER)}

    def calls(self, method: str, known: Callable[[], Container[str]]) -> "CallMetrics":
        """Return the observer of one rpc; `known` returns the policy file's current namespaces."""
        return CallMetrics(self, method, known)

    def bind(self, namespaces: Iterable[str]) -> None:
        """Create the series of these namespaces before their first claim."""
        for namespace in namespaces:
            self._namespaces.setdefault(namespace, self._bind(namespace))

    def _bind(self, namespace: str) -> "_ClaimCounters":
        return _ClaimCounters(
            {outcome: self._claims.labels(namespace, outcome).inc for outcome in _OUTCOMES},
            self._replays.labels(namespace).inc,
            self._shadow_duplicates.labels(namespace).inc,
        )

    def count_claim(self, namespace: str, answer: ClaimAnswer | None, known: Container[str]) -> None:
        """Count a claim by its outcome, ERROR without an answer."""
        counters = self._namespaces.get(namespace)
        if counters is None:
            # A reloaded policy file may name new namespaces.
            if namespace in known:
                self.bind((namespace,))
            counters = self._namespaces[namespace if namespace in known else OTHER]
        if answer is None:
            counters.outcomes["ERROR"]()
            return
        counters.outcomes[answer.outcome.value]()
        if answer.replayed:
            counters.replayed()
        if answer.shadow_duplicate:
            counters.shadow_duplicate()

    def count_doubt(self, failure: Failure) -> None:
        """Count a failure that may have changed the store."""
        if failure.applied is Applied.UNKNOWN:
            self._doubts.get(failure.reason, self._doubts["OTHER"])()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


class _ClaimCounters:
    """The counters of one namespace; CLAIMED includes replayed and shadow claims."""

    __slots__ = ("outcomes", "replayed", "shadow_duplicate")

    def __init__(self, outcomes: Mapping[str, Add], replayed: Add, shadow_duplicate: Add) -> None:
        self.outcomes = outcomes
        self.replayed = replayed
        self.shadow_duplicate = shadow_duplicate


class CallMetrics:
    """Counts calls of one rpc, their claims, and errors with an unknown outcome."""

    def __init__(self, metrics: Metrics, method: str, known: Callable[[], Container[str]]) -> None:
        self._metrics = metrics
        self._started, self._handled, self._seconds = metrics.series[method]
        self._known = known

    def started(self, _: Call) -> None:
        """Count an arrived call."""
        self._started()

    def finished(self, call: Call) -> None:
        """Count an ended call."""
        self._handled[call.code]()
        self._seconds(call.duration_s)
        if call.claims:
            known = self._known()
            for namespace, answer in call.claims:
                self._metrics.count_claim(namespace, answer, known)
        if call.failure is not None:
            self._metrics.count_doubt(call.failure)
        for failure in call.failed_entries:
            self._metrics.count_doubt(failure)


class StoreMetrics:
    """Times the store's operations, and counts its checks and connections."""

    def __init__(self, registry: CollectorRegistry) -> None:
        seconds = Histogram(
            "dedup_store_seconds",
            "Duration of store operations, failed ones included.",
            ["operation"],
            buckets=_STORE_BUCKETS_S,
            registry=registry,
        )
        self._seconds = {name: seconds.labels(name).observe for name in _OPERATIONS}
        self._ready = Gauge(
            "dedup_store_ready",
            "1 while the store takes claims, else 0; 0 if it refuses those of any worker.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self._connections = Gauge(
            "dedup_store_connections", "Open connections to the store.", multiprocess_mode="livesum", registry=registry
        )
        self._reconnects = Counter("dedup_store_reconnects", "Connections that replaced a lost one.", registry=registry)
        self._losses = Counter("dedup_store_forgotten", "Times the store had forgotten claims.", registry=registry)
        self._restarts = Counter(
            "dedup_store_restarts", "Times another server process answered than before.", registry=registry
        )

    def connected(self, *, again: bool) -> None:
        """Count a connection; `again` is true for a reconnect."""
        self._connections.inc()
        if again:
            self._reconnects.inc()

    def disconnected(self) -> None:
        """Count the end of a connection."""
        self._connections.dec()

    def operation_started(self, operation: str, _: Sequence[Any]) -> Callable[[Any, BaseException | None], None]:
        """Return a function that records the end of an operation."""
        if operation == "check":
            return self._checked
        return partial(_observe_duration, self._seconds[operation], time.perf_counter())

    def _checked(self, notices: Sequence[StoreNotice] | None, failure: BaseException | None) -> None:
        self._ready.set(failure is None)
        for notice in failure.notices if isinstance(failure, CheckFailed) else notices or ():
            self._losses.inc(notice.forgot)
            self._restarts.inc(notice.restarted)


def _observe_duration(observe: Callable[[float], None], begun: float, _: object, __: BaseException | None) -> None:
    observe(time.perf_counter() - begun)


def share_metrics(folder: str, worker: int) -> None:
    """Keep this process's metrics in files of `folder`, to be added up with other workers'.

    Must be called before the first metric is created. No two live processes may share a number; the counts of a dead
    one continue.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    values.ValueClass = values.MultiProcessValue(partial(int, worker))  # type: ignore[no-untyped-call]

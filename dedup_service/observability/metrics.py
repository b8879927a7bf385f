"""The figures of one process for Prometheus. Every label value is one of a set that is known when it is bound."""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values

# As the Prometheus interceptors of other languages spell the codes, so that common dashboards and alerts fit.
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
"""The namespace of every claim whose own is not known to the policy file."""

# The outcomes of the contract, and a claim that had none.
_OUTCOMES = ("CLAIMED", "DUPLICATE", "PAYLOAD_MISMATCH", "ERROR")

# Why a call may or may not have changed the store; a reason that is not among them is counted as OTHER.
_DOUBTS = (
    "DEADLINE_PASSED",
    "INTERNAL",
    "STORE_BUSY",
    "STORE_CLOSED",
    "STORE_CONNECTION_LOST",
    "STORE_ERROR",
    "STORE_FULL",
    "STORE_IO_ERROR",
    "STORE_NOT_REPLICATED",
    "STORE_PROTOCOL_ERROR",
    "STORE_STALLED",
    "STORE_TIMEOUT",
)

_OPERATIONS = ("claim", "claim_all", "complete", "release", "extend", "get")

# A claim takes less than a millisecond where nothing waits, and a call may wait for minutes.
_CALL_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_STORE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

Add = Callable[[], None]
Observe = Callable[[float], None]


class CallMetrics:
    """The figures of one rpc."""

    def __init__(
        self, started: Add, handled: Mapping[str, Add], seconds: Observe, doubted: Callable[[str], None]
    ) -> None:
        self.started = started
        """Count a call that came in."""
        self._handled = handled
        self._seconds = seconds
        self.doubted = doubted
        """Count an error, by its reason, that leaves open whether the store was changed."""

    def handled(self, code: str, seconds: float) -> None:
        """Count a call that ended with this code, as gRPC for Python names it, after so many seconds."""
        self._handled[code]()
        self._seconds(seconds)


class ClaimMetrics:
    """The figures of the claims of one namespace, those of batches included."""

    def __init__(self, outcomes: Mapping[str, Add], replayed: Add, shadow_duplicate: Add) -> None:
        self.outcomes = outcomes
        """Counts a claim by its outcome, one of the contract or ERROR."""
        self.replayed = replayed
        """Count one that was told CLAIMED again, which is among the CLAIMED as well."""
        self.shadow_duplicate = shadow_duplicate
        """Count one that was told CLAIMED by shadow mode alone, which is among the CLAIMED as well."""


class StoreMetrics:
    """The figures of the store, as this process meets it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        seconds = Histogram(
            "dedup_store_seconds",
            "How long the store took for an operation, failed ones included.",
            ["operation"],
            buckets=_STORE_BUCKETS_S,
            registry=registry,
        )
        self.seconds: dict[str, Observe] = {name: seconds.labels(name).observe for name in _OPERATIONS}
        self._ready = Gauge(
            "dedup_store_ready",
            "1 while the store answers the checks, 0 while it does not; 0 if that is so for any worker.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self._connections = Gauge(
            "dedup_store_connections",
            "Connections to the store that are open.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._reconnects = Counter(
            "dedup_store_reconnects", "Connections that were made in the place of a lost one.", registry=registry
        )
        self._losses = Counter(
            "dedup_store_forgotten", "How often the store was found to have forgotten claims.", registry=registry
        )
        self._restarts = Counter(
            "dedup_store_restarts", "How often another server process answered than before.", registry=registry
        )

    def connected(self, *, again: bool) -> None:
        """Count an open connection, made `again` where one was lost."""
        self._connections.inc()
        if again:
            self._reconnects.inc()

    def disconnected(self) -> None:
        """Count a connection that ended."""
        self._connections.dec()

    def ready(self, *, ready: bool) -> None:
        """Tell whether the store answered the last check."""
        self._ready.set(ready)

    def noticed(self, *, forgot: bool, restarted: bool) -> None:
        """Count what was noticed of the store's memory."""
        self._losses.inc(forgot)
        self._restarts.inc(restarted)


class Metrics:
    """Every figure of this process, in a registry of its own."""

    def __init__(self, service: str, methods: Iterable[str], build: Mapping[str, str]) -> None:
        # When a series began is no figure of ours, and the files of several workers do not have it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.store = StoreMetrics(self.registry)
        rpc = ["grpc_type", "grpc_service", "grpc_method"]
        started = self._counter("grpc_server_started", "Calls that came in.", *rpc)
        handled = self._counter("grpc_server_handled", "Calls that ended, by their code.", *rpc, "grpc_code")
        seconds = Histogram(
            "grpc_server_handling_seconds",
            "How long calls took, waits included.",
            rpc,
            buckets=_CALL_BUCKETS_S,
            registry=self.registry,
        )
        doubts = self._counter("dedup_unknown_outcomes", "Errors with `applied: unknown`, by their reason.", "reason")
        self._doubts = {reason: doubts.labels(reason).inc for reason in (*_DOUBTS, "OTHER")}
        self._calls = {
            method: CallMetrics(
                started.labels("unary", service, method).inc,
                {code: handled.labels("unary", service, method, label).inc for code, label in _CODES.items()},
                seconds.labels("unary", service, method).observe,
                self.doubted,
            )
            for method in methods
        }
        self._claims = self._counter("dedup_claims", "Claims, by their outcome.", "namespace", "outcome")
        self._replays = self._counter(
            "dedup_claim_replays", "Repeated claims that were CLAIMED again, as a retry should be.", "namespace"
        )
        self._shadow_duplicates = self._counter(
            "dedup_shadow_duplicates", "Duplicates that shadow mode let through.", "namespace"
        )
        self.in_flight = Gauge(
            "dedup_calls_in_flight", "Calls under way.", multiprocess_mode="livesum", registry=self.registry
        )
        build_info = Gauge("dedup_build_info", "1.", list(build), multiprocess_mode="livemax", registry=self.registry)
        build_info.labels(*build.values()).set(1)

    def call(self, method: str) -> CallMetrics:
        """Return the figures of one rpc of the service."""
        return self._calls[method]

    def doubted(self, reason: str) -> None:
        """Count an error, of a call or an entry of a batch, that leaves open whether the store was changed."""
        self._doubts.get(reason, self._doubts["OTHER"])()

    def claims(self, namespace: str) -> ClaimMetrics:
        """Bind the figures of one namespace, which must be OTHER or one that the operator has named."""
        return ClaimMetrics(
            {outcome: self._claims.labels(namespace, outcome).inc for outcome in _OUTCOMES},
            self._replays.labels(namespace).inc,
            self._shadow_duplicates.labels(namespace).inc,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


def share_figures(folder: str, number: int) -> None:
    """Keep the figures of this process in files of `folder`, to be added up with those of other workers.

    Must be called before any figure is made. No two living processes may have one number; a dead one's may be taken,
    and its counts go on.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    values.ValueClass = values.MultiProcessValue(partial(int, number))  # type: ignore[no-untyped-call]

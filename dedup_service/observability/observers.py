"""The one place where logs, metrics and traces wrap calls and stores. Free where they are off."""

import asyncio
import platform
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from dedup_service import __version__
from dedup_service.claims import ClaimStore, ConnectionObserver
from dedup_service.config.errors import FatalError
from dedup_service.config.files import read_log_id_key
from dedup_service.config.settings import Settings
from dedup_service.observability.calls import Call, CallLog, CallObserver
from dedup_service.observability.logs import LoggedIds, Logger

if TYPE_CHECKING:
    from dedup_service.observability.metrics import Metrics
    from dedup_service.observability.traces import Traces

_OPERATIONS = ("check", "claim", "claim_all", "complete", "release", "extend", "get")
_SAMPLE_INTERVAL_S = 0.25


class WorkerMetricFiles(NamedTuple):
    """The metric files of a worker, by its number, in the supervisor's folder."""

    number: int
    folder: str | None


class StoreObserver(Protocol):
    """Observes the operations of a store."""

    def operation_started(
        self, operation: str, arguments: Sequence[Any], /
    ) -> Callable[[Any, BaseException | None], None] | None:
        """Called before an operation. Returns None, or what to call with its result or exception."""


class Observers:
    """The observers of this process."""

    def __init__(self, call_log: CallLog, metrics: "Metrics | None" = None, traces: "Traces | None" = None) -> None:
        self._call_log = call_log
        self._metrics = metrics
        self._traces = traces

    @property
    def connections(self) -> ConnectionObserver | None:
        """The observer of the store's connections."""
        return self._metrics.store if self._metrics else None

    def calls(self, method: str, known: Callable[[], Container[str]]) -> CallObserver:
        """Return the observer of one rpc; `known` returns the policy file's current namespaces."""
        observers: list[CallObserver] = []
        if self._traces is not None:
            observers.append(self._traces.calls(method, known))
        observers.append(self._call_log)
        if self._metrics is not None:
            observers.append(self._metrics.calls(method, known))
        return observers[0] if len(observers) == 1 else _Several(observers)

    def store(
        self, store: ClaimStore, attributes: Mapping[str, str | int], commands: Mapping[str, Mapping[str, str | int]]
    ) -> ClaimStore:
        """Return the store with observers around its operations, itself if none is on.

        `attributes` and `commands` describe the store in traces.
        """
        observers: list[StoreObserver] = []
        if self._traces is not None:
            observers.append(self._traces.store(attributes, commands))
        if self._metrics is not None:
            observers.append(self._metrics.store)
        return cast("ClaimStore", _ObservedStore(store, observers)) if observers else store

    def bind_namespaces(self, namespaces: Sequence[str]) -> None:
        """Create the metrics of these namespaces before their first claim."""
        if self._metrics is not None:
            self._metrics.bind(namespaces)

    async def sample(self, in_flight: Callable[[], int]) -> None:
        """Report the calls in flight forever; cheaper than at each call, and scrapes see no more."""
        if self._metrics is None:
            return
        while True:
            self._metrics.in_flight.set(in_flight())
            await asyncio.sleep(_SAMPLE_INTERVAL_S)


@contextmanager
def observing(
    settings: Settings,
    log: Logger,
    service: str,
    methods: Sequence[str],
    worker: WorkerMetricFiles | None = None,
) -> Iterator[Observers]:
    """Yield the observers of this process; finally export the last spans and close the metrics endpoint.

    A worker keeps its metrics in files that the supervisor serves. Raises FatalError for an unbindable address, missing
    or misconfigured OpenTelemetry, and the log's key file.
    """
    ids = LoggedIds(plain=settings.log_transaction_ids == "plain", key=read_log_id_key(settings.log_id_key_file))
    call_log = CallLog(log, ids, sample=settings.log_sample, slow_s=settings.log_slow / 1000)
    with ExitStack() as undo:
        metrics = None
        if settings.metrics_listen is not None:
            from dedup_service.observability.metrics import Metrics, share_metrics  # noqa: PLC0415 - optional

            if worker is not None and worker.folder is not None:
                share_metrics(worker.folder, worker.number)
            build = {"version": __version__, "python_version": platform.python_version(), "engine": settings.engine}
            metrics = Metrics(service, methods, build)
            if worker is None:
                undo.enter_context(_metrics_endpoint(settings.metrics_listen, metrics, log))
        traces = None
        if settings.traces != "off":
            traces = undo.enter_context(closing(_traces(service)))
        yield Observers(call_log, metrics, traces)


@contextmanager
def _metrics_endpoint(address: str, metrics: "Metrics", log: Logger) -> Iterator[None]:
    from dedup_service.observability.metrics_endpoint import MetricsEndpoint  # noqa: PLC0415 - optional

    with closing(MetricsEndpoint(address, metrics.registry)) as endpoint:
        log.info("metrics_listener_started", address=endpoint.address)
        yield


def _traces(service: str) -> "Traces":
    try:
        from dedup_service.observability.traces import Traces  # noqa: PLC0415 - optional
    except ImportError as error:
        raise FatalError(
            f"DEDUP_TRACES (--traces): OpenTelemetry cannot be loaded ({error}): install the extra `otel`, or set "
            "DEDUP_TRACES=off"
        ) from None
    try:
        return Traces(service, __version__)
    except (OSError, ValueError) as error:
        raise FatalError(
            f"DEDUP_TRACES (--traces): OpenTelemetry rejects its settings ({error}): check the OTEL_* variables, or "
            "set DEDUP_TRACES=off"
        ) from None


class _Several:
    """Observers of one rpc, notified in order."""

    def __init__(self, observers: Sequence[CallObserver]) -> None:
        self._started = [observer.started for observer in observers]
        self._finished = [observer.finished for observer in observers]

    def started(self, call: Call) -> None:
        for notify in self._started:
            notify(call)

    def finished(self, call: Call) -> None:
        for notify in self._finished:
            notify(call)


class _ObservedStore:
    """A store whose operations are observed; the rest is passed through."""

    def __init__(self, store: ClaimStore, observers: Sequence[StoreObserver]) -> None:
        self._store = store
        for operation in _OPERATIONS:
            setattr(self, operation, _observed(operation, getattr(store, operation), observers))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the store has
        return getattr(self._store, name)


def _observed(
    operation: str, carry_out: Callable[..., Awaitable[Any]], observers: Sequence[StoreObserver]
) -> Callable[..., Awaitable[Any]]:
    starts = [observer.operation_started for observer in observers]

    async def run(*arguments: Any) -> Any:  # noqa: ANN401 - those of the operation
        ends = [end for start in starts if (end := start(operation, arguments)) is not None]
        result, failure = None, None
        try:
            result = await carry_out(*arguments)
        except BaseException as error:
            failure = error
            raise
        finally:
            for end in ends:
                end(result, failure)
        return result

    return run

"""One server process: start, serve until a signal, drain, stop."""

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dedup_service import __version__
from dedup_service.api import health
from dedup_service.api.endpoint import Admission
from dedup_service.api.servicer import METHODS, SERVICE_NAME, DedupServicer, add_to_server
from dedup_service.claims import ClaimService, ClaimStore, StoreRefused
from dedup_service.config.errors import BackgroundTaskFailed, BadSettings, FatalError
from dedup_service.config.settings import Settings
from dedup_service.observability.calls import CallObserver
from dedup_service.observability.logs import Logger, logger
from dedup_service.observability.observers import Observers, WorkerMetricFiles, observing
from dedup_service.server.descriptors import allow_descriptors
from dedup_service.server.engines import Engine, EngineOptions, make_engine
from dedup_service.server.health import Health, examine, listen_for_probes
from dedup_service.server.listeners import remove_sockets, warn_of_exposure
from dedup_service.server.policies import (
    load_policies,
    log_policies,
    make_authorization,
    reload_when_requested,
)
from dedup_service.server.tls import tls_credentials
from dedup_service.signals import handle_signals
from dedup_service.stores.registry import StoreConfig, make_store, store_config, trace_attributes

# Streams of one connection beyond the limits of in-flight calls and of waits, for holders and health checks. A caller
# with too many calls still receives a reason, and a hostile one cannot pile up more.
_SPARE_STREAMS = 100

# New objects between two garbage collections; Python's default is 700.
_COLLECTION_THRESHOLD = 10_000

# New calls are rejected with a reason at least this long before the listeners close.
LAME_DUCK_S = 0.25
# ... and until no call has arrived for a while, since gRPC cancels the calls it holds while it stops. Callers that keep
# calling, and calls that do not end, hold up the shutdown for at most the second figure.
_QUIET_S = 0.25
_QUIET_TIMEOUT_S = 2.0
# A pause that ends later than this shows that the process is short of CPU time, and gRPC may hold calls nobody saw.
_LATE_S = 0.1

# Timeout of gRPC's own stop.
_STOP_SLACK_S = 0.5

Announce = Callable[[Sequence[str]], None]


class _Signals:
    """The signals of a server: `stop` has each SIGTERM and SIGINT, and SIGHUP sets `reload`.

    The first one to stop cancels the current task, unless `started` was called before.
    """

    def __init__(self) -> None:
        self.stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self.reload = asyncio.Event()
        self._starting = asyncio.current_task()
        handle_signals(
            {
                signal.SIGTERM: lambda: self._end(signal.SIGTERM),
                signal.SIGINT: lambda: self._end(signal.SIGINT),
                signal.SIGHUP: self.reload.set,
            }
        )

    def started(self) -> None:
        self._starting = None

    def _end(self, number: signal.Signals) -> None:
        self.stop.put_nowait(number)
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None


async def serve(settings: Settings, announce: Announce, worker: WorkerMetricFiles | None = None) -> bool:
    """Serve until SIGTERM or SIGINT, then drain, and return whether that ended every call and connection.

    `worker` is set for one of several workers.

    `announce` is called once with the bound addresses, when calls are accepted. SIGHUP reloads policies and tokens. At
    the shutdown health reports NOT_SERVING, new calls are rejected, waiting calls are answered, and in-flight calls get
    the grace period; a second signal ends it. Raises FatalError if the server cannot start or a background task fails.
    """
    signals = _Signals()
    try:
        return await _serve(settings, announce, worker, signals)
    except asyncio.CancelledError:
        if signals.stop.empty():
            raise
        logger().info("server_stopped", message="a signal ended the start")
        return True


async def _serve(settings: Settings, announce: Announce, worker: WorkerMetricFiles | None, signals: _Signals) -> bool:
    log = logger()
    async with AsyncExitStack() as undo:
        allow_descriptors(settings, log)
        # Also after a start that failed.
        undo.callback(remove_sockets)
        observers = undo.enter_context(observing(settings, log, SERVICE_NAME, METHODS, worker=worker))
        policies = load_policies(settings)
        observers.bind_namespaces(list(policies.namespaces))
        credentials = tls_credentials(settings, log)

        location = store_config(settings)
        store = _make_store(location, observers)
        undo.push_async_callback(store.close)
        await _open(store)
        state = Health(store, settings.store_timeout, log, follows_store=settings.readiness == "store")
        await state.check()
        examined = state.store_answered.is_set()
        if examined:
            await examine(location, log, strict=settings.strict)

        claims = ClaimService(store, policies, max_result_bytes=settings.max_result_bytes, max_waits=settings.max_waits)
        admission = Admission(settings.max_in_flight, lambda: claims.waiting)
        authorization = make_authorization(settings, claims)

        def register(server: grpc.aio.Server) -> None:
            def observe(method: str) -> CallObserver:
                return observers.calls(method, lambda: claims.policies.namespaces)

            add_to_server(server, DedupServicer(claims), observe, admission, authorization)
            health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)
            if settings.reflects:
                names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
                reflection.enable_server_reflection(names, server)

        options = EngineOptions(
            max_streams=settings.max_in_flight + settings.max_waits + _SPARE_STREAMS,
            reuse_port=worker is not None,
            max_connections=settings.max_connections,
            credentials=credentials,
        )
        engine = make_engine(settings.engine, register, options)
        addresses = [engine.listen(address) for address in settings.listen]
        if settings.health_listen:
            probes = await listen_for_probes(settings.health_listen, state.servicer, log, reuse_port=worker is not None)
            undo.push_async_callback(probes.stop, None)
        await engine.start()
        drain = _Drain(state, admission, claims, store)
        undo.push_async_callback(drain.stop, engine)
        undo.callback(remove_sockets)
        signals.started()
        undo.push_async_callback(drain.run, settings.shutdown_grace, signals.stop, log)

        _tune_garbage_collection()
        log_policies(settings, claims, log)
        _log_started(settings, addresses, store, log, worker)
        announce(addresses)
        background = {
            "health": state.watch(),
            "reload": reload_when_requested(signals.reload, settings, claims, authorization, log),
            "metrics": observers.sample(lambda: (admission.in_flight, claims.waiting)),
        }
        if not examined:
            background["examination"] = _examine_later(state, location, log, strict=settings.strict)
        await _run_until(signals.stop, background, log)
    log.info("server_stopped", shadow_duplicates=dict(claims.shadow_duplicates))
    return drain.complete


async def _run_until(
    stop: asyncio.Queue[signal.Signals], background: dict[str, Coroutine[Any, Any, None]], log: Logger
) -> None:
    """Run the background tasks until a signal. A task that fails ends the server: raises FatalError."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work, name=name) for name, work in background.items()]
            for task in tasks:
                task.add_done_callback(lambda task: _log_failure(task, log))
            await stop.get()
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as group_of_errors:
        error = _first(group_of_errors)
        if isinstance(error, FatalError):
            raise error from None
        raise BackgroundTaskFailed(
            f"a background task failed ({type(error).__name__}): the log has the cause under background_task_failed"
        ) from error


def _log_failure(task: asyncio.Task[None], log: Logger) -> None:
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, FatalError):
        log.error("background_task_failed", task=task.get_name(), exc_info=error)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _examine_later(state: Health, location: StoreConfig, log: Logger, *, strict: bool) -> None:
    await state.store_answered.wait()
    await examine(location, log, strict=strict)


def _make_store(location: StoreConfig, observers: Observers) -> ClaimStore:
    try:
        store = make_store(location, observers.connections)
        return observers.store(store, *trace_attributes(location))
    except ValueError as error:
        raise BadSettings(f"DEDUP_STORE_URL (--store-url): {error}") from None


async def _open(store: ClaimStore) -> None:
    try:
        await store.open()
    except StoreRefused as refusal:
        raise FatalError(str(refusal)) from None


def _tune_garbage_collection() -> None:
    # Modules and servers live until the end, and a full collection through them stops every call for 30 ms. With more
    # objects between two collections, too, they cost a claim 0.7 µs instead of 5.
    gc.freeze()
    gc.set_threshold(_COLLECTION_THRESHOLD)


def _log_started(
    settings: Settings, addresses: Sequence[str], store: ClaimStore, log: Logger, worker: WorkerMetricFiles | None
) -> None:
    warn_of_exposure(settings, addresses, log)
    if settings.store_url is None:
        log.warning("embedded_store_used", message="no store URL is set: only this host sees these claims")
    # The last line of the start: readers that wait for it have the warnings.
    event = "server_started" if worker is None else "worker_ready"
    log.info(event, addresses=addresses, store=store.description, engine=settings.engine, version=__version__)


@dataclass
class _Drain:
    """The shutdown: reject new calls, and give those in flight the grace period; a second signal ends it."""

    state: Health
    admission: Admission
    claims: ClaimService
    store: ClaimStore
    complete: bool = True
    """Whether every call has ended, and the process had the CPU time to receive them all."""

    async def run(self, grace_ms: int, stop: asyncio.Queue[signal.Signals], log: Logger) -> None:
        log.info("shutdown_started", grace_ms=grace_ms)
        await self.state.stop_serving()
        # gRPC would cancel calls it has received and not handed over, which tells their callers nothing. So calls are
        # rejected with a reason first, until callers have had time to go elsewhere.
        self.admission.close()
        # Waiting calls would otherwise use up the grace period and then be cancelled.
        await self.claims.close()
        grace = asyncio.create_task(self._until_idle(grace_ms / 1000))
        second_signal = asyncio.create_task(stop.get())
        await asyncio.wait((grace, second_signal), return_when=asyncio.FIRST_COMPLETED)
        for task in (grace, second_signal):
            task.cancel()
        # Calls the store still owes an answer end with doubt, where gRPC would only cancel them.
        await self.store.close()
        await self._until_quiet()

    async def stop(self, engine: Engine) -> None:
        """Stop the engine, unless that might cancel calls."""
        if not self.complete and engine.cancels_unseen_calls:
            return
        try:
            async with asyncio.timeout(2 * _STOP_SLACK_S):
                await engine.stop(_STOP_SLACK_S)
            self.complete = True
        except TimeoutError:
            self.complete = False

    async def _until_idle(self, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._pause(LAME_DUCK_S)
                await self.admission.idle()

    async def _until_quiet(self) -> None:
        try:
            async with asyncio.timeout(_QUIET_TIMEOUT_S):
                rejected = -1
                # No event says that calls stay away.
                while rejected != self.admission.rejected:
                    await self.admission.idle()
                    rejected = self.admission.rejected
                    await self._pause(_QUIET_S)
        except TimeoutError:
            self.complete = False

    async def _pause(self, seconds: float) -> None:
        begun = time.monotonic()
        await asyncio.sleep(seconds)
        if time.monotonic() - begun > seconds + _LATE_S:
            self.complete = False

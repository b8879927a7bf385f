"""One server process: start, serve until a signal, drain, end."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dedup_service import __version__
from dedup_service.claims import ClaimService, ClaimStore, Policies, StoreRefused
from dedup_service.server.engines import Engine, make_engine
from dedup_service.server.exposure import warn_of_exposure
from dedup_service.server.health_listener import listen_for_probes
from dedup_service.server.listeners import StartRefused
from dedup_service.server.log_ids import logged_ids
from dedup_service.server.measuring import CountedClaims, MeasuredStore, follow_calls, measuring
from dedup_service.config.policy_file import load_policies
from dedup_service.server.policy_reload import PolicyReload
from dedup_service.server.readiness import Readiness
from dedup_service.server.startup_checks import StartupChecks, store_place
from dedup_service.server.tls import tls_credentials
from dedup_service.config.token_file import load_tokens
from dedup_service.server.tracing import TracedStore, call_traces, store_traces, tracing
from dedup_service.api.admission import Admission
from dedup_service.api.authorization import CallerGate
from dedup_service.api.servicer import SERVICE_NAME, DedupServicer, add_to_server
from dedup_service.config.settings import BadSettings, Settings
from dedup_service.stores.registry import make_store
from dedup_service.observability.call_log import CallLog
from dedup_service.observability.logs import logger
from dedup_service.supervisor.messages import WorkerOrders

if TYPE_CHECKING:
    # Who does not ask for metrics or traces does not load their library.
    from dedup_service.observability.metrics import Metrics
    from dedup_service.observability.traces import Traces

# What one connection may have under way beyond what the server admits at all, such as health checks. So a caller with
# too many is still told so, and a hostile one cannot pile up more.
_SPARE_STREAMS = 100

# How many new objects make Python look for garbage; its own default is 700.
_COLLECTION_THRESHOLD = 10_000

# How long calls are refused with a reason before the server stops to listen.
_LAME_DUCK_S = 0.25

# What gRPC's own stop may take at most.
_STOP_SLACK_S = 0.5


async def serve(
    settings: Settings, announce: Callable[[Sequence[str]], None], worker: WorkerOrders | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return; `worker` says that this is one of several on one port.

    `announce` is called once with the addresses, when calls are accepted. At the shutdown health says NOT_SERVING
    first, then new calls are refused, those that wait for the end of others' work are answered, and calls under way
    get the grace of the settings to end; a second signal ends the grace. At SIGHUP the policy file and the tokens are
    read anew. Raises StartRefused with one sentence when the server cannot start, and BadSettings for the store URL and
    for a file that is named in the settings.
    """
    with measuring(settings, worker) as metrics, tracing(settings) as traces:
        await _serve(settings, announce, worker, metrics, traces)


async def _serve(
    settings: Settings,
    announce: Callable[[Sequence[str]], None],
    worker: WorkerOrders | None,
    metrics: "Metrics | None",
    traces: "Traces | None",
) -> None:
    log = logger()
    policy_reload = PolicyReload(settings, log)
    policies = load_policies(settings)
    credentials = tls_credentials(settings, log)
    call_log = CallLog(log, logged_ids(settings), sample=settings.log_sample, slow_s=settings.log_slow / 1000)
    store = await _open_store(settings, metrics, traces)
    try:
        readiness = Readiness(
            store,
            (health.OVERALL_HEALTH, SERVICE_NAME),
            settings.store_timeout,
            log,
            follows_store=settings.readiness == "store",
        )
        await readiness.check()
        startup_checks = StartupChecks(settings, readiness, log)
        await startup_checks.run()
        claims = _make_claims(settings, store, policies, metrics)
        admission = Admission(settings.max_in_flight)
        gate = policy_reload.gate = _make_gate(settings, claims)

        def register(server: grpc.aio.Server) -> None:
            service = DedupServicer(claims, metrics)
            add_to_server(server, service, call_log, admission, metrics, gate=gate, traces=call_traces(traces, claims))
            health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, server)
            if settings.reflects:
                services = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
                reflection.enable_server_reflection(services, server)

        engine = make_engine(
            settings.engine,
            register,
            max_streams=settings.max_in_flight + _SPARE_STREAMS,
            reuse_port=worker is not None,
            max_connections=settings.max_connections,
            credentials=credentials,
        )
        addresses = [engine.listen(address) for address in settings.listen]
        health_listener = await listen_for_probes(
            settings.health_listen, readiness.servicer, log, reuse_port=worker is not None
        )
        await engine.start()
        _spare_what_stays()
        policy_reload.log_loaded(claims)
        stop = _stop_signals()
        _log_serving(settings, addresses, store, worker)
        announce(addresses)
        background = [
            asyncio.create_task(readiness.watch()),
            asyncio.create_task(policy_reload.follow(claims)),
            asyncio.create_task(startup_checks.follow(stop)),
        ]
        if metrics is not None:
            background.append(asyncio.create_task(follow_calls(metrics, admission)))
        await stop.get()
        log.info("shutdown_started", grace_ms=settings.shutdown_grace)
        for task in background:
            task.cancel()
        await readiness.not_serving()
        # gRPC cancels the calls that it has received and not yet handed over when it stops, which tells their callers
        # nothing. So new calls are refused with a reason first, until callers have had the time to go elsewhere.
        admission.close()
        # Those who wait would otherwise wait out the grace, and then be cancelled.
        await claims.close()
        await _drain(engine, admission, store, settings.shutdown_grace / 1000, stop)
        await health_listener.stop()
        log.info("server_stopped", shadow_duplicates=dict(claims.shadow_duplicates))
        startup_checks.raise_refusal()
    finally:
        await store.close()


def _spare_what_stays() -> None:
    # Modules and servers stay until the end, and a full collection that goes through them all stops every call for
    # 30 ms. With more objects between two collections as well, they cost a claim 0.7 µs instead of 5.
    gc.freeze()
    gc.set_threshold(_COLLECTION_THRESHOLD)
    gc.enable()


async def _open_store(settings: Settings, metrics: "Metrics | None", traces: "Traces | None") -> ClaimStore:
    place = store_place(settings)
    try:
        store = make_store(place, metrics.store if metrics else None)
        if traces is not None:
            store = TracedStore(store, store_traces(traces, place.url))
        if metrics is not None:
            store = MeasuredStore(store, metrics.store)
    except ValueError as error:
        raise BadSettings(f"DEDUP_STORE_URL (--store-url): {error}") from None
    try:
        await store.open()
    except StoreRefused as refusal:
        raise StartRefused(str(refusal)) from None
    return store


def _make_claims(settings: Settings, store: ClaimStore, policies: Policies, metrics: "Metrics | None") -> ClaimService:
    if metrics is None:
        return ClaimService(store, policies, max_result_bytes=settings.max_result_bytes)
    return CountedClaims(store, policies, metrics, max_result_bytes=settings.max_result_bytes)


def _log_serving(settings: Settings, addresses: Sequence[str], store: ClaimStore, worker: WorkerOrders | None) -> None:
    log = logger()
    event = "server_started" if worker is None else "worker_ready"
    log.info(event, addresses=addresses, store=store.description, engine=settings.engine, version=__version__)
    warn_of_exposure(settings, addresses, log)
    if settings.store_url is None:
        log.warning("embedded_store_used", message="no store URL is set: only this host sees these claims")


def _make_gate(settings: Settings, claims: ClaimService) -> CallerGate | None:
    if not settings.authenticates:
        return None
    tokens = None if settings.auth_tokens is None else load_tokens(settings.auth_tokens)
    return CallerGate(lambda: claims.policies, tokens)


def _stop_signals() -> asyncio.Queue[signal.Signals]:
    loop = asyncio.get_running_loop()
    received: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received.put_nowait, number)
    return received


async def _drain(
    engine: Engine,
    admission: Admission,
    store: ClaimStore,
    grace_s: float,
    stop: asyncio.Queue[signal.Signals],
) -> None:
    patience = asyncio.create_task(_until_idle(admission, grace_s))
    impatience = asyncio.create_task(stop.get())
    await asyncio.wait((patience, impatience), return_when=asyncio.FIRST_COMPLETED)
    for task in (patience, impatience):
        task.cancel()
    # What the store still owes an answer is told that it may have been done, where gRPC would only cancel it.
    await store.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SLACK_S):
            await admission.emptied()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SLACK_S):
            await engine.stop(None)


async def _until_idle(admission: Admission, grace_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await asyncio.sleep(_LAME_DUCK_S)
            await admission.emptied()

"""Health of the process and of its store, the listeners that serve health alone, and the examination at the start."""

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup_service.api import health
from dedup_service.api.servicer import SERVICE_NAME
from dedup_service.claims import (
    CheckFailed,
    ClaimStore,
    Reason,
    Severity,
    StoreNotice,
    StoreRefused,
    StoreUnavailable,
)
from dedup_service.config.errors import FatalError
from dedup_service.observability.logs import Logger
from dedup_service.server.engines import NO_COMPRESSION
from dedup_service.server.listeners import add_listener
from dedup_service.stores.registry import StoreConfig, examine_store

# A store that is back is used again within a second.
CHECK_INTERVAL_S = 0.5

# The names Kubernetes probes ask for. Restarting the process does not repair a store, so liveness ignores it.
LIVENESS = "liveness"
READINESS = "readiness"

# The store answered and refuses claims: the examination tells why.
_REFUSALS = (
    Reason.STORE_MISCONFIGURED,
    Reason.STORE_NOT_PERMITTED,
    Reason.STORE_NOT_REPLICATED,
    Reason.STORE_OUT_OF_MEMORY,
    Reason.STORE_TOO_FEW_REPLICAS,
)

_Status = health_pb2.HealthCheckResponse

# A probe is one small call over a new connection; other callers of this plaintext listener must not cost much more.
# Idle peers must not keep it out: at the limit gRPC closes the newest connection, so the limit is high, connections
# without a call end soon, and those with one that does not end (Watch) a little later.
MAX_PROBE_CONNECTIONS = 500
_MAX_IDLE_MS = 5_000
_MAX_AGE_MS = 60_000
_LISTENER_OPTIONS = (
    ("grpc.max_concurrent_streams", 10),
    ("grpc.max_allowed_incoming_connections", MAX_PROBE_CONNECTIONS),
    ("grpc.max_receive_message_length", 4_096),
    NO_COMPRESSION,
    ("grpc.max_connection_idle_ms", _MAX_IDLE_MS),
    ("grpc.max_connection_age_ms", _MAX_AGE_MS),
    ("grpc.max_connection_age_grace_ms", _MAX_IDLE_MS),
    ("grpc.keepalive_time_ms", 60_000),
)


class Health:
    """Keeps the standard health service true.

    "readiness", the service's name and the empty name are SERVING while the store takes claims, or until the shutdown
    if `follows_store` is off. "liveness" is SERVING as long as the process.
    """

    def __init__(self, store: ClaimStore, timeout_ms: int, log: Logger, *, follows_store: bool = True) -> None:
        self.history = health.StoreHistory()
        self.servicer = health.HealthServicer(self.history)
        self._store = store
        self._follows_store = follows_store
        # Twice the store's own timeout, so that its clearer error comes first.
        self._timeout_s = 2 * timeout_ms / 1000
        self._log = log
        self._ready: bool | None = None
        self.store_answered = asyncio.Event()
        """Set once the store has answered for the first time, also if it refuses claims."""

    async def watch(self) -> None:
        """Check the store for ever."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def check(self) -> None:
        """Check the store once, and update the health service."""
        if self._ready is None:
            await self.servicer.set(LIVENESS, _Status.SERVING)
        try:
            async with asyncio.timeout(self._timeout_s):
                notices = await self._store.check()
        except (StoreUnavailable, StoreRefused) as error:
            if isinstance(error, CheckFailed):
                self._report_notices(error.notices)
            if error.reason in _REFUSALS:
                self.store_answered.set()
            await self._set(ready=False, reason=error.reason.value, message=str(error))
        except TimeoutError:
            await self._set(ready=False, reason=Reason.STORE_TIMEOUT.value, message="the store did not answer in time")
        except Exception as error:  # noqa: BLE001 - health must not freeze at its last word
            await self._set(ready=False, reason=Reason.INTERNAL.value, message=f"the check failed: {error!r}")
        else:
            self._report_notices(notices)
            await self._set(ready=True)

    async def stop_serving(self) -> None:
        """Report NOT_SERVING from now on; no check may follow."""
        await self._report(serving=False)

    def _report_notices(self, notices: Sequence[StoreNotice]) -> None:
        for notice in notices:
            self.history.add(notice)
            self._log.warning(notice.event, message=notice.message)

    async def _report(self, *, serving: bool) -> None:
        for service in (health.OVERALL, SERVICE_NAME, READINESS):
            await self.servicer.set(service, _Status.SERVING if serving else _Status.NOT_SERVING)

    async def _set(self, *, ready: bool, **why: str) -> None:
        if ready is self._ready:
            return
        self._ready = ready
        await self._report(serving=ready or not self._follows_store)
        if ready:
            self.store_answered.set()
            self._log.info("store_became_ready", store=self._store.description)
        else:
            self._log.warning("store_became_unavailable", store=self._store.description, **why)


async def listen_for_probes(
    addresses: Sequence[str], servicer: health.HealthServicer, log: Logger, *, reuse_port: bool
) -> grpc.aio.Server:
    """Serve health in plaintext and without authentication on these addresses. Raises AddressUnavailable."""
    server = grpc.aio.server(options=(*_LISTENER_OPTIONS, ("grpc.so_reuseport", int(reuse_port))))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bound = [add_listener(server.add_insecure_port, address, reuse_port=reuse_port) for address in addresses]
    await server.start()
    log.info("health_listener_started", addresses=bound)
    return server


# The longest delay of the start.
_TIMEOUT_S = 2.0


async def examine(store: StoreConfig, log: Logger, *, strict: bool) -> None:
    """Log every finding that is a warning or worse. Raises FatalError for a critical one if `strict`."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            findings = await examine_store(store)
    except TimeoutError:
        log.warning("store_examination_failed", message=f"the store did not answer everything within {_TIMEOUT_S:g} s")
        return
    except Exception as error:  # noqa: BLE001 - claims can be served all the same
        log.warning("store_examination_failed", message=f"{type(error).__name__}: {error}")
        return
    critical = None
    for finding in sorted(findings, key=lambda finding: -finding.severity):
        if finding.severity < Severity.WARNING:
            continue
        # Not as an error, which stands for a fault of this service.
        log.warning("store_finding_reported", **finding.as_dict())
        if finding.severity is Severity.CRITICAL:
            critical = critical or finding
    if strict and critical is not None:
        raise FatalError(
            f"DEDUP_STRICT is set and the store is unfit ({critical.check}): {critical.message} "
            f"Remedy: {critical.remedy}"
        )

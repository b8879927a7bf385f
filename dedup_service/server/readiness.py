"""Health that follows the store: serving while it answers, not serving while it does not. Liveness follows nothing."""

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2

from dedup_service.claims import ClaimStore, StoreRefused, StoreUnavailable
from dedup_service.server.health_details import DetailedHealth, StoreMemory

# Short enough that a store that came back is used again within a second.
CHECK_INTERVAL_S = 0.5


# The names by which probes that are written to the letter ask. A restart mends no store, hence the first.
LIVENESS = "liveness"
READINESS = "readiness"


class Readiness:
    """Asks the store again and again, and keeps the standard health service true.

    Under the names of `services` and "readiness" it says whether to call here: while the store answers, or with
    `follows_store` off until the shutdown. "liveness" is serving as long as the process.
    """

    def __init__(
        self,
        store: ClaimStore,
        services: tuple[str, ...],
        timeout_ms: int,
        log: Any,  # noqa: ANN401 - as logger()
        *,
        follows_store: bool = True,
    ) -> None:
        self.memory = StoreMemory()
        self.servicer = DetailedHealth(self.memory)
        self._store = store
        self._services = (*services, READINESS)
        self._follows_store = follows_store
        # Twice the store's own limit, so that its own, clearer error comes first.
        self._timeout_s = 2 * timeout_ms / 1000
        self._log = log
        self._ready: bool | None = None
        self.answered = asyncio.Event()
        """Set once the store has answered for the first time."""

    async def watch(self) -> None:
        """Check for ever; cancelled at the shutdown."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_INTERVAL_S)

    async def check(self) -> None:
        """Check once, and tell the health service."""
        if self._ready is None:
            await self.servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        try:
            async with asyncio.timeout(self._timeout_s):
                notices = await self._store.check()
        except StoreUnavailable as error:
            await self._set(ready=False, reason=error.reason, message=str(error))
        except StoreRefused as error:
            await self._set(ready=False, reason="STORE_REFUSED", message=str(error))
        except TimeoutError:
            await self._set(ready=False, reason="STORE_TIMEOUT", message="the store did not answer in time")
        else:
            for notice in notices:
                self.memory.add(notice)
                self._log.warning(notice.event, message=notice.message)
            await self._set(ready=True)

    async def not_serving(self) -> None:
        """Say at once, and from now on, that nobody should call here. Nothing may be checked any more."""
        await self._tell(serving=False)

    async def _tell(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in self._services:
            await self.servicer.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def _set(self, *, ready: bool, **why: str) -> None:
        if ready is self._ready:
            return
        self._ready = ready
        await self._tell(serving=ready or not self._follows_store)
        if ready:
            self.answered.set()
            self._log.info("store_became_ready", store=self._store.description)
        else:
            self._log.warning("store_became_unavailable", store=self._store.description, **why)

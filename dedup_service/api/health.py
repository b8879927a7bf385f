"""The standard health service; its replies also report, in their trailing metadata, what the store has forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from grpc_health.v1 import health, health_pb2

from dedup_service.claims import StoreNotice

FORGOTTEN = "dedup-store-forgotten"
RESTARTS = "dedup-store-restarts"
LAST_FORGOTTEN = "dedup-store-last-forgotten"

SERVICE_NAME: str = health.SERVICE_NAME
OVERALL: str = health.OVERALL_HEALTH


@dataclass(slots=True)
class StoreHistory:
    """How often, since this process started, the store had forgotten claims or another server process answered."""

    forgotten: int = 0
    restarts: int = 0
    last_forgotten: datetime | None = None

    def add(self, notice: StoreNotice) -> None:
        """Count a notice."""
        self.restarts += notice.restarted
        if notice.forgot:
            self.forgotten += 1
            self.last_forgotten = datetime.now(UTC)

    def metadata(self) -> Sequence[tuple[str, str]]:
        """Return the counts, and the time of the last loss (RFC 3339) if there was one."""
        counts = [(FORGOTTEN, str(self.forgotten)), (RESTARTS, str(self.restarts))]
        if self.last_forgotten is not None:
            counts.append((LAST_FORGOTTEN, self.last_forgotten.isoformat(timespec="milliseconds")))
        return counts


# The library has no types.
class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's health service, with the history of the store."""

    def __init__(self, history: StoreHistory) -> None:
        super().__init__()
        self._history = history

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:  # noqa: ANN401, N802 - theirs
        """Reply as the library does."""
        context.set_trailing_metadata(tuple(self._history.metadata()))
        return await super().Check(request, context)

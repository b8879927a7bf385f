"""The standard health service, whose answers also say in their trailing metadata what the store has forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from grpc_health.v1 import health, health_pb2

from dedup_service.claims import StoreNotice

FORGOTTEN = "dedup-store-forgotten"
RESTARTS = "dedup-store-restarts"
LAST_FORGOTTEN = "dedup-store-last-forgotten"


@dataclass(slots=True)
class StoreMemory:
    """How often, since this process began, the store had forgotten claims, and another server process answered."""

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


# The library has no types, hence what is ignored.
class DetailedHealth(health.aio.HealthServicer):  # type: ignore[misc]
    """The health service of the library, with details."""

    def __init__(self, memory: StoreMemory) -> None:
        super().__init__()
        self._memory = memory

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:  # noqa: ANN401, N802 - theirs
        """Answer as the library does."""
        context.set_trailing_metadata(tuple(self._memory.metadata()))
        return await super().Check(request, context)

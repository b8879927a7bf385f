"""One log line for each call worth one: when, how long, how it ended, for whom, and on which transaction."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dedup_service.observability.logged_ids import LoggedIds

if TYPE_CHECKING:
    # Who does not ask for traces does not load their library.
    from dedup_service.observability.traces import CallSpan

# What people must look at, what is the caller's doing, and everything else.
_ERRORS = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
_WARNINGS = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}) | {
    *("UNAUTHENTICATED", "PERMISSION_DENIED"),
}


@dataclass(slots=True)
class CallRecord:
    """What is known of one call when it ends. `started` is Unix seconds, `duration` seconds."""

    method: str
    correlation_id: str
    started: float
    duration: float = 0.0
    code: str = "OK"
    transaction_id: str = ""
    outcome: str = ""
    reason: str = ""
    applied: str = ""
    caller: str = ""
    incident: str = ""
    namespace: str | None = None
    span: "CallSpan | None" = None
    exception: BaseException | None = None


class CallLog:
    """Writes call records to a log.

    Every call that failed is worth a line. Of those that succeeded are those that took `slow_s` seconds or longer, and
    the share `sample` (0 to 1) of the others, taken at random.
    """

    def __init__(
        self,
        log: Any,  # noqa: ANN401 - as in logs.logger
        ids: LoggedIds,
        *,
        sample: float = 1.0,
        slow_s: float = 0.0,
    ) -> None:
        self._log = log
        self._shown_id = ids.shown
        self._sample = sample
        self._slow_s = slow_s

    def takes_success(self, duration: float) -> bool:
        """Return whether a call that succeeded after this many seconds gets a line."""
        return duration >= self._slow_s or (self._sample > 0 and random.random() < self._sample)  # noqa: S311 - no secret

    def write(self, record: CallRecord) -> None:
        """Write one line: errors of ours as error, refusals and outages as warning, the rest as info."""
        if record.code in _ERRORS:
            write = self._log.error
        elif record.code in _WARNINGS:
            write = self._log.warning
        else:
            write = self._log.info
        fields: dict[str, Any] = {
            "method": record.method,
            "code": record.code,
            "started": datetime.fromtimestamp(record.started, UTC).isoformat(timespec="milliseconds"),
            "duration_ms": round(record.duration * 1000, 3),
            "correlation_id": record.correlation_id,
        }
        if record.transaction_id:
            fields["transaction"] = self._shown_id(record.transaction_id)
        for name in ("caller", "outcome", "reason", "applied", "incident"):
            if value := getattr(record, name):
                fields[name] = value
        if record.span is not None:
            fields["trace_id"], fields["span_id"] = record.span.trace_id, record.span.span_id
        if record.exception is not None:
            fields["exc_info"] = record.exception
        write("call_finished", **fields)

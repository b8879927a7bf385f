"""The log lines of calls: every failed call, slow ones, and a sample of the others."""

import random
import time
from datetime import UTC, datetime
from typing import Any

from dedup_service.observability.calls import Call
from dedup_service.observability.logs import LoggedIds, Logger

# ERROR: a fault of ours. WARNING: an outage, overload or refusal. Everything else is the caller's doing.
_ERRORS = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
_WARNINGS = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}) | {
    *("UNAUTHENTICATED", "PERMISSION_DENIED"),
}


class CallLog:
    """Logs every failed call, successful calls of `slow_s` or longer, and a share `sample` of the others."""

    def __init__(self, log: Logger, ids: LoggedIds, *, sample: float = 1.0, slow_s: float = 0.0) -> None:
        self._log = log
        self._shown_id = ids.shown
        self._sample = sample
        self._slow_s = slow_s

    def started(self, call: Call) -> None:
        """Log nothing yet."""

    def finished(self, call: Call) -> None:
        """Write the line of the call, if it gets one, and one for each bug in an entry of a batch."""
        for failure in call.failed_entries:
            if failure.exception is not None:
                self._log.error("batch_entry_failed", incident=failure.incident, exc_info=failure.exception)
        if call.code != "OK" or self._takes_success(call.duration_s):
            call.logged = True
            self._write(call)

    def _takes_success(self, duration_s: float) -> bool:
        return duration_s >= self._slow_s or (self._sample > 0 and random.random() < self._sample)  # noqa: S311 - no secret

    def _write(self, call: Call) -> None:
        if call.code in _ERRORS:
            write = self._log.error
        elif call.code in _WARNINGS:
            write = self._log.warning
        else:
            write = self._log.info
        started = datetime.fromtimestamp(time.time() - call.duration_s, UTC)
        fields: dict[str, Any] = {
            "method": call.method,
            "code": call.code,
            "started": started.isoformat(timespec="milliseconds"),
            "duration_ms": round(call.duration_s * 1000, 3),
            "correlation_id": call.correlation_id,
        }
        if call.transaction_id:
            fields["transaction"] = self._shown_id(call.transaction_id)
        if call.caller is not None:
            fields["caller"] = call.caller.name
        if call.outcome:
            fields["outcome"] = call.outcome
        if call.failure is not None:
            fields |= {"reason": call.failure.reason.value, "applied": call.failure.applied.value}
            if call.failure.exception is not None:
                fields |= {"incident": call.failure.incident, "exc_info": call.failure.exception}
        if call.trace is not None:
            fields["trace_id"], fields["span_id"] = call.trace
        write("call_finished", **fields)

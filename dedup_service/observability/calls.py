"""A call as observers see it, and its log line."""

import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from dedup_service.claims import Applied, Caller, ClaimAnswer, Reason
from dedup_service.observability.logs import LoggedIds, Logger

CORRELATION_HEADER = "x-correlation-id"

# Other ids are not worth echoing into every log line.
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header-field-values: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

Metadata = Iterable[tuple[str, str | bytes]]


class Failure(NamedTuple):
    """The failure of a call or batch entry; a bug has an `incident` and an `exception`."""

    reason: Reason
    applied: Applied
    incident: str = ""
    exception: BaseException | None = None


class Call:
    """One call, filled in by the endpoint and the handler.

    Defaults on the class are cheap: most attributes are never set.
    """

    code: str = ""
    """gRPC status code, by name; empty until the call ends."""
    duration_s: float = 0.0
    caller: Caller | None = None
    transaction_id: str = ""
    namespace: str | None = None
    """None for a batch, whose claims have their own, and for an undecodable request."""
    outcome: str = ""
    claims: Sequence[tuple[str, ClaimAnswer | None]] = ()
    """Namespace and answer of each claim, None for a failed one."""
    failure: Failure | None = None
    failed_entries: Sequence[Failure] = ()
    trace: tuple[str, str] | None = None
    """Trace id and span id, if traced."""
    logged: bool = False

    def __init__(self, method: str, metadata: Callable[[], Metadata | None]) -> None:
        self.method = method
        self._metadata = metadata
        self._begun = time.perf_counter()
        self._correlation_id = ""

    def end(self, code: str) -> None:
        """Set the status code and the duration."""
        self.code = code
        self.duration_s = time.perf_counter() - self._begun

    def metadata(self) -> Metadata:
        """Return the caller's metadata; reading it costs as much as deciding a claim."""
        return self._metadata() or ()

    @property
    def correlation_id(self) -> str:
        """The caller's correlation id, or a generated one."""
        if not self._correlation_id:
            self._correlation_id = correlation_id(self.metadata())
        return self._correlation_id


class CallObserver(Protocol):
    """Observes the calls of one rpc. Its methods must return at once and not raise."""

    def started(self, call: Call) -> None:
        """Called when a call arrives."""

    def finished(self, call: Call) -> None:
        """Called when a call has ended, in the same task."""


def correlation_id(metadata: Metadata) -> str:
    """Return the first valid id of `x-correlation-id`, `x-request-id` and `traceparent` (trace id).

    Valid are 1 to 128 visible ASCII characters; otherwise 32 random hexadecimal digits.
    """
    found: dict[str, str] = {}
    for key, value in metadata:
        if key in (CORRELATION_HEADER, "x-request-id", "traceparent") and isinstance(value, str):
            found.setdefault(key, value)
    if found:
        for key in (CORRELATION_HEADER, "x-request-id"):
            if _USABLE.fullmatch(found.get(key, "")):
                return found[key]
        if match := _TRACEPARENT.fullmatch(found.get("traceparent", "")):
            return match[1]
    return secrets.token_hex(16)


# ERROR: a fault of ours. WARNING: an outage, overload or refusal. INFO: the caller's doing.
_ERRORS = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
_WARNINGS = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED"}) | {
    *("UNAUTHENTICATED", "PERMISSION_DENIED"),
}


class CallLog:
    """Logs failed calls, successful calls of `slow_s` or longer, and a share `sample` of the rest."""

    def __init__(self, log: Logger, ids: LoggedIds, *, sample: float = 1.0, slow_s: float = 0.0) -> None:
        self._log = log
        self._shown_id = ids.shown
        self._sample = sample
        self._slow_s = slow_s

    def started(self, call: Call) -> None:
        """Log nothing yet."""

    def finished(self, call: Call) -> None:
        """Write the call's line, if due, and one for each bug in a batch entry."""
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

"""What observers learn of a call."""

import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from dedup_service.claims import Applied, Caller, ClaimAnswer, Reason

CORRELATION_HEADER = "x-correlation-id"

# Longer or stranger ids are not worth echoing into every log line.
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header-field-values: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

Metadata = Iterable[tuple[str, str | bytes]]


class Failure(NamedTuple):
    """Why a call, or one entry of a batch, failed; `incident` and `exception` are set for a bug."""

    reason: Reason
    applied: Applied
    incident: str = ""
    exception: BaseException | None = None


class Call:
    """One call, from its arrival to its end. The endpoint and the handler fill it in.

    A plain class with defaults on the class: every call makes one, and most attributes are never set.
    """

    code: str = ""
    """gRPC status code, by name; empty until the call ends."""
    duration_s: float = 0.0
    caller: Caller | None = None
    transaction_id: str = ""
    namespace: str | None = None
    """None for a batch, whose claims each have their own, and for a request that cannot be decoded."""
    outcome: str = ""
    claims: Sequence[tuple[str, ClaimAnswer | None]] = ()
    """Namespace and answer of each claim; the answer is None for a claim that failed."""
    failure: Failure | None = None
    failed_entries: Sequence[Failure] = ()
    trace: tuple[str, str] | None = None
    """Trace id and span id, where traces are on."""
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
        """Return the metadata the caller sent; reading it costs as much as deciding a claim."""
        return self._metadata() or ()

    @property
    def correlation_id(self) -> str:
        """The caller's correlation id, or a generated one."""
        if not self._correlation_id:
            self._correlation_id = correlation_id(self.metadata())
        return self._correlation_id


class CallObserver(Protocol):
    """Observes the calls of one rpc. Its methods return at once and raise nothing."""

    def started(self, call: Call) -> None:
        """Called when a call arrives."""

    def finished(self, call: Call) -> None:
        """Called when a call has ended, in the same task."""


def correlation_id(metadata: Metadata) -> str:
    """Return the first usable one of `x-correlation-id`, `x-request-id` and the trace id of `traceparent`.

    Usable are 1 to 128 visible ASCII characters. Without one, return 32 random hexadecimal digits.
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

"""The OpenTelemetry spans of one process, sent over OTLP. Imported lazily: traces are optional.

Attributes follow the semantic conventions 1.44: https://opentelemetry.io/docs/specs/semconv/. None holds a transaction
id, token, claimant or result.
"""

import threading
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dedup_service.claims import DEFAULT_NAMESPACE
from dedup_service.observability.calls import Call

# The server's errors. Other codes are answers, or the caller's doing.
_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_W3C = TraceContextTextMapPropagator()
_W3C_HEADERS = frozenset(_W3C.fields)

# Shutdown waits for a collector at most twice this long.
_FLUSH_S = 0.5

Attributes = Mapping[str, str | int]


class Traces:
    """Exports this process's spans to a collector, configured by the OTEL_* variables.

    Raises ValueError and OSError for unusable variables, such as a missing certificate.
    """

    def __init__(self, service: str, version: str) -> None:
        self._service = service
        self._exporter = OTLPSpanExporter()
        given = OTELResourceDetector().detect().attributes
        resource = Resource.create({"service.name": "dedup-service", "service.version": version, **given})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("dedup_service", version)

    def calls(self, method: str, known: Callable[[], Container[str]]) -> "CallTraces":
        """Return the observer of one rpc; `known` returns the policy file's current namespaces."""
        return CallTraces(self._tracer, f"{self._service}/{method}", known)

    def store(self, attributes: Attributes, commands: Mapping[str, Attributes]) -> "StoreTraces":
        """Return the store's observer; `commands` names the command of each operation."""
        return StoreTraces(self._tracer, attributes, commands)

    def close(self) -> None:
        """Export the rest within a second; later spans are lost."""
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(_FLUSH_S)
        if flush.is_alive():
            # Ends the attempt in progress, and with it the flush.
            self._exporter.shutdown()
            flush.join(_FLUSH_S)


class CallTraces:
    """One span per call of an rpc, a child of the span in the caller's W3C trace context."""

    def __init__(self, tracer: trace.Tracer, name: str, known: Callable[[], Container[str]]) -> None:
        self._tracer = tracer
        self._name = name
        self._attributes: Attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        self._known = known
        # Spans of sampled calls in flight, with the token that detaches them.
        self._spans: dict[Call, tuple[trace.Span, Any]] = {}

    def started(self, call: Call) -> None:
        """Start the span; make it current if sampled."""
        carrier: dict[str, list[str]] = {}
        for key, value in call.metadata():
            if key in _W3C_HEADERS and isinstance(value, str):
                carrier.setdefault(key, []).append(value)
        span = self._tracer.start_span(
            self._name,
            # Never the current context: it may belong to another call of the connection.
            _W3C.extract(carrier, context.Context()),
            trace.SpanKind.SERVER,
            self._attributes,
        )
        found = span.get_span_context()
        call.trace = trace.format_trace_id(found.trace_id), trace.format_span_id(found.span_id)
        if span.is_recording():
            self._spans[call] = span, context.attach(trace.set_span_in_context(span))

    def finished(self, call: Call) -> None:
        """End the span of a sampled call."""
        sampled = self._spans.pop(call, None)
        if sampled is None:
            return
        span, token = sampled
        context.detach(token)
        span.set_attribute("rpc.response.status_code", call.code)
        if call.namespace is not None:
            span.set_attribute("dedup.namespace", self._label(call.namespace))
        if call.outcome:
            span.set_attribute("dedup.outcome", call.outcome)
        if call.failure is not None:
            span.set_attribute("dedup.reason", call.failure.reason.value)
            span.set_attribute("dedup.applied", call.failure.applied.value)
            if call.failure.incident:
                span.set_attribute("dedup.incident", call.failure.incident)
        if call.code in _ERRORS:
            _fail(span, call.code, call.failure.reason.value if call.failure else call.code)
        span.end()

    def _label(self, namespace: str) -> str:
        return namespace if namespace == DEFAULT_NAMESPACE or namespace in self._known() else "other"


class StoreTraces:
    """One span per store operation, below that of its sampled call."""

    def __init__(self, tracer: trace.Tracer, attributes: Attributes, commands: Mapping[str, Attributes]) -> None:
        self._tracer = tracer
        self._attributes = attributes
        self._commands = commands

    def operation_started(
        self, operation: str, arguments: Sequence[Any]
    ) -> Callable[[Any, BaseException | None], None] | None:
        """Start a span and return what ends it, None without a sampled call."""
        if operation == "check" or not trace.get_current_span().is_recording():
            return None
        command = self._commands.get(operation, {"db.operation.name": operation})
        name = str(command["db.operation.name"])
        attributes = {**self._attributes, **command}
        if operation == "claim_all" and len(arguments[0]) > 1:
            name = f"PIPELINE {name}"
            attributes |= {"db.operation.name": name, "db.operation.batch.size": len(arguments[0])}
        return partial(_end, self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes))


def _end(span: trace.Span, result: Any, failure: BaseException | None) -> None:  # noqa: ANN401 - what the store returns
    if failure is None and isinstance(result, list):
        # A failed claim makes the batch's span an error.
        failure = next((one for one in result if isinstance(one, Exception)), None)
    if failure is not None:
        # Only the reason: the text may hold an id.
        reason = str(getattr(failure, "reason", type(failure).__name__))
        _fail(span, reason, reason)
    span.end()


def _fail(span: trace.Span, error_type: str, description: str) -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(trace.StatusCode.ERROR, description)

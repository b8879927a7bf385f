"""The spans of one process for OpenTelemetry, sent over OTLP. Only who asks for traces loads this module.

Attributes follow the semantic conventions, version 1.44: https://opentelemetry.io/docs/specs/semconv/. None holds a
transaction id, token, claimant or result.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

# What of the codes is an error of a server: the others are the caller's doing, or an answer.
_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_W3C = TraceContextTextMapPropagator()
_W3C_HEADERS = frozenset(_W3C.fields)

# What the end of the process may wait for a collector, twice at most.
_FLUSH_S = 0.5

Attributes = Mapping[str, str | int]


class CallSpan:
    """The span of one call, current from its making to `end` where it is sampled."""

    __slots__ = ("_label", "_span", "_token")

    def __init__(self, span: trace.Span, label: Callable[[str], str]) -> None:
        self._span = span
        self._label = label
        self._token = context.attach(trace.set_span_in_context(span)) if span.is_recording() else None

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; those of the caller's trace where there is one."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @property
    def span_id(self) -> str:
        """16 hexadecimal digits."""
        return trace.format_span_id(self._span.get_span_context().span_id)

    def end(self, code: str, *, namespace: str | None, **what: str) -> None:
        """End the span of a call that ended with this code, as gRPC names it; of `what`, empty values are left out.

        Must be called in the task that the span was made in.
        """
        if self._token is None:
            return
        context.detach(self._token)
        span = self._span
        span.set_attribute("rpc.response.status_code", code)
        if namespace is not None:
            span.set_attribute("dedup.namespace", self._label(namespace))
        for name, value in what.items():
            if value:
                span.set_attribute(f"dedup.{name}", value)
        if code in _ERRORS:
            _fail(span, code, what.get("reason") or code)
        span.end()


class CallTraces:
    """Makes the spans of the calls of one rpc."""

    def __init__(self, tracer: trace.Tracer, method: str, label: Callable[[str], str]) -> None:
        self._tracer = tracer
        self._name = method
        self._attributes: Attributes = {"rpc.system.name": "grpc", "rpc.method": method}
        self._label = label

    def begin(self, metadata: Iterable[tuple[str, str | bytes]]) -> CallSpan:
        """Begin the span of a call, a child of the one that its W3C trace context names."""
        carrier: dict[str, list[str]] = {}
        for key, value in metadata:
            if key in _W3C_HEADERS and isinstance(value, str):
                carrier.setdefault(key, []).append(value)
        span = self._tracer.start_span(
            self._name,
            # Never what happens to be current, which would be another call of the same connection.
            _W3C.extract(carrier, context.Context()),
            trace.SpanKind.SERVER,
            self._attributes,
        )
        return CallSpan(span, self._label)


class StoreTraces:
    """Makes the spans of what is asked of the store; `attributes` says which store it is.

    `commands` has for each operation of the store the command that it comes to; others are named as they are.
    """

    def __init__(self, tracer: trace.Tracer, attributes: Attributes, commands: Mapping[str, Attributes]) -> None:
        self._tracer = tracer
        self._attributes = attributes
        self._commands = commands

    def begin(self, operation: str, batch: int = 1) -> trace.Span | None:
        """Begin a span below that of the call under way; None where there is no such call, or it is not sampled."""
        if not trace.get_current_span().is_recording():
            return None
        command = self._commands.get(operation, {"db.operation.name": operation})
        name = str(command["db.operation.name"])
        attributes = {**self._attributes, **command}
        if batch > 1:
            name = f"PIPELINE {name}"
            attributes |= {"db.operation.name": name, "db.operation.batch.size": batch}
        return self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=attributes)

    @staticmethod
    def end(span: trace.Span, failure: BaseException | None) -> None:
        """End a span, as an error where something was raised; its text may hold an id, and stays here."""
        if failure is not None:
            reason = str(getattr(failure, "reason", type(failure).__name__))
            _fail(span, reason, reason)
        span.end()


class Traces:
    """Sends the spans of this process to a collector, as the OTEL_* variables say.

    Raises ValueError and OSError for variables that cannot be followed, such as a certificate that is not there.
    """

    def __init__(self, service: str, version: str) -> None:
        self._service = service
        self._exporter = OTLPSpanExporter()
        given = OTELResourceDetector().detect().attributes
        resource = Resource.create({"service.name": "dedup-service", "service.version": version, **given})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("dedup_service", version)

    def call(self, label: Callable[[str], str], method: str) -> CallTraces:
        """Return the maker of the spans of one rpc; `label` gives for a namespace one of a set that is known."""
        return CallTraces(self._tracer, f"{self._service}/{method}", label)

    def store(self, attributes: Attributes, commands: Mapping[str, Attributes]) -> StoreTraces:
        """Return the maker of the spans of the store."""
        return StoreTraces(self._tracer, attributes, commands)

    def close(self) -> None:
        """Send what is left, in a second at most: what the collector does not take by then is lost."""
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(_FLUSH_S)
        if flush.is_alive():
            # Ends the attempt under way, and with it the flush.
            self._exporter.shutdown()
            flush.join(_FLUSH_S)


def _fail(span: trace.Span, error_type: str, description: str) -> None:
    span.set_attribute("error.type", error_type)
    span.set_status(trace.StatusCode.ERROR, description)

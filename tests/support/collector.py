"""A fake OpenTelemetry collector that receives spans over gRPC and keeps them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.support.polling import wait_until


@dataclass(frozen=True)
class CollectedSpan:
    """One received span with the resource attributes of its process; ids are hexadecimal."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, str | int]
    error: str | None
    """The status description of a failed span; None for others."""
    resource: dict[str, str | int]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a free port inside its `with` block."""

    def __init__(self) -> None:
        self.spans: list[CollectedSpan] = []
        self.raw = b""
        """The bytes of every request."""
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment that makes a service export its traces here, soon after each call."""
        return {"DEDUP_TRACES": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def __enter__(self) -> Self:
        """Listen."""
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._server.stop(None).wait()

    def Export(  # noqa: N802 - the name of the rpc
        self, request: trace_service_pb2.ExportTraceServiceRequest, _: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keep the spans."""
        self.raw += request.SerializeToString()
        for group in request.resource_spans:
            resource = _plain(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans.extend(_collected(span, resource) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def servers(self, method: str = "ClaimTransaction") -> list[CollectedSpan]:
        """Return the server spans of one rpc so far."""
        return [span for span in list(self.spans) if span.name == f"dedup.v1.DedupService/{method}"]

    def wait_for(self, found: Callable[[], list[CollectedSpan]]) -> CollectedSpan:
        """Return the first span of `found()` as soon as there is one; fail at the timeout."""
        wait_until(found, what="the span")
        return found()[0]

    def children(self, parent: CollectedSpan) -> list[CollectedSpan]:
        """Return the direct children of a span so far."""
        return [span for span in list(self.spans) if span.parent_id == parent.span_id]


def _plain(attributes: Any) -> dict[str, str | int]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _collected(span: trace_pb2.Span, resource: dict[str, str | int]) -> CollectedSpan:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return CollectedSpan(
        span.name,
        trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        _plain(span.attributes),
        span.status.message if failed else None,
        resource,
    )

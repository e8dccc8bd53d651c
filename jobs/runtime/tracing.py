"""Optional OpenTelemetry traces of an image's path, from its POST to its commit.

Tracing is off unless the extra `otel` is installed and the environment sets an endpoint
(`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`). While it's off, every
function here does nothing. A trace crosses the queue as a `traceparent` string (W3C Trace Context)
that's stored with the job and returned with each lease.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

log = structlog.get_logger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_tracer: "Tracer | None" = None


def start(service: str) -> None:
    """Send this process's spans, as `service`, if the environment enables tracing."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("tracing is off: run pip install 'imagemill[otel]' first")
        return
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)


def use(provider: "TracerProvider | None") -> None:
    """Create spans with `provider`; None turns tracing off."""
    global _tracer
    _tracer = provider.get_tracer("imagemill") if provider else None


def join(parent: str) -> None:
    """Add this task's spans to the trace of a `traceparent` that the caller sent."""
    if _tracer is None:
        return
    from opentelemetry.context import attach
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attach(TraceContextTextMapPropagator().extract({"traceparent": parent}))


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[str]:
    """A span around the `with` block. Yields its `traceparent`, or "" if tracing is off."""
    if _tracer is None:
        yield ""
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    with _tracer.start_as_current_span(name, attributes=attributes):
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        yield carrier.get("traceparent", "")


@contextmanager
def under(parent: str, name: str, **attributes: Any) -> Iterator[None]:
    """A span around the `with` block, under a lease's `traceparent`."""
    began = time.monotonic()
    try:
        yield
    finally:
        record(parent, name, time.monotonic() - began, **attributes)


def record(parent: str, name: str, seconds: float, **attributes: Any) -> None:
    """A span of the last `seconds`, under a lease's `traceparent`."""
    if _tracer is None or not parent:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent})
    end = time.time_ns()
    past = _tracer.start_span(
        name, context=context, attributes=attributes, start_time=end - round(seconds * 1e9)
    )
    past.end(end)

"""Traces of one image's way, from its POST to its commit: OpenTelemetry, where it is wanted.

Off unless the packages of the extra `otel` are installed and the environment names an endpoint
(`OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`); every function here does
nothing then. A trace crosses the queue as a `traceparent` (W3C Trace Context), a text that the job
carries and each lease brings along. Knows nothing of jobs and of what the spans mean.
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
    """Send this process's spans from now on, as `service`, if the environment asks for it."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("no traces: the extra is not installed: pip install 'imagemill[otel]'")
        return
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)


def use(provider: "TracerProvider | None") -> None:
    """Make spans with `provider`, or none any more."""
    global _tracer
    _tracer = provider.get_tracer("imagemill") if provider else None


def join(parent: str) -> None:
    """Have the spans of this task be part of the trace that a `traceparent` from outside names."""
    if _tracer is None:
        return
    from opentelemetry.context import attach
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attach(TraceContextTextMapPropagator().extract({"traceparent": parent}))


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[str]:
    """A span around what the context does; its `traceparent`, or "" when traces are off."""
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
    """A span around what the context does, under the `traceparent` that a lease brought along."""
    began = time.monotonic()
    try:
        yield
    finally:
        record(parent, name, time.monotonic() - began, **attributes)


def record(parent: str, name: str, seconds: float, **attributes: Any) -> None:
    """A span of the last `seconds`, under the `traceparent` that a lease brought along."""
    if _tracer is None or not parent:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent})
    end = time.time_ns()
    begun = _tracer.start_span(
        name, context=context, attributes=attributes, start_time=end - round(seconds * 1e9)
    )
    begun.end(end)

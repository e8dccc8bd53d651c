"""Spans across the queue, and no tracing unless it's enabled."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from jobs.runtime import tracing
from tests.jobs.bench import Bench

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)


def test_a_span_yields_its_traceparent(spans: InMemorySpanExporter) -> None:
    with tracing.span("submit", images=2) as parent:
        pass
    tracing.record(parent, "decode", 1.5, image="j:0")
    submitted, decoded = spans.get_finished_spans()
    assert decoded.parent and decoded.parent.span_id == submitted.context.span_id
    assert decoded.context.trace_id == submitted.context.trace_id
    assert decoded.end_time - decoded.start_time == 1_500_000_000
    assert (submitted.attributes, decoded.attributes) == ({"images": 2}, {"image": "j:0"})


def test_an_incoming_trace_is_continued(spans: InMemorySpanExporter) -> None:
    def within() -> str:
        tracing.join(PARENT)
        with tracing.span("submit") as parent:
            return parent

    import contextvars

    parent = contextvars.copy_context().run(within)
    assert parent.split("-")[1] == PARENT.split("-")[1]
    [span] = spans.get_finished_spans()
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-00"])
def test_a_missing_or_invalid_trace_is_harmless(spans: InMemorySpanExporter, parent: str) -> None:
    tracing.join(parent)
    tracing.record(parent, "decode", 0.1)
    assert len(spans.get_finished_spans()) == (0 if not parent else 1)


def test_a_trace_crosses_the_queue(bench: Bench) -> None:
    bench.submit(2, trace=PARENT)
    assert [lease.trace for lease in bench.claim(2)] == [PARENT, PARENT]
    bench.submit(1)
    assert [lease.trace for lease in bench.claim(1)] == [""]


def test_nothing_happens_while_tracing_is_off() -> None:
    tracing.join(PARENT)
    with tracing.span("submit") as parent:
        assert parent == ""
    tracing.record(PARENT, "decode", 1.0)


def test_tracing_is_off_unless_the_environment_enables_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.start("x")
    assert tracing._tracer is None
    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing.start("x")
    assert tracing._tracer is None


def test_a_missing_extra_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with capture_logs() as logs:
        tracing.start("x")
    assert tracing._tracer is None and "imagemill[otel]" in logs[0]["event"]


def test_opentelemetry_is_not_imported_while_tracing_is_off() -> None:
    code = (
        "import sys; from jobs.runtime import tracing;"
        "tracing.start('x'); tracing.record('a', 'b', 1.0);"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    env = {name: value for name, value in os.environ.items() if name not in tracing.ENDPOINTS}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)

"""One trace from the POST to the commit, as received by a collector from real processes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobs.runtime import tracing
from tests import web
from tests.page.deployment import running_deployment
from tests.service.conftest import Deployment
from tests.waiting import PATIENCE, wait_until

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextmanager
def collecting() -> Iterator[tuple[str, dict[str, list[Span]]]]:
    """A collector's address, and its received spans by service name."""
    spans: dict[str, list[Span]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                [name] = [a.value for a in resource.resource.attributes if a.key == "service.name"]
                received = spans.setdefault(name.string_value, [])
                received += [span for scope in resource.scope_spans for span in scope.spans]
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_workers_join_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (endpoint, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_deployment(tmp_path) as url:
            body = {"model": "fake", "prompts": ["a", "b"], "steps": 2}
            headers = {"traceparent": CALLER}
            job = web.post(f"{url}/v1/jobs", json=body, headers=headers).json()
            web.get(f"{url}/v1/jobs/{job['id']}?wait=30", timeout=PATIENCE)
            wait_until(
                lambda: (
                    len(spans.get("imagemill-worker", [])) >= 10 and spans.get("imagemill-service")
                )
            )
    [submit] = spans["imagemill-service"]
    assert (submit.name, submit.trace_id.hex()) == ("submit", CALLER.split("-")[1])
    assert submit.parent_span_id.hex() == CALLER.split("-")[2]
    worker_spans = spans["imagemill-worker"]
    assert {span.trace_id for span in worker_spans} == {submit.trace_id}
    assert {span.parent_span_id for span in worker_spans} == {submit.span_id}
    images = {
        a.value.string_value for span in worker_spans for a in span.attributes if a.key == "image"
    }
    assert images == {f"{job['id']}:0", f"{job['id']}:1"}
    for image in images:
        own = sorted(
            (span.end_time_unix_nano, span.name)
            for span in worker_spans
            if any(a.value.string_value == image for a in span.attributes)
        )
        assert [name for _, name in own] == ["claim", "encode", "denoise", "decode", "commit"]


def test_lease_carries_the_submit_span(deployment: Deployment) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    deployment.worker.finish_all()
    tracing.use(provider)
    try:
        deployment.submit("a", "b")
    finally:
        tracing.use(None)
    [span] = exporter.get_finished_spans()
    assert (span.name, span.attributes) == ("submit", {"model": "demo", "images": 2})
    for lease in deployment.worker.claim(2):
        assert lease.trace.split("-")[2] == f"{span.context.span_id:016x}"
        deployment.worker.finish(lease)


def test_lease_carries_no_span_without_tracing(deployment: Deployment) -> None:
    deployment.worker.finish_all()
    deployment.submit("a")
    [lease] = deployment.worker.claim()
    assert lease.trace == ""
    deployment.worker.finish(lease)

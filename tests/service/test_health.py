"""Liveness, readiness and metrics."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from jobs.image_store import LocalImages
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import EmbeddedServer
from service.app import create_app
from service.settings import ServiceSettings
from tests.service.conftest import CATALOG, Deployment, HandWorker
from tests.waiting import wait_until

SUCCEEDED = ("imagemill_images_finished_total", "succeeded")


def samples(deployment: Deployment) -> dict[tuple[str, ...], float]:
    """The metrics: (name, label values in order of label names) -> value."""
    response = deployment.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_healthz_is_ok(deployment: Deployment) -> None:
    assert deployment.client.get("/healthz").json() == {"status": "ok"}


def test_root_serves_the_page(deployment: Deployment) -> None:
    assert 'href="docs"' in deployment.client.get("/").text
    assert deployment.client.get("/docs").status_code == 200


def test_not_ready_without_a_worker(fresh: Deployment) -> None:
    response = fresh.client.get("/readyz")
    assert (response.status_code, "no worker is running" in response.json()["detail"]) == (
        503,
        True,
    )
    assert "retry-after" in response.headers


def test_readyz_reports_why_a_worker_failed(fresh: Deployment) -> None:
    error = "models.demo: vae/diffusion_pytorch_model.safetensors is missing"
    fresh.store.register("w1", WorkerReport("demo", "failed", error), 60)
    fresh.store.register("w2", WorkerReport("other", "ready"), 60)
    response = fresh.client.get("/readyz")
    assert (response.status_code, error in response.json()["detail"]) == (503, True)


def test_ready_with_a_ready_worker(fresh: Deployment) -> None:
    fresh.store.register("w1", WorkerReport("demo", "ready"), 60)
    response = fresh.client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "models": {"demo": 1, "distilled": 0, "idle": 0}}


def test_metrics_of_requests_queue_workers_and_images(fresh: Deployment) -> None:
    fresh.store.register("w1", WorkerReport("demo", "ready"), 60)
    fresh.submit("a", n=3, priority=7)
    first, second = fresh.worker.claim(2)
    fresh.worker.finish(first)
    fresh.worker.fail(second)
    wait_until(lambda: samples(fresh).get(("imagemill_images_finished_total", "failed")) == 1)
    metrics = samples(fresh)
    assert metrics["imagemill_queue_up",] == 1
    assert metrics["imagemill_queue_images", "demo", "7"] == 1
    assert metrics["imagemill_workers", "demo", "ready"] == 1
    assert metrics["imagemill_images_finished_total", "succeeded"] == 1
    assert metrics["imagemill_http_requests_total", "POST", "/v1/jobs", "202"] == 1


def test_metrics_of_waits_losses_and_each_worker(fresh: Deployment) -> None:
    info = {
        "model": "demo",
        "state": "ready",
        "in_flight": 3,
        "images_done": 7,
        "steps": 40,
        "tokens": 1000,
        "busy_seconds": 2.5,
        "forward_samples": {"buckets": [[1, 2], [8, 9], [None, 10]], "sum": 61},
        "prompt_cache": {"hits": 5, "misses": 2},
        "memory": {"allocated": 100, "total": 400},
    }
    fresh.store.register("w1", WorkerReport.from_dict(info), 60)
    fresh.store.register("old", WorkerReport("demo", "ready"), 60)
    fresh.submit("a", "b")
    first, _ = fresh.worker.claim(2)
    fresh.store.fail(first, "no", again=True)
    metrics = samples(fresh)
    assert metrics["imagemill_wait_seconds_count", "demo"] == 2
    assert metrics["imagemill_wait_seconds_bucket", "60", "demo"] == 2
    assert metrics["imagemill_images_retried_total", "demo"] == 1
    of_worker = {
        (name.removeprefix("imagemill_"), *rest): value
        for (name, *rest), value in metrics.items()
        if rest and "w1" in rest
    }
    assert of_worker == {
        ("worker_in_flight", "demo", "w1"): 3,
        ("worker_images_total", "demo", "w1"): 7,
        ("worker_steps_total", "demo", "w1"): 40,
        ("worker_tokens_total", "demo", "w1"): 1000,
        ("worker_busy_seconds_total", "demo", "w1"): 2.5,
        ("worker_prompts_total", "demo", "hits", "w1"): 5,
        ("worker_prompts_total", "demo", "misses", "w1"): 2,
        ("worker_memory_bytes", "allocated", "demo", "w1"): 100,
        ("worker_memory_bytes", "total", "demo", "w1"): 400,
        ("forward_samples_bucket", "1", "demo", "w1"): 2,
        ("forward_samples_bucket", "8", "demo", "w1"): 9,
        ("forward_samples_bucket", "+Inf", "demo", "w1"): 10,
        ("forward_samples_count", "demo", "w1"): 10,
        ("forward_samples_sum", "demo", "w1"): 61,
    }


def test_unreachable_queue_is_reported(tmp_path: Path) -> None:
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store, images = Store.connect(server.url), LocalImages(tmp_path / "images")
        settings = ServiceSettings(data=tmp_path)
        app = create_app(settings, store, images, CATALOG)
        with TestClient(app, base_url="http://localhost") as client:
            gone = Deployment(client, store, images, HandWorker(store, images), settings)
            job_id = gone.submit("a")["id"]
            server.stop()
            for method, path in [
                ("GET", "/readyz"),
                ("GET", "/v1/jobs"),
                ("GET", f"/v1/jobs/{job_id}"),
                ("GET", f"/v1/jobs/{job_id}?wait=1"),
                ("GET", "/v1/models"),
                ("POST", f"/v1/jobs/{job_id}/cancel"),
            ]:
                response = client.request(method, path)
                assert (response.status_code, path) == (503, path)
                assert int(response.headers["retry-after"]) > 0
            posted = client.post("/v1/jobs", json={"model": "demo", "prompts": ["a"]})
            assert posted.status_code == 503
            assert client.get("/healthz").status_code == 200
            assert samples(gone)[("imagemill_queue_up",)] == 0
            with EmbeddedServer.ensure(tmp_path / "queue"):
                wait_until(lambda: client.get(f"/v1/jobs/{job_id}").status_code == 200)
                gone.worker.finish_all()
                wait_until(lambda: samples(gone).get(SUCCEEDED) == 1)

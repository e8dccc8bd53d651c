"""A whole service with a real queue server and real files, and a hand-driven worker."""

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from jobs.catalog import Catalog, Defaults, Limits, Model
from jobs.image_store import LocalImages
from jobs.job import ImageResult, Lease
from jobs.queue.store import Store
from jobs.reports import Card, ModelCard
from jobs.runtime.embedded_queue import EmbeddedServer
from service.app import create_app
from service.settings import ServiceSettings

LIMITS = Limits(max_pixels=65536, max_steps=100, max_prompts=50, multiple=16)
CATALOG = Catalog(
    {
        "demo": Model("demo", "/nowhere", defaults=Defaults(128, 128, 8, 2.5), limits=LIMITS),
        "distilled": Model("distilled", "/nowhere", defaults=Defaults(64, 64, 4, 0), limits=LIMITS),
        "idle": Model("idle", "/nowhere", defaults=Defaults(64, 64, 4, 1), limits=LIMITS),
    }
)
_numbers = count()


def card(**properties: Any) -> ModelCard:
    """A card with these properties, and otherwise those of a Flux model."""
    plain = Card("flux", 16, "embedded", True, None, "FlowMatchEulerDiscreteScheduler")
    return ModelCard(properties=replace(plain, **properties))


@dataclass
class HandWorker:
    """A worker that tests drive step by step, through the store's own methods."""

    store: Store
    images: LocalImages
    name: str = "hand"
    held: list[str] = field(default_factory=list)

    def claim(self, limit: int = 1, model: str = "demo") -> list[Lease]:
        leases = self.store.claim(
            model,
            self.name,
            limit=limit,
            lease_seconds=60,
            prefer=None,
            nonce=f"nonce-{next(_numbers)}",
            held=self.held,
        )
        self.held += [lease.key for lease in leases]
        return leases

    def finish(
        self, lease: Lease, data: bytes | None = None, warnings: tuple[str, ...] = ()
    ) -> bytes:
        """Deliver an image for the lease and return its bytes."""
        data = data or picture(lease.request.width, lease.request.height, lease.index)
        uri = self.images.write(lease.job_id, lease.index, lease.token, data, ".png")
        digest = hashlib.sha256(data).hexdigest()
        result = ImageResult(uri, digest, len(data), "image/png", 0.5, warnings)
        self.store.commit([(lease, result)])
        self._drop(lease)
        return data

    def fail(self, lease: Lease, error: str = "it would not") -> None:
        self.store.fail(lease, error, again=False)
        self._drop(lease)

    def finish_all(self, model: str = "demo") -> None:
        while leases := self.claim(16, model):
            for lease in leases:
                self.finish(lease)

    def _drop(self, lease: Lease) -> None:
        self.held = [key for key in self.held if key != lease.key]


@dataclass
class Deployment:
    """A running service and everything behind it."""

    client: TestClient
    store: Store
    images: LocalImages
    worker: HandWorker
    settings: ServiceSettings
    pool: str = ""

    def submit(self, *prompts: object, **fields: object) -> dict:
        """Submit these prompts and return the job."""
        body = {"model": "demo", "prompts": list(prompts) or ["a red circle"], **fields}
        response = self.client.post("/v1/jobs", json=body)
        assert response.status_code == 202, response.text
        return response.json()

    def job(self, job_id: str) -> dict:
        response = self.client.get(f"/v1/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return response.json()


def picture(width: int = 64, height: int = 64, shade: int = 0) -> bytes:
    """A small PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, shade % 256, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def pointers(response: object) -> list[str]:
    """The invalid fields in a problem document."""
    return [problem["pointer"] for problem in response.json()["errors"]]


@contextmanager
def working(
    deployment: Deployment, deliver: Callable[[Lease], object] | None = None, model: str = "demo"
) -> Iterator[list[Lease]]:
    """Run a worker in the background; yields the list of its leases."""
    leases: list[Lease] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            deployment.store.wait(model, 0.1)
            for lease in deployment.worker.claim(4, model):
                leases.append(lease)
                (deliver or deployment.worker.finish)(lease)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            yield leases
        finally:
            stop.set()
            future.result()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.ensure(tmp_path_factory.mktemp("queue")) as embedded:
        yield embedded


@contextmanager
def deployed(
    url: str, folder: Path, *, start: bool = True, catalog: Catalog = CATALOG, **settings: object
) -> Iterator[Deployment]:
    """A service with its own pool; with `start` False, a server runs its lifespan."""
    pool = str(settings.pop("pool", f"test{next(_numbers)}-{folder.name}"[:60]))
    store = Store.connect(url, pool=pool)
    images = LocalImages(folder / "images")
    chosen = ServiceSettings(**{"data": folder, "absent_seconds": 1e6, **settings})
    app = create_app(chosen, store, images, catalog)
    client = TestClient(app, base_url="http://localhost")
    with client if start else nullcontext():
        yield Deployment(client, store, images, HandWorker(store, images), chosen, pool)


@pytest.fixture(scope="module")
def deployment(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """One service for a module's tests; each test has its own jobs."""
    with deployed(server.url, tmp_path_factory.mktemp("deployment")) as service:
        yield service


@pytest.fixture
def fresh(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    """A service with an empty queue and small limits, for one test."""
    with deployed(server.url, tmp_path, max_unfinished=20, max_body_bytes=20_000) as service:
        yield service

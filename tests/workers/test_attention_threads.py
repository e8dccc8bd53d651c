"""Attention on several threads: encoding and decoding in parallel change no bit.

With every backend of diffusers, reproducible pictures are the same alone and together, or the
backend is refused at startup.
"""

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from jobs.catalog import Defaults
from jobs.errors import ConfigurationError
from jobs.request import ImageRequest
from pipelines.cache import EmbeddingCache
from pipelines.load import load_pipeline
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.serving import ask, entry
from tests.pipelines.tiny import save_tiny
from tests.workers.conftest import Bench
from tests.workers.test_engine_families import costs_of
from workers.in_flight import InFlight

BACKENDS = sorted(backend.value for backend in AttentionBackendName)
RUN_ON_CPU = {"native", "_native_math", "_native_flash"}
"""Backends that have to start here. Others may."""

PROMPTS = 40
REQUESTS = [
    ask(f"cat {n} on a beach" + " at dawn" * (n % 4), seed=n, steps=1 + n % 2)
    for n in range(PROMPTS)
]


@dataclass
class Threads(Bench):
    """The engine on this thread, encoding and decoding on one thread each, as in a worker."""

    expected: int = 0
    finished: queue.SimpleQueue[InFlight | None] = field(default_factory=queue.SimpleQueue)

    def serve(self, requests: list[ImageRequest]) -> dict[int, torch.Tensor]:
        """The pictures by seed."""
        self.expected = len(requests)
        self.pipeline.cache = EmbeddingCache()  # so that every prompt is encoded
        with ThreadPoolExecutor(2) as pool:
            encoding = pool.submit(self._encode, requests)
            decoding = pool.submit(self._decode)
            try:
                self.run()
            finally:
                self.finished.put(None)
            encoding.result()
            assert not self.failed
            return decoding.result()

    def _encode(self, requests: list[ImageRequest]) -> None:
        try:
            for request in requests:
                self.enqueue(request)
        except BaseException:
            self.engine.stopping.set()
            raise

    def _decode(self) -> dict[int, torch.Tensor]:
        pictures = {}
        while flight := self.finished.get():
            [pictures[flight.lease.request.seed]] = self.pipeline.decode([flight.sample])
        return pictures

    def _deliver(self, flight: InFlight) -> None:
        self.finished.put(flight)
        super()._deliver(flight)

    def _left(self, flight: InFlight) -> None:
        if len(self.delivered) + len(self.failed) == self.expected:
            self.engine.stopping.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("Flux", tmp_path_factory.mktemp("tiny") / "Flux")


def load(folder, backend: str | None) -> FamilyPipeline:
    torch.set_num_threads(1)
    fields = {"defaults": Defaults(64, 64, 2, 3.5), "max_sequence_length": 48}
    return load_pipeline(entry(folder, attention_backend=backend, **fields), "cpu")


@pytest.mark.filterwarnings("ignore")  # the error of a backend that isn't for CPUs
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_reproducible_or_refused(folder, backend):
    if backend not in RUN_ON_CPU and (refusal := refusal_of(folder, backend)):
        assert f"attention_backend {backend!r}" in refusal
    else:
        check_threads(load(folder, backend))


def refusal_of(folder, backend: str) -> str:
    """Why the backend doesn't start; empty if it does."""
    try:
        load(folder, backend)
    except ConfigurationError as error:
        return str(error)
    return ""


def check_threads(pipeline: FamilyPipeline) -> None:
    """Assert that all pictures are bit-equal to the same requests served alone."""
    costs = costs_of(pipeline)
    together = Threads(pipeline, costs).serve(REQUESTS)
    equal = [
        torch.equal(together[request.seed], Threads(pipeline, costs).serve([request])[request.seed])
        for request in REQUESTS
    ]
    assert sum(equal) == PROMPTS

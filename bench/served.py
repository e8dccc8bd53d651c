"""What the queue, the files and HTTP cost: the bundled model served, beside a bare loop.

The bare loop runs the same engine over the same requests in one process, with no queue and no
files. Served means `imagemill up` with one worker, a job over HTTP, every image committed. Also
the share of time in which the denoiser stood still under backlog, and encoder calls per request.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bench.models import device
from bench.policies import Arrival, stepwise
from bench.report import Metrics, table
from imagemill.client import Client
from imagemill.running import running
from jobs.catalog import load_catalog
from jobs.request import ImageRequest
from pipelines.load import load_pipeline
from pipelines.placements.placed import Placed
from pipelines.seam import Pipeline
from workers.profile import probe, warm_up
from workers.scheduler import Costs

T = TypeVar("T")

CATALOG = Path("models.toml")
LIMIT_SECONDS = 300.0


def run(rounds: int = 5, count: int = 64) -> Metrics:
    """Both in turn, on the bundled model at its defaults, in the fast class."""
    model = load_catalog(CATALOG).get("demo")
    prompts = Path("demo/prompts.txt").read_text().splitlines()
    request = replace(probe(model), steps=model.defaults.steps, reproducible=False)
    wanted = [replace(request, prompt=prompts[i % len(prompts)], seed=i) for i in range(count)]
    loop, through, idle = [], [], []
    with _up() as (client, data):
        pipeline = load_pipeline(model, device())
        assert isinstance(pipeline, Placed)
        costs = warm_up(pipeline, model, device(), data)  # as the served worker measured them
        before = pipeline.cache.misses
        for number in range(rounds):
            loop.append(_bare(pipeline, costs, wanted))
            if number == 0:
                calls = (pipeline.cache.misses - before) / count
            rate, share = _served(client, wanted)
            through.append(rate)
            idle.append(share)
    ratio = statistics.median(a / b for a, b in zip(through, loop, strict=True))
    table(
        "the bundled model (images/s; median, min..max)",
        [("bare loop", loop, 1.0), ("served", through, ratio)],
    )
    return {
        "service_over_bare": ratio,
        "denoiser_idle": statistics.median(idle),
        "encodes_per_request": calls,
    }


def _bare(pipeline: Pipeline, costs: Costs, wanted: list[ImageRequest]) -> float:
    """Images per second through the engine alone: no queue, no files, pixels thrown away."""
    latencies = stepwise(pipeline, costs, [Arrival(0.0, request) for request in wanted])
    return len(wanted) / max(latencies)


@contextmanager
def _up() -> Iterator[tuple[Client, Path]]:
    data = Path(tempfile.mkdtemp(prefix="imagemill-bench-"))
    argv = [sys.executable, "-m", "imagemill", "up", "--data", str(data), "--port", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        record = _until(lambda: running(data))
        with Client(record.url) as client:
            _until(lambda: _worker(client).get("state") == "ready")
            yield client, data
    finally:
        process.terminate()
        process.wait()


def _served(client: Client, wanted: list[ImageRequest]) -> tuple[float, float]:
    """One job of all requests: images per second, and the idle share from a tenth to nine."""
    prompts = [{"prompt": request.prompt, "seed": request.seed} for request in wanted]
    job = client.submit("demo", prompts, reproducible=False)

    def progress() -> float:
        return float(client.get(f"/v1/jobs/{job.id}", images="none")["progress"])

    _until(lambda: job.refresh().counts.running > 0)
    started = time.perf_counter()
    _until(lambda: progress() >= 0.1)
    first, first_busy = time.perf_counter(), _worker(client)["busy_seconds"]
    _until(lambda: progress() >= 0.9)
    last, last_busy = time.perf_counter(), _worker(client)["busy_seconds"]
    job.wait()
    rate = len(wanted) / (time.perf_counter() - started)
    return rate, 1 - (last_busy - first_busy) / (last - first)


def _worker(client: Client) -> dict[str, Any]:
    found = client.get("/v1/workers")["data"]
    return dict(found[0]) if found else {}


def _until(question: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (answer := question()):
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not get there")
        time.sleep(0.2)
    return answer

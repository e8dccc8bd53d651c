"""What the queue, the files and HTTP cost: the bundled model served, compared with a bare loop.

The bare loop runs the same engine over the same requests in one process, without queue and files.
Served means `imagemill up` with one worker, a job over HTTP, and every image committed. Both are
timed from before the first request is handed over until the last image is done. For the served job,
that's its last commit, by the server's clock.

Two more figures come from the worker's reports. One is the share of time in which the denoiser was
idle under backlog. The other is the encoder calls per request: prompts that weren't in the cache,
including the negative prompt, divided by the images of the first job. The images use PROMPTS
prompts in turn and all have the same negative prompt, so the figure is (PROMPTS + 1) / images with
a perfect cache, and 2 without a cache.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from bench import serving
from bench.models import device
from bench.policies import Arrival, stepwise
from bench.report import Metrics, table
from imagemill.client.clients import Client, Job
from jobs.catalog import Model, load_catalog
from jobs.job import State
from jobs.reports import WorkerReport
from jobs.request import ImageRequest
from pipelines.load import load_pipeline
from pipelines.seam import Pipeline
from workers.pass_timer import probe
from workers.profile import warm_up
from workers.scheduler import Costs

T = TypeVar("T")

CATALOG = Path("models.toml")

PROMPTS = 48
"""Number of different prompts in a job."""

NEGATIVE = "blurry"


@dataclass(frozen=True, slots=True)
class Served:
    """The results of one job."""

    images_per_second: float
    idle: float
    encoder_calls: int


def run(rounds: int = 3, count: int = 192) -> Metrics:
    """Run both in turn, on the bundled model at its defaults, in the fast class."""
    model = load_catalog(CATALOG).get("demo")
    workload = trace(model, count)
    bare: list[float] = []
    through: list[Served] = []
    with serving.folder() as data, serving.up(data, CATALOG) as client:
        pipeline = load_pipeline(model, device())
        costs = warm_up(pipeline, model, device(), data)  # as the served worker measured
        for _ in range(rounds):
            bare.append(_bare(pipeline, costs, workload))
            through.append(_served(client, workload))
    rates = [served.images_per_second for served in through]
    ratio = statistics.median(a / b for a, b in zip(rates, bare, strict=True))
    table(
        f"the bundled model, {count} images (images/s; median, min..max)",
        [("bare loop", bare, 1.0), ("served", rates, ratio)],
    )
    return {
        "service_over_bare": ratio,
        "denoiser_idle": statistics.median(served.idle for served in through),
        "encodes_per_request": through[0].encoder_calls / count,
    }


def trace(model: Model, count: int) -> list[ImageRequest]:
    """`count` requests with PROMPTS prompts in turn and one negative prompt."""
    prompts = Path("demo/prompts.txt").read_text().splitlines()[:PROMPTS]
    request = replace(
        probe(model), steps=model.defaults.steps, negative_prompt=NEGATIVE, reproducible=False
    )
    return [replace(request, prompt=prompts[i % PROMPTS], seed=i) for i in range(count)]


def _bare(pipeline: Pipeline, costs: Costs, workload: list[ImageRequest]) -> float:
    """Images per second of the engine alone: no queue, no files, pixels discarded."""
    latencies = stepwise(pipeline, costs, [Arrival(0.0, request) for request in workload])
    return len(workload) / max(latencies)


def _served(client: Client, workload: list[ImageRequest]) -> Served:
    """Run all requests as one job; the idle share is measured from 10 % to 90 % of it."""
    prompts = [
        {"prompt": item.prompt, "negative_prompt": item.negative_prompt, "seed": item.seed}
        for item in workload
    ]
    before = serving.worker(client)
    started = time.time()
    job = client.submit("demo", prompts, reproducible=False)
    first = _at_progress(client, job, 0.1)
    last = _at_progress(client, job, 0.9)
    job.wait()
    finished = float(client.get(f"/v1/jobs/{job.id}", images="none")["finished"])
    if job.state is not State.SUCCEEDED:
        raise RuntimeError("a benchmark's image failed")
    after = serving.until(lambda: _reported_after(client, finished))
    busy_seconds = _known(last.busy_seconds) - _known(first.busy_seconds)
    return Served(
        images_per_second=len(workload) / (finished - started),
        idle=1 - busy_seconds / (_known(last.at) - _known(first.at)),
        encoder_calls=_known(after.prompt_cache)["misses"] - _known(before.prompt_cache)["misses"],
    )


def _known(value: T | None) -> T:
    """A value that every ready worker reports."""
    if value is None:
        raise RuntimeError("the worker's report is incomplete")
    return value


def _at_progress(client: Client, job: Job, share: float) -> WorkerReport:
    """The worker's report once the job's progress has reached `share`."""

    def progress() -> float:
        return float(client.get(f"/v1/jobs/{job.id}", images="none")["progress"])

    serving.until(lambda: progress() >= share)
    return serving.worker(client)


def _reported_after(client: Client, moment: float) -> WorkerReport | None:
    report = serving.worker(client)
    return report if _known(report.at) > moment else None

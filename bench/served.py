"""What the queue, the files and HTTP cost: the bundled model served, beside a bare loop.

The bare loop runs the same engine over the same requests in one process, with no queue and no
files. Served means `imagemill up` with one worker, a job over HTTP, every image committed. Both are
timed from before the first request is handed over until the last image is done, by the server's
clock when that is its commit.

Also the share of time in which the denoiser stood still under backlog, by what the worker reports
of itself, and the worker's encoder calls per request: prompts that its cache did not have, the
negative prompt counted as one of them, over the images of the first job. PROMPTS prompts come in
turn and all images have the same negative prompt, so that with a cache that loses nothing it is
(PROMPTS + 1) / images, and 2 with none.
"""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import serving
from bench.models import device
from bench.policies import Arrival, stepwise
from bench.report import Metrics, table
from imagemill.client.clients import Client, Job
from jobs.catalog import Model, load_catalog
from jobs.job import State
from jobs.request import ImageRequest
from pipelines.load import load_pipeline
from pipelines.seam import Pipeline
from workers.profile import probe, warm_up
from workers.scheduler import Costs

CATALOG = Path("models.toml")

PROMPTS = 48
"""Different prompts of a job."""

NEGATIVE = "blurry"


@dataclass(frozen=True, slots=True)
class Served:
    """What one job came to."""

    images_per_second: float
    idle: float
    encoder_calls: int


def run(rounds: int = 3, count: int = 192) -> Metrics:
    """Both in turn, on the bundled model at its defaults, in the fast class."""
    model = load_catalog(CATALOG).get("demo")
    wanted = trace(model, count)
    bare: list[float] = []
    through: list[Served] = []
    with serving.folder() as data, serving.up(data, CATALOG) as client:
        pipeline = load_pipeline(model, device())
        costs = warm_up(pipeline, model, device(), data)  # as the served worker measured them
        for _ in range(rounds):
            bare.append(_bare(pipeline, costs, wanted))
            through.append(_served(client, wanted))
    rates = [one.images_per_second for one in through]
    ratio = statistics.median(a / b for a, b in zip(rates, bare, strict=True))
    table(
        f"the bundled model, {count} images (images/s; median, min..max)",
        [("bare loop", bare, 1.0), ("served", rates, ratio)],
    )
    return {
        "service_over_bare": ratio,
        "denoiser_idle": statistics.median(one.idle for one in through),
        "encodes_per_request": through[0].encoder_calls / count,
    }


def trace(model: Model, count: int) -> list[ImageRequest]:
    """`count` requests with PROMPTS prompts in turn and one negative prompt."""
    prompts = Path("demo/prompts.txt").read_text().splitlines()[:PROMPTS]
    request = replace(
        probe(model), steps=model.defaults.steps, negative_prompt=NEGATIVE, reproducible=False
    )
    return [replace(request, prompt=prompts[i % PROMPTS], seed=i) for i in range(count)]


def _bare(pipeline: Pipeline, costs: Costs, wanted: list[ImageRequest]) -> float:
    """Images per second through the engine alone: no queue, no files, pixels thrown away."""
    latencies = stepwise(pipeline, costs, [Arrival(0.0, request) for request in wanted])
    return len(wanted) / max(latencies)


def _served(client: Client, wanted: list[ImageRequest]) -> Served:
    """One job of all requests; the idle share is from a tenth of it to nine."""
    prompts = [
        {"prompt": one.prompt, "negative_prompt": one.negative_prompt, "seed": one.seed}
        for one in wanted
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
    return Served(
        images_per_second=len(wanted) / (finished - started),
        idle=1 - (last["busy_seconds"] - first["busy_seconds"]) / (last["at"] - first["at"]),
        encoder_calls=after["prompt_cache"]["misses"] - before["prompt_cache"]["misses"],
    )


def _at_progress(client: Client, job: Job, share: float) -> dict[str, Any]:
    """What the worker last reported once the job is so far: `busy_seconds` were so many `at`."""

    def progress() -> float:
        return float(client.get(f"/v1/jobs/{job.id}", images="none")["progress"])

    serving.until(lambda: progress() >= share)
    return serving.worker(client)


def _reported_after(client: Client, moment: float) -> dict[str, Any] | None:
    found = serving.worker(client)
    return found if found["at"] > moment else None

"""How much a large job delays four images: fair share between callers, and between jobs.

On a worker of the bundled model, one caller queues 500 images. Then another caller asks for four
images, and after that the first caller asks for four in a second job. This runs with equal images,
and with a large job of many steps next to four images of few steps. In the latter case the four are
requested once more, at the highest priority. A figure is the time that the four images take,
divided by the time that the same four take on the idle worker.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import serving
from bench.report import Metrics, table
from jobs.catalog import load_catalog
from jobs.job import State
from jobs.queue.store import Store
from jobs.request import ImageRequest
from workers.pass_timer import probe
from workers.scheduler import LEAST_HELD

CATALOG = Path("models.toml")

HEAVY, LIGHT = 500, 4
"""Images of the large job and of the others."""

MANY_STEPS, FEW_STEPS = 100, 5
"""Steps of the large job's images and of the others, in the unequal scene."""

USUAL, HIGHEST = 5, 9
"""Priorities."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Four images next to the large job: the figure's name, the tenant, the priority."""

    metric: str
    own: bool
    priority: int = USUAL


@dataclass(frozen=True, slots=True)
class Scene:
    """The steps of the large job, the steps of the four images, and who asks for them."""

    name: str
    heavy_steps: int
    light_steps: int
    asks: Sequence[Ask]


def scenes(usual_steps: int) -> tuple[Scene, Scene]:
    """One scene with equal images, of the model's default steps, and one with unequal ones."""
    alike = [Ask("fair_other_caller", own=False), Ask("fair_same_caller", own=True)]
    unequal = [
        Ask("fair_other_caller_unequal", own=False),
        Ask("fair_same_caller_unequal", own=True),
        Ask("urgent", own=True, priority=HIGHEST),
    ]
    return (
        Scene("alike", usual_steps, usual_steps, alike),
        Scene("unequal", MANY_STEPS, FEW_STEPS, unequal),
    )


def run(rounds: int = 5) -> Metrics:
    """Run every scene in every round, each compared with the same images alone just before."""
    model = load_catalog(CATALOG).get("demo")
    played = scenes(model.defaults.steps)
    seconds: dict[str, list[float]] = {}
    with serving.folder() as data, serving.workers(data, CATALOG, "demo") as store:
        _timed(store, "warm", probe(model), USUAL)
        for number in range(rounds):
            for scene in played:
                for name, took in _play(store, scene, probe(model), number).items():
                    seconds.setdefault(name, []).append(took)
    metrics: Metrics = {}
    for scene in played:
        alone = seconds[f"alone, {scene.name}"]
        for ask in scene.asks:
            pairs = zip(seconds[ask.metric], alone, strict=True)
            metrics[ask.metric] = statistics.median(took / base for took, base in pairs)
    table(
        f"{LIGHT} images next to {HEAVY} queued (seconds; median, min..max)",
        [(name, figures, metrics.get(name, 1.0)) for name, figures in seconds.items()],
    )
    return metrics


def _play(store: Store, scene: Scene, request: ImageRequest, number: int) -> dict[str, float]:
    """Seconds of the light images: alone, and then for each `Ask` next to the large job."""
    light = replace(request, steps=scene.light_steps)
    callers = f"{scene.name}-heavy{number}", f"{scene.name}-light{number}"
    seconds = {f"alone, {scene.name}": _timed(store, f"{scene.name}-solo{number}", light, USUAL)}
    heavy = _submit(store, callers[0], replace(request, steps=scene.heavy_steps), HEAVY, USUAL)
    serving.until(lambda: _is_busy(store, heavy), pause=0.01)
    for ask in scene.asks:
        caller = callers[0] if ask.own else callers[1]
        seconds[ask.metric] = _timed(store, caller, light, ask.priority)
    store.cancel(heavy, None)
    serving.until(lambda: _in_flight(store) == 0, pause=0.01)
    return seconds


def _submit(store: Store, tenant: str, request: ImageRequest, count: int, priority: int) -> str:
    submitted = store.submit(
        [replace(request, seed=seed) for seed in range(count)],
        tenant=tenant,
        priority=priority,
        metadata={},
        spec={},
        quota=10 * HEAVY,
        keep_seconds=600,
        max_attempts=3,
    )
    return submitted.job_id


def _timed(store: Store, tenant: str, request: ImageRequest, priority: int) -> float:
    """Seconds from submitting LIGHT images to the last one's commit."""
    started = time.perf_counter()
    job = _submit(store, tenant, request, LIGHT, priority)
    serving.until(lambda: store.job(job, None).state.finished, pause=0.01)
    took = time.perf_counter() - started
    if store.job(job, None).state is not State.SUCCEEDED:
        raise RuntimeError("a benchmark's image failed")
    return took


def _is_busy(store: Store, job_id: str) -> bool:
    """Whether the worker holds as many images of the job as it can, and has run some of them."""
    job = store.job(job_id, None)
    return job.counts.running >= LEAST_HELD and job.progress * job.steps > 2 * LEAST_HELD


def _in_flight(store: Store) -> int:
    return sum(worker.report.in_flight or 0 for worker in store.workers())

"""Metrics of forward passes: histograms, pace, caches and memory."""

import pytest

from jobs.reports import WorkerReport
from pipelines.cache import EmbeddingCache
from pipelines.seam import Conditioning
from tests.workers.conftest import request
from tests.workers.test_engine import MakeBench
from workers.metrics import ForwardCounts, Pace, StepRate, cache_counts, device_memory


def test_histogram_is_cumulative() -> None:
    measures = ForwardCounts()
    for samples, seconds in ((1, 0.001), (3, 0.2), (40, 60.0)):
        measures.forward(samples, 100, 5, seconds)
    report = measures.added_to(WorkerReport(busy_seconds=1.0))
    assert report.tokens == 300
    assert report.forward_samples and report.forward_seconds
    sizes = dict(report.forward_samples.buckets)
    assert (sizes[1], sizes[2], sizes[4], sizes[32], sizes[None]) == (1, 1, 2, 2, 3)
    assert report.forward_samples.sum == 44
    times = dict(report.forward_seconds.buckets)
    assert (times[0.005], times[0.25], times[30], times[None]) == (1, 2, 2, 3)


def test_every_forward_pass_is_counted(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(*[request(seed=seed) for seed in range(3)])
    engine.run()
    report = engine.engine.slots.added_to(WorkerReport())
    assert report.forward_samples
    assert dict(report.forward_samples.buckets)[None] == engine.engine.slots.forwards
    assert report.forwards == engine.engine.slots.forwards
    assert report.forward_samples.sum == engine.engine.steps == 3 * 4
    assert report.tokens == 3 * 4 * 2 * 16


def test_step_rate_is_smoothed_and_stays_while_idle() -> None:
    rate = StepRate()
    rate.update(0.0, 0)
    assert rate.value is None
    rate.update(2.0, 40)
    rate.update(2.0, 40)
    assert rate.value == 20
    rate.update(3.0, 50)
    assert rate.value == 20 + 0.3 * (10 - 20)


def test_pace_follows_work_and_stays_while_idle() -> None:
    pace = Pace()
    pace.update(100.0, 0.0, 0, 0.0, 0)
    assert (pace.rate, pace.samples) == (None, None)
    pace.update(102.0, 2.0, 1000, 8.0, 8)
    assert (pace.rate, pace.samples) == (500, 4)
    pace.update(110.0, 2.0, 1000, 8.0, 0)
    assert (pace.rate, pace.samples) == (500, 4)
    pace.update(111.0, 3.0, 2500, 16.0, 16)
    each, samples = 125 + 0.3 * (1500 / 8 - 125), 4 + 0.3 * 4
    assert (pace.rate, pace.samples) == (each * samples, samples)


def test_last_few_samples_do_not_lower_samples_at_once() -> None:
    pace = Pace()
    pace.update(0.0, 0.0, 0, 0.0, 0)
    pace.update(2.0, 2.0, 1600, 16.0, 16)
    for second in range(3, 9):
        pace.update(second, second, 1600 + 100 * (second - 2), 16.0 + second - 2, 1)
    assert (pace.rate, pace.samples) == (pytest.approx(800), 8)


def test_few_samples_count_while_more_are_held() -> None:
    pace = Pace()
    pace.update(0.0, 0.0, 0, 0.0, 0)
    pace.update(2.0, 2.0, 1600, 16.0, 16)
    pace.update(4.0, 4.0, 2000, 20.0, 16)
    assert pace.samples == 8 + 0.3 * (2 - 8)


def test_pace_counts_stalls_but_not_idle_time() -> None:
    slowed, rested = Pace(), Pace()
    for pace in (slowed, rested):
        pace.update(0.0, 0.0, 0, 0.0, 0)
    slowed.update(2.0, 1.5, 1500, 1.5, 1)
    rested.update(20.0, 1.5, 1500, 1.5, 1)
    assert (slowed.rate, rested.rate) == (750, 1000)


def test_cache_and_device_counts() -> None:
    class Pipeline:
        cache = EmbeddingCache()

    for _ in range(3):
        Pipeline.cache.get("prompt", "a", lambda: Conditioning({}))
    assert cache_counts(Pipeline()) == {"hits": 2, "misses": 1}
    assert cache_counts(object()) == {}
    assert device_memory("cpu") == {}

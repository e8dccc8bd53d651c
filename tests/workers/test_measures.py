"""What is counted of forward passes, as the histograms that a scrape reads."""

import pytest

from pipelines.cache import EmbeddingCache
from pipelines.seam import Conditioning
from tests.workers.conftest import request
from tests.workers.test_engine import MakeBench
from workers.metrics import Measures, Pace, cache_counts, device_memory


def test_a_histogram_counts_what_is_at_most_so_large() -> None:
    measures = Measures()
    for samples, seconds in ((1, 0.001), (3, 0.2), (40, 60.0)):
        measures.forward(samples, 100, 5, seconds)
    found = measures.describe(1.0)
    assert found["tokens"] == 300
    sizes = dict(map(tuple, found["forward_samples"]["buckets"]))
    assert (sizes[1], sizes[2], sizes[4], sizes[32], sizes[None]) == (1, 1, 2, 2, 3)
    assert found["forward_samples"]["sum"] == 44
    times = dict(map(tuple, found["forward_seconds"]["buckets"]))
    assert (times[0.005], times[0.25], times[30], times[None]) == (1, 2, 2, 3)


def test_every_forward_pass_of_an_engine_is_counted(bench: MakeBench) -> None:
    made = bench()
    made.enqueue(*[request(seed=seed) for seed in range(3)])
    made.run()
    found = made.engine.slots.describe()
    sizes = dict(map(tuple, found["forward_samples"]["buckets"]))
    assert sizes[None] == made.engine.slots.forwards
    assert found["forward_samples"]["sum"] == made.engine.steps == 3 * 4
    assert found["tokens"] == 3 * 4 * 2 * 16


def test_the_pace_follows_what_runs_and_stays_while_nothing_does() -> None:
    pace = Pace()
    pace.take(100.0, 0.0, 0, 0.0, 0)
    assert (pace.rate, pace.samples) == (None, None)
    pace.take(102.0, 2.0, 1000, 8.0, 8)
    assert (pace.rate, pace.samples) == (500, 4)
    pace.take(110.0, 2.0, 1000, 8.0, 0)
    assert (pace.rate, pace.samples) == (500, 4)
    pace.take(111.0, 3.0, 2500, 16.0, 16)
    each, samples = 125 + 0.3 * (1500 / 8 - 125), 4 + 0.3 * 4
    assert (pace.rate, pace.samples) == (each * samples, samples)


def test_the_last_few_of_a_job_do_not_say_how_many_would_go() -> None:
    pace = Pace()
    pace.take(0.0, 0.0, 0, 0.0, 0)
    pace.take(2.0, 2.0, 1600, 16.0, 16)
    for second in range(3, 9):
        pace.take(second, second, 1600 + 100 * (second - 2), 16.0 + second - 2, 1)
    assert (pace.rate, pace.samples) == (pytest.approx(800), 8)


def test_few_that_are_all_there_is_to_run_are_counted_when_more_wait_elsewhere() -> None:
    pace = Pace()
    pace.take(0.0, 0.0, 0, 0.0, 0)
    pace.take(2.0, 2.0, 1600, 16.0, 16)
    pace.take(4.0, 4.0, 2000, 20.0, 16)
    assert pace.samples == 8 + 0.3 * (2 - 8)


def test_what_the_denoiser_stands_still_under_work_slows_the_pace_and_an_idle_time_does_not() -> (
    None
):
    slowed, rested = Pace(), Pace()
    for pace in (slowed, rested):
        pace.take(0.0, 0.0, 0, 0.0, 0)
    slowed.take(2.0, 1.5, 1500, 1.5, 1)
    rested.take(20.0, 1.5, 1500, 1.5, 1)
    assert (slowed.rate, rested.rate) == (750, 1000)


def test_a_cache_and_a_device_that_count_are_asked() -> None:
    class Pipeline:
        cache = EmbeddingCache()

    for _ in range(3):
        Pipeline.cache.get("prompt", "a", lambda: Conditioning({}))
    assert cache_counts(Pipeline()) == {"hits": 2, "misses": 1}
    assert cache_counts(object()) == {}
    assert device_memory("cpu") == {}

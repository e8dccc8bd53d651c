"""The engine over a fake pipeline: which samples run together, and what failures affect."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

import pytest

from jobs.errors import GroupLost, ImageFailed, OutOfMemory
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from tests.waiting import PATIENCE
from tests.workers.conftest import Bench, request
from workers.scheduler import Costs

MakeBench = Callable[..., Bench]


def test_samples_of_different_steps_share_forward_passes(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(*(request(seed=i, steps=steps) for i, steps in enumerate((2, 5, 3))))
    engine.run()
    assert len(engine.delivered) == 3
    assert len(engine.pipeline.calls) < 2 + 5 + 3
    assert sum(len(call) for call in engine.pipeline.calls) == 2 + 5 + 3


def test_request_joins_running_ones(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(request(seed=1, steps=6))
    late = request(seed=2, steps=2)
    step = engine.pipeline.step

    def step_and_arrive(*args: object, **kwargs: object) -> None:
        step(*args, **kwargs)  # type: ignore[arg-type]
        if len(engine.pipeline.calls) == 2:
            engine.enqueue(late)

    engine.pipeline.step = step_and_arrive  # type: ignore[method-assign, assignment]
    engine.run()
    assert len(engine.delivered) == 2
    assert any(sorted(call) == [1, 2] for call in engine.pipeline.calls[2:])
    assert len(engine.pipeline.calls) < 8


def test_cancelled_sample_leaves_at_next_step(bench: MakeBench) -> None:
    engine = bench()
    [other, cancelled] = engine.enqueue(request(seed=1, steps=8), request(seed=2, steps=8))
    step = engine.pipeline.step

    def step_and_cancel(*args: object, **kwargs: object) -> None:
        step(*args, **kwargs)  # type: ignore[arg-type]
        if len(engine.pipeline.calls) == 3:
            cancelled.drop()

    engine.pipeline.step = step_and_cancel  # type: ignore[method-assign, assignment]
    engine.run()
    assert engine.delivered == [other]
    assert sum(2 in call for call in engine.pipeline.calls) == 3
    assert engine.flights.all() == [other]


@pytest.mark.parametrize("poison", ["[raise]", "[nan]", "[oom:0]", "[refuse]"])
def test_poisonous_request_fails_alone(bench: MakeBench, poison: str) -> None:
    engine = bench()
    others = [request(f"fine {i}", seed=i) for i in range(3)]
    engine.enqueue(*others[:2], request(poison, seed=9), *others[2:])
    engine.run()
    assert list(engine.failed) == [poison]
    assert {f.lease.request.prompt for f in engine.delivered} == {r.prompt for r in others}
    assert all(f.sample is not None and f.sample.step == 4 for f in engine.delivered)


def test_out_of_memory_halves_the_batch(bench: MakeBench) -> None:
    engine = bench(largest_batch=3)
    engine.enqueue(*(request(seed=i) for i in range(8)))
    engine.run()
    assert len(engine.delivered) == 8
    assert not engine.failed
    assert [len(call) for call in engine.pipeline.calls[:3]] == [8, 4, 2]
    assert max(len(call) for call in engine.pipeline.calls[2:]) == 2


def test_out_of_memory_halves_the_bucket(bench: MakeBench) -> None:
    """Even if the padded batch held only a few samples."""
    engine = bench(largest_batch=16)
    engine.enqueue(*(request(seed=i, reproducible=True) for i in range(3)))
    engine.run()
    assert {flight.bucket for flight in engine.delivered} == {16}
    assert engine.costs.pinned(2 * 16) == 32


def test_reproducible_sample_restarts_in_a_smaller_bucket(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(request("a cat", seed=1, steps=6, reproducible=True))
    step = engine.pipeline.step

    def step_and_run_out(samples: Sequence[Sample], bucket: int = 0) -> None:
        if len(engine.pipeline.calls) == 3:
            engine.pipeline.largest_batch = 8
        step(samples, bucket)
        buckets.append(bucket)

    buckets: list[int] = []
    engine.pipeline.step = step_and_run_out  # type: ignore[method-assign]
    engine.run()
    [image] = engine.delivered
    assert image.bucket == 8
    assert image.sample is not None
    assert buckets[-6:] == [8] * 6
    assert image.sample.steps == image.sample.step == 6


def test_reproducible_sample_goes_on_in_a_bucket_that_gives_the_same_bits(
    bench: MakeBench,
) -> None:
    engine = bench(largest_batch=4)
    images = [request(seed=seed, steps=6, reproducible=True) for seed in range(5)]
    group = engine.pipeline.batch_key(images[0])
    engine = bench(costs=replace(engine.costs, same_bits={repr(group): 16}), largest_batch=4)
    engine.enqueue(*images)
    engine.run()
    assert len(engine.delivered) == 5
    assert {flight.bucket for flight in engine.delivered} == {1}
    steps = [seed for call in engine.pipeline.calls for seed in call]
    # A pass that ran out of memory was repeated in halves, but no image started again.
    assert len(engine.pipeline.calls[0]) == 5
    assert sum(map(len, engine.pipeline.calls[1:])) == len(steps) - 5 == 5 * 6


@pytest.mark.parametrize("error", [IndexError, KeyError, AttributeError, AssertionError])
def test_any_error_of_one_request_spares_the_others(
    bench: MakeBench, error: type[Exception]
) -> None:
    engine = bench()
    step = engine.pipeline.step

    def step_or_raise(samples: Sequence[Sample], bucket: int = 0) -> None:
        if any(sample.request.prompt == "poison" for sample in samples):
            raise error("beyond its end")
        step(samples, bucket)

    engine.pipeline.step = step_or_raise  # type: ignore[method-assign]
    engine.enqueue(request("fine", seed=1), request("poison", seed=2))
    engine.run()
    assert list(engine.failed) == ["poison"]
    assert [flight.lease.request.prompt for flight in engine.delivered] == ["fine"]


def test_one_huge_image_does_not_lower_capacity(bench: MakeBench) -> None:
    engine = bench()
    usual = engine.engine.capacity()
    capacities = []
    step = engine.pipeline.step

    def step_and_look(samples: Sequence[Sample], bucket: int = 0) -> None:
        capacities.append(engine.engine.capacity())
        step(samples, bucket)

    engine.pipeline.step = step_and_look  # type: ignore[method-assign]
    engine.enqueue(*(request(seed=i) for i in range(4)), request(seed=9, width=1024, height=1024))
    engine.run()
    assert capacities[0] == usual


def test_image_too_large_for_memory_fails_with_clear_error(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(request("[oom:0]", reproducible=True))
    engine.run()
    [error] = engine.failed.values()
    assert isinstance(error, ImageFailed)
    assert "memory" in str(error)


def test_reproducible_samples_always_use_the_pinned_bucket(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(*(request(seed=i, reproducible=i % 2 == 0, steps=3 + i) for i in range(6)))
    engine.run()
    pinned = engine.costs.pinned(2 * 16)
    buckets = {f.bucket for f in engine.delivered if f.lease.request.reproducible}
    assert buckets == {pinned}


def test_preview_is_shown_once_per_request(bench: MakeBench) -> None:
    engine = bench()
    [wished, _] = engine.enqueue(request(seed=1, steps=8), request(seed=2, steps=8))
    wished.wished = True
    engine.run()
    assert engine.shown == [1]
    assert len(engine.delivered) == 2
    assert len(engine.pipeline.calls) == 8


class Crowded(FakePipeline):
    """A fake with three concurrent forward passes; `most` is the highest number seen."""

    def __init__(self) -> None:
        super().__init__(in_flight=3, seconds_per_step=0.002)
        self.most = 0
        self._now: list[set[int]] = []
        self._lock = threading.Lock()

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        seeds = {sample.request.seed for sample in samples}
        with self._lock:
            assert not any(seeds & other for other in self._now), "a sample is in two passes"
            self._now.append(seeds)
            self.most = max(self.most, len(self._now))
        try:
            super().step(samples, bucket)
        finally:
            with self._lock:
                self._now.remove(seeds)


def test_all_slots_are_used() -> None:
    pipeline = Crowded()
    engine = Bench(pipeline)
    engine.enqueue(*(request(seed=i, steps=8) for i in range(6)))
    engine.run()
    assert len(engine.delivered) == 6
    assert all(f.sample is not None and f.sample.step == 8 for f in engine.delivered)
    assert pipeline.most == 3
    assert {len(call) for call in pipeline.calls} <= {1, 2}


def test_late_image_runs_after_on_time_one() -> None:
    engine = Bench(FakePipeline(), costs=Costs(((32, 1.0), (64, 2.0), (128, 4.0))))
    old, new = engine.enqueue(request("old", seed=1, steps=4), request("new", seed=2, steps=6))
    old.lease = replace(old.lease, age=100.0)
    engine.run()
    assert engine.delivered == [new, old]
    assert engine.pipeline.calls == [[2]] * 6 + [[1]] * 4


@pytest.mark.parametrize("poison", ["[raise]", "[nan]", "[oom:0]", "[refuse]"])
def test_poisonous_request_fails_alone_in_concurrent_passes(poison: str) -> None:
    engine = Bench(Crowded())
    others = [request(f"fine {i}", seed=i) for i in range(5)]
    engine.enqueue(*others[:2], request(poison, seed=9), *others[2:])
    engine.run()
    assert list(engine.failed) == [poison]
    assert {f.lease.request.prompt for f in engine.delivered} == {r.prompt for r in others}
    assert all(f.sample is not None and f.sample.step == 4 for f in engine.delivered)


def test_sample_without_memory_is_retried_alone() -> None:
    engine = Bench(Crowded())
    step, seen = engine.pipeline.step, []

    def step_with_little_memory(samples: Sequence[Sample], bucket: int = 0) -> None:
        if samples[0].request.seed == 9 and len(engine.engine._passes) > 1:
            seen.append(len(samples))
            raise OutOfMemory("other passes hold it")
        step(samples, bucket)

    engine.pipeline.step = step_with_little_memory  # type: ignore[method-assign]
    others = [request(f"fine {i}", seed=i, width=128) for i in range(4)]
    engine.enqueue(request("large", seed=9), *others)
    engine.run()
    assert seen
    assert not engine.failed
    assert len(engine.delivered) == 5


def test_retry_alone_even_if_other_passes_ended_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def all_done(passes: Sequence["Future[None]"], seconds: float) -> list["Future[None]"]:
        wait(passes)
        return sorted(passes, key=lambda future: future.exception() is not None)

    monkeypatch.setattr("workers.engine.first_done", all_done)
    engine = Bench(Crowded())
    step, together, tried = engine.pipeline.step, threading.Barrier(2), set[int]()

    def step_with_little_memory(samples: Sequence[Sample], bucket: int = 0) -> None:
        seed = samples[0].request.seed
        if seed not in tried:
            tried.add(seed)
            together.wait(PATIENCE)
            if seed == 9:
                raise OutOfMemory("the other pass holds it")
        step(samples, bucket)

    engine.pipeline.step = step_with_little_memory  # type: ignore[method-assign]
    engine.enqueue(request("large", seed=9), request("fine", seed=1, width=128))
    engine.run()
    assert tried == {1, 9}
    assert not engine.failed
    assert len(engine.delivered) == 2


def test_sample_cancelled_during_its_pass_leaves_after_it() -> None:
    engine = Bench(Crowded())
    [other, cancelled] = engine.enqueue(request(seed=1, steps=8), request(seed=2, steps=8))
    step = engine.pipeline.step

    def step_and_cancel(samples: Sequence[Sample], bucket: int = 0) -> None:
        if samples[0].request.seed == 2 and samples[0].step == 3:
            cancelled.drop()
        step(samples, bucket)

    engine.pipeline.step = step_and_cancel  # type: ignore[method-assign]
    engine.run()
    assert engine.delivered == [other]
    assert cancelled.step == 4
    assert engine.flights.all() == [other]


def test_group_lost_while_idle_ends_the_engine() -> None:
    engine = Bench(FakePipeline())

    def check() -> None:
        raise GroupLost("rank 1 is gone")

    engine.pipeline.check = check  # type: ignore[method-assign]
    with pytest.raises(GroupLost):
        engine.run()
    assert not engine.engine.suspects


@pytest.mark.parametrize("in_flight", [1, 2])
def test_lost_group_ends_the_engine_without_failing_images(in_flight: int) -> None:
    engine = Bench(FakePipeline(in_flight=in_flight))

    def step(samples: Sequence[Sample], bucket: int = 0) -> None:
        raise GroupLost("rank 1 is gone")

    engine.pipeline.step = step  # type: ignore[method-assign]
    engine.enqueue(request(seed=1), request(seed=2))
    with pytest.raises(GroupLost):
        engine.run()
    assert not engine.failed
    assert len(engine.flights) == 2
    assert {f.lease.request.seed for f in engine.engine.suspects} == {1, 2}

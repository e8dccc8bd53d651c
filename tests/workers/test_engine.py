"""The engine over a fake pipeline: who runs together, and what failures do to neighbours."""

from collections.abc import Callable

import pytest

from jobs.errors import ImageFailed
from tests.workers.conftest import Bench, request

MakeBench = Callable[..., Bench]


def test_samples_of_different_steps_share_forward_passes(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(*(request(seed=i, steps=steps) for i, steps in enumerate((2, 5, 3))))
    engine.run()
    assert len(engine.delivered) == 3
    assert len(engine.pipeline.calls) < 2 + 5 + 3
    assert sum(len(call) for call in engine.pipeline.calls) == 2 + 5 + 3


def test_a_request_joins_while_others_run(bench: MakeBench) -> None:
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


def test_a_cancelled_sample_leaves_at_the_next_step(bench: MakeBench) -> None:
    engine = bench()
    [kept, gone] = engine.enqueue(request(seed=1, steps=8), request(seed=2, steps=8))
    step = engine.pipeline.step

    def step_and_cancel(*args: object, **kwargs: object) -> None:
        step(*args, **kwargs)  # type: ignore[arg-type]
        if len(engine.pipeline.calls) == 3:
            gone.drop()

    engine.pipeline.step = step_and_cancel  # type: ignore[method-assign, assignment]
    engine.run()
    assert engine.delivered == [kept]
    assert sum(2 in call for call in engine.pipeline.calls) == 3
    assert engine.flights.all() == [kept]


@pytest.mark.parametrize("poison", ["[raise]", "[nan]", "[oom:0]", "[refuse]"])
def test_a_poisonous_request_fails_alone(bench: MakeBench, poison: str) -> None:
    engine = bench()
    neighbours = [request(f"fine {i}", seed=i) for i in range(3)]
    engine.enqueue(*neighbours[:2], request(poison, seed=9), *neighbours[2:])
    engine.run()
    assert list(engine.failed) == [poison]
    assert {f.lease.request.prompt for f in engine.delivered} == {r.prompt for r in neighbours}
    assert all(f.sample is not None and f.sample.step == 4 for f in engine.delivered)


def test_out_of_memory_halves_the_batch_and_goes_on(bench: MakeBench) -> None:
    engine = bench(largest_batch=3)
    engine.enqueue(*(request(seed=i) for i in range(8)))
    engine.run()
    assert len(engine.delivered) == 8
    assert not engine.failed
    assert [len(call) for call in engine.pipeline.calls[:3]] == [8, 4, 2]
    assert max(len(call) for call in engine.pipeline.calls[2:]) == 2


def test_what_does_not_fit_alone_fails_with_a_clear_error(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(request("[oom:0]", reproducible=True))
    engine.run()
    [error] = engine.failed.values()
    assert isinstance(error, ImageFailed)
    assert "memory" in str(error)


def test_reproducible_samples_always_run_in_one_bucket(bench: MakeBench) -> None:
    engine = bench()
    engine.enqueue(*(request(seed=i, reproducible=i % 2 == 0, steps=3 + i) for i in range(6)))
    engine.run()
    pinned = engine.costs.pinned(2 * 16)
    buckets = {f.bucket for f in engine.delivered if f.lease.request.reproducible}
    assert buckets == {pinned}


def test_a_preview_is_shown_once_a_wish_and_nobody_else_notices(bench: MakeBench) -> None:
    engine = bench()
    [wished, _] = engine.enqueue(request(seed=1, steps=8), request(seed=2, steps=8))
    wished.wished = True
    engine.run()
    assert engine.shown == [1]
    assert len(engine.delivered) == 2
    assert len(engine.pipeline.calls) == 8

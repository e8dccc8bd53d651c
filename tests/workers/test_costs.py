"""Costs learned from real passes: noise is ignored, buckets are tried, restarts keep them."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.reports import Buckets
from workers.costs import (
    ENOUGH,
    MOST_POINTS,
    STALE,
    TRY_EVERY,
    WINDOW,
    Keeper,
    Learner,
    Stopwatch,
    read_learned,
)
from workers.scheduler import BUCKETS, Costs

TOKENS = 64


def true_seconds(bucket: int) -> float:
    """A device on which batches up to 8 pay."""
    return 0.02 + 0.005 * max(0, bucket - 1) + 0.02 * max(0, bucket - 8)


QUIET = Costs(tuple((TOKENS * b, true_seconds(b)) for b in BUCKETS))
BUSY = Costs(((64, 0.026), (128, 0.115), (256, 0.13), (512, 0.31), (1024, 0.9), (2048, 2.2)))
"""The same device as measured on a busy machine."""


def serve(learner: Learner, passes: int, seed: int, waiting: int = 32) -> None:
    """Run this many fast passes on a noisy device, as the engine does."""
    noise = random.Random(seed)
    for _ in range(passes):
        knee = learner.costs.largest(TOKENS)
        bucket = learner.trial(TOKENS, knee, waiting) or min(knee, waiting)
        slowdown = 1 + (noise.expovariate(1) if noise.random() < 0.7 else 0.0)
        learner.observe(TOKENS, bucket, true_seconds(bucket) * slowdown)


@pytest.mark.parametrize("seed", range(5))
def test_busy_profile_converges_to_quiet_one(seed: int) -> None:
    busy, quiet = Learner(BUSY, TOKENS), Learner(QUIET, TOKENS)
    assert busy.costs.largest(TOKENS) != quiet.costs.largest(TOKENS)
    for learner in (busy, quiet):
        serve(learner, 1500, seed)
    assert busy.costs.largest(TOKENS) == quiet.costs.largest(TOKENS) == 8


def test_learning_keeps_which_batches_give_the_same_bits() -> None:
    learner = Learner(replace(BUSY, same_bits={"64x64": 8}), TOKENS)
    serve(learner, 1500, seed=1)
    assert learner.costs.exact
    assert learner.costs.same_bits == {"64x64": 8}


def test_learning_never_moves_the_pinned_bucket() -> None:
    learner = Learner(BUSY, TOKENS)
    serve(learner, 1500, seed=1)
    assert learner.costs.pinned(TOKENS) == BUSY.pinned(TOKENS) == 1
    assert learner.buckets() == Buckets(pinned=1, largest=8)


def test_fastest_pass_counts() -> None:
    learner = Learner(QUIET, TOKENS)
    for seconds in (5.0, 0.03, 9.0, 7.0):
        assert learner.costs.of(TOKENS, 4) == true_seconds(4)
        learner.observe(TOKENS, 4, seconds)
    assert learner.costs.of(TOKENS, 4) == 0.03


def test_lasting_slowdown_is_learned() -> None:
    learner = Learner(QUIET, TOKENS)
    for _ in range(ENOUGH):
        learner.observe(TOKENS, 1, 0.02)
    for passes in range(2 * WINDOW - ENOUGH):
        assert learner.costs.of(TOKENS, 1) == 0.02, passes
        learner.observe(TOKENS, 1, 0.05)
    learner.observe(TOKENS, 1, 0.05)
    assert learner.costs.of(TOKENS, 1) == 0.05


def test_trials_are_limited_and_end_once_cost_is_known() -> None:
    learner = Learner(QUIET, TOKENS)
    tried = []
    for number in range(STALE):
        if bucket := learner.trial(TOKENS, 8, 32):
            tried.append(number)
        learner.observe(TOKENS, bucket or 8, true_seconds(bucket or 8))
    assert len(tried) == ENOUGH
    assert all(b - a >= TRY_EVERY for a, b in pairwise(tried))
    for _ in range(STALE):
        learner.observe(TOKENS, 8, true_seconds(8))
    assert learner.trial(TOKENS, 8, 32) == 16


@pytest.mark.parametrize(("knee", "most"), [(32, 64), (8, 15)])
def test_no_trial_beyond_measured_or_waiting(knee: int, most: int) -> None:
    learner = Learner(QUIET, TOKENS)
    for _ in range(TRY_EVERY):
        learner.observe(TOKENS, 1, 1.0)
    assert learner.trial(TOKENS, knee, most) is None
    assert learner.trial(2 * TOKENS, 16, 64) is None


def test_costs_stay_without_learning() -> None:
    learner = Learner(QUIET, TOKENS, learns=False)
    serve(learner, 100, seed=1)
    assert learner.costs.exact == {}
    assert learner.measured() == []


def test_number_of_learned_sizes_is_limited() -> None:
    learner = Learner(QUIET, TOKENS)
    for tokens in range(1, 2 * MOST_POINTS):
        for _ in range(ENOUGH):
            learner.observe(tokens, 1, 1.0)
    assert len(learner.measured()) == MOST_POINTS


def test_restart_keeps_learned_costs(tmp_path: Path) -> None:
    path = tmp_path / "fake.learned.json"
    keeper = Keeper(Learner(BUSY, TOKENS), path)
    serve(keeper.learner, 1500, seed=1)
    keeper.write()
    exact = read_learned(path)
    assert exact == {(t, b): s for t, b, s in keeper.learner.measured()}
    again = Learner(Costs(BUSY.points, exact, BUSY.points), TOKENS)
    assert again.costs.largest(TOKENS) == 8
    assert again.measured() == keeper.learner.measured()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"measured": [[1]]}', '{"measured": [["a",1,1]]}']
)
def test_damaged_file_is_ignored(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fake.learned.json"
    path.write_text(text)
    assert read_learned(path) == {}
    assert read_learned(tmp_path / "absent") == {}


def test_failed_write_is_not_fatal(tmp_path: Path) -> None:
    keeper = Keeper(Learner(QUIET, TOKENS), tmp_path / "no such folder" / "learned.json")
    serve(keeper.learner, 10, seed=1)
    keeper.stop()
    assert list(tmp_path.iterdir()) == []


def test_stopwatch_excludes_waiting_for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 10.0, "delay": 1.0}
    monkeypatch.setattr("workers.costs.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("workers.costs._run_delay", lambda: clock["delay"])
    here, elsewhere = Stopwatch(on_cpu=True), Stopwatch(on_cpu=False)
    clock.update(wall=12.0, delay=2.5)
    assert here.seconds() == pytest.approx(0.5)
    assert elsewhere.seconds() == pytest.approx(2.0)


def test_delay_while_reading_stopwatch_never_shortens_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each reading of either clock is followed by a wait for a processor."""
    clock = {"wall": 10.0, "delay": 1.0}

    def read(name: str) -> float:
        value = clock[name]
        clock.update(wall=clock["wall"] + 5.0, delay=clock["delay"] + 5.0)
        return value

    monkeypatch.setattr("workers.costs.time.perf_counter", lambda: read("wall"))
    monkeypatch.setattr("workers.costs._run_delay", lambda: read("delay"))
    stopwatch = Stopwatch(on_cpu=True)
    clock["wall"] += 0.5
    assert stopwatch.seconds() >= 0.5

"""Costs learned from real passes: noise is left out, buckets are tried, and a restart has them."""

import random
from itertools import pairwise
from pathlib import Path

import pytest

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
    """A device on which batches pay up to 8."""
    return 0.02 + 0.005 * max(0, bucket - 1) + 0.02 * max(0, bucket - 8)


QUIET = Costs(tuple((TOKENS * b, true_seconds(b)) for b in BUCKETS))
BUSY = Costs(((64, 0.026), (128, 0.115), (256, 0.13), (512, 0.31), (1024, 0.9), (2048, 2.2)))
"""As a busy machine might have measured the same device."""


def serve(learner: Learner, passes: int, seed: int, waiting: int = 32) -> None:
    """Run so many fast passes over a noisy device, as the engine does."""
    noise = random.Random(seed)
    for _ in range(passes):
        knee = learner.costs.largest(TOKENS)
        bucket = learner.trial(TOKENS, knee, waiting) or min(knee, waiting)
        slowdown = 1 + (noise.expovariate(1) if noise.random() < 0.7 else 0.0)
        learner.observe(TOKENS, bucket, true_seconds(bucket) * slowdown)


@pytest.mark.parametrize("seed", range(5))
def test_a_profile_of_a_busy_machine_converges_to_that_of_a_quiet_one(seed: int) -> None:
    busy, quiet = Learner(BUSY, TOKENS), Learner(QUIET, TOKENS)
    assert busy.costs.largest(TOKENS) != quiet.costs.largest(TOKENS)
    for learner in (busy, quiet):
        serve(learner, 1500, seed)
    assert busy.costs.largest(TOKENS) == quiet.costs.largest(TOKENS) == 8


def test_what_is_learned_never_moves_the_pinned_bucket() -> None:
    learner = Learner(BUSY, TOKENS)
    serve(learner, 1500, seed=1)
    assert learner.costs.pinned(TOKENS) == BUSY.pinned(TOKENS) == 1
    assert learner.describe() == {"pinned": 1, "largest": 8}


def test_noise_only_adds_so_the_fastest_counts() -> None:
    learner = Learner(QUIET, TOKENS)
    for seconds in (5.0, 0.03, 9.0, 7.0):
        assert learner.costs.of(TOKENS, 4) == true_seconds(4)
        learner.observe(TOKENS, 4, seconds)
    assert learner.costs.of(TOKENS, 4) == 0.03


def test_a_machine_that_became_slower_is_believed_in_the_end() -> None:
    learner = Learner(QUIET, TOKENS)
    for _ in range(ENOUGH):
        learner.observe(TOKENS, 1, 0.02)
    for passes in range(2 * WINDOW - ENOUGH):
        assert learner.costs.of(TOKENS, 1) == 0.02, passes
        learner.observe(TOKENS, 1, 0.05)
    learner.observe(TOKENS, 1, 0.05)
    assert learner.costs.of(TOKENS, 1) == 0.05


def test_trials_are_bounded_and_end_once_a_bucket_is_known() -> None:
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
def test_nothing_is_tried_beyond_what_was_measured_or_what_waits(knee: int, most: int) -> None:
    learner = Learner(QUIET, TOKENS)
    for _ in range(TRY_EVERY):
        learner.observe(TOKENS, 1, 1.0)
    assert learner.trial(TOKENS, knee, most) is None
    assert learner.trial(2 * TOKENS, 16, 64) is None


def test_without_learning_costs_stay() -> None:
    learner = Learner(QUIET, TOKENS, learns=False)
    serve(learner, 100, seed=1)
    assert learner.costs.exact == {}
    assert learner.measured() == []


def test_the_number_of_sizes_that_are_learned_is_bounded() -> None:
    learner = Learner(QUIET, TOKENS)
    for tokens in range(1, 2 * MOST_POINTS):
        for _ in range(ENOUGH):
            learner.observe(tokens, 1, 1.0)
    assert len(learner.measured()) == MOST_POINTS


def test_a_restart_begins_with_what_was_learned(tmp_path: Path) -> None:
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
def test_a_damaged_file_is_learned_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fake.learned.json"
    path.write_text(text)
    assert read_learned(path) == {}
    assert read_learned(tmp_path / "absent") == {}


def test_a_disk_that_refuses_stops_nothing(tmp_path: Path) -> None:
    keeper = Keeper(Learner(QUIET, TOKENS), tmp_path / "no such folder" / "learned.json")
    serve(keeper.learner, 10, seed=1)
    keeper.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_stopwatch_leaves_out_the_wait_for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 10.0, "delay": 1.0}
    monkeypatch.setattr("workers.costs.time.perf_counter", lambda: clock["wall"])
    monkeypatch.setattr("workers.costs._run_delay", lambda: clock["delay"])
    here, elsewhere = Stopwatch(on_cpu=True), Stopwatch(on_cpu=False)
    clock.update(wall=12.0, delay=2.5)
    assert here.seconds() == pytest.approx(0.5)
    assert elsewhere.seconds() == pytest.approx(2.0)


def test_a_wait_while_the_stopwatch_is_read_never_makes_a_pass_look_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every reading of either clock is followed by a wait for a processor."""
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

"""Warm-up measures the cost of batches, stops where they no longer pay, and keeps the result."""

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.catalog import Defaults, Limits, Model
from jobs.errors import GroupLost, ModelUnavailable
from jobs.request import ImageRequest
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from workers import pass_timer, profile
from workers.pass_timer import probe
from workers.scheduler import Costs
from workers.trials import Trials

TOKENS = 2 * 16
"""Rows x tokens of a guided request of the model's default size."""

MODEL = Model("fake", "/nowhere", defaults=Defaults(width=64, height=64, steps=4))


class Clock:
    """Time that passes only while a fake pipeline computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def simulated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes cost what the fake says, on any machine, plus a microsecond."""
    clock = Clock()

    class Stopwatch:
        def __init__(self, *, on_cpu: bool) -> None:
            self._began = clock.now

        def seconds(self) -> float:
            return clock.now - self._began + 1e-6

    defaults = FakePipeline.__init__.__defaults__
    assert defaults is not None and callable(defaults[-1])  # `sleep`, the last argument
    monkeypatch.setattr(FakePipeline.__init__, "__defaults__", (*defaults[:-1], clock.sleep))
    monkeypatch.setattr(pass_timer, "Stopwatch", Stopwatch)


class Proportional(FakePipeline):
    """A fake whose forward pass costs as much as it has pixels."""

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        self.seconds_per_sample = 1e-7 * samples[0].request.pixels
        super().step(samples, bucket)


def test_free_batches_grow_until_out_of_memory() -> None:
    costs = profile.measure(FakePipeline(seconds_per_step=0.002, largest_batch=8), _request())
    assert [tokens // costs.points[0][0] for tokens, _ in costs.points] == [1, 2, 4, 8]
    assert costs.pinned(costs.points[0][0]) >= 4


def test_profile_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline(largest_batch=4)
    first = profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    monkeypatch.setattr(profile, "measure", lambda *_: pytest.fail("measured again"))
    assert profile.warm_up(pipeline, MODEL, "cpu", tmp_path) == first
    assert len(list((tmp_path / "profiles").iterdir())) == 1


def test_one_busy_moment_does_not_stop_measuring() -> None:
    """One bucket is timed at ten times its cost, but larger ones still pay."""

    class Disturbed(FakePipeline):
        def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
            self.seconds_per_step = 0.02 if bucket == 4 else 0.002
            super().step(samples, bucket)

    costs = profile.measure(Disturbed(largest_batch=16), _request())
    assert costs.largest(TOKENS) == 16
    assert costs.seconds(4 * TOKENS) < 0.01


@pytest.mark.parametrize(
    ("seconds", "contradicted"),
    [
        ({1: 1.0, 4: 1.4, 8: 2.4}, False),
        ({1: 1.0, 4: 1.8, 8: 2.4}, False),
        ({1: 1.0, 4: 1.9, 8: 2.4}, True),
        ({1: 1.0, 4: 1.1, 8: 1.3}, False),
        ({1: 1.0, 4: 1.1, 8: 1.1}, True),
        ({1: 1.0, 4: 1.1}, False),
        ({4: 9.0, 8: 9.0}, False),
    ],
)
def test_only_clear_deviations_contradict_the_pinned_bucket(
    seconds: dict[int, float], contradicted: bool
) -> None:
    assert profile.is_contradicted(4, seconds) is contradicted


def wrong_profile(tmp_path: Path, pipeline: FakePipeline) -> Path:
    """Write a profile that pins 1, although every batch costs the same as one sample."""
    profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    [path] = (tmp_path / "profiles").glob("*.json")
    described = json.loads(path.read_text())
    described["points"] = [[tokens, tokens * 1e-3] for tokens, _ in described["points"]]
    path.write_text(json.dumps(described))
    return path


def test_wrong_pinned_bucket_is_remeasured_after_two_starts(tmp_path: Path) -> None:
    pipeline = FakePipeline(seconds_per_step=0.02, largest_batch=8)
    wrong_profile(tmp_path, pipeline)
    pinned = [profile.warm_up(pipeline, MODEL, "cpu", tmp_path).pinned(TOKENS) for _ in range(3)]
    assert pinned == [1, 8, 8]


def test_one_start_does_not_move_the_pinned_bucket(tmp_path: Path) -> None:
    good = FakePipeline(seconds_per_step=0.02, largest_batch=8)
    bad = FakePipeline(seconds_per_sample=0.01, largest_batch=8)
    wrong_profile(tmp_path, good)
    pinned = [
        profile.warm_up(pipeline, MODEL, "cpu", tmp_path).pinned(TOKENS)
        for pipeline in (good, bad, good, bad, good, good)
    ]
    assert pinned == [1, 1, 1, 1, 1, 8]


def test_matching_profile_is_not_rewritten(tmp_path: Path) -> None:
    pipeline = FakePipeline(seconds_per_step=0.02, largest_batch=8)
    profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    [path] = (tmp_path / "profiles").glob("*.json")
    before = path.read_bytes()
    for _ in range(3):
        profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    assert path.read_bytes() == before


def test_learned_costs_survive_a_restart_but_never_pin(tmp_path: Path) -> None:
    pipeline = FakePipeline(seconds_per_step=0.02, largest_batch=8)
    costs = profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    keeper = profile.keeper(pipeline, MODEL, "cpu", tmp_path, costs)
    for _ in range(8):
        keeper.learner.observe(TOKENS, 4, 0.001)
    keeper.stop()
    again = profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    assert again.of(TOKENS, 4) == 0.001
    assert again.largest(TOKENS) == 4
    assert again.pinned(TOKENS) == costs.pinned(TOKENS) == 8
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def test_nothing_is_learned_with_a_feature_cache(tmp_path: Path) -> None:
    model = replace(MODEL, cache="taylorseer")
    keeper = profile.keeper(FakePipeline(), model, "cpu", tmp_path, Costs(((32, 1.0),)))
    for _ in range(8):
        keeper.learner.observe(TOKENS, 1, 0.001)
    assert keeper.learner.costs.exact == {}


def test_buckets_are_timed_in_turn() -> None:
    """Buckets measured during a busy spell are measured again in turn with the others."""

    class Busy(FakePipeline):
        def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
            self.seconds_per_step = 0.2 if bucket > 2 and len(self.calls) < 34 else 0.01
            super().step(samples, bucket)

    quiet = FakePipeline(seconds_per_step=0.01, largest_batch=8)
    busy = Busy(largest_batch=8)
    assert profile.measure(busy, _request()).pinned(TOKENS) == 8
    assert profile.measure(quiet, _request()).pinned(TOKENS) == 8


def test_concurrent_measurements_use_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a reproducible image's bits would depend on the worker that made it."""
    pipeline, measure = FakePipeline(largest_batch=4), profile.measure

    def measure_beside_another(*args: object) -> Costs:
        monkeypatch.setattr(profile, "measure", measure)
        found.append(profile.warm_up(pipeline, MODEL, "cpu", tmp_path))
        return Costs(((1, 1.0),))

    found: list[Costs] = []
    monkeypatch.setattr(profile, "measure", measure_beside_another)
    assert [profile.warm_up(pipeline, MODEL, "cpu", tmp_path)] == found


def test_smaller_size_is_not_padded(tmp_path: Path) -> None:
    """A batch of n costs n times as much here, also at sizes below the default."""
    pipeline = Proportional()
    model = replace(MODEL, defaults=Defaults(width=256, height=256, steps=4))
    costs = profile.warm_up(pipeline, model, "cpu", tmp_path)
    grid = pipeline.card.multiple
    for side in (64, 128, 256):
        assert costs.pinned(2 * (side // grid) ** 2) <= 2


def test_every_start_runs_the_buckets_in_use(tmp_path: Path) -> None:
    model = replace(MODEL, limits=Limits(sizes=((64, 64), (128, 64))))
    profile.warm_up(FakePipeline(largest_batch=4), model, "cpu", tmp_path)
    restarted = FakePipeline(largest_batch=4)
    costs = profile.warm_up(restarted, model, "cpu", tmp_path)
    tokens = 2 * (64 // restarted.card.multiple) ** 2
    run = {len(call) for call in restarted.calls}
    assert {1, costs.pinned(tokens), costs.largest(tokens)} <= run


def test_pipeline_without_batches_serves_one_by_one(tmp_path: Path) -> None:
    class Lone(FakePipeline):
        def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
            if max(bucket, len(samples)) > 1:
                raise ValueError("one prompt a call")
            super().step(samples, bucket)

    costs = profile.warm_up(Lone(), MODEL, "cpu", tmp_path)
    assert (costs.pinned(TOKENS), costs.largest(TOKENS)) == (1, 1)


class Whole(FakePipeline):
    """A fake that's called whole, accepts only `exactly` this many steps, and rewrites sizes."""

    def __init__(self, exactly: int | None = None, smallest: int = 0) -> None:
        super().__init__()
        self.exactly, self.smallest = exactly, smallest
        self.asked: list[tuple[int, int]] = []
        self.card = replace(self.card, joins=False)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        request = samples[0].request
        self.asked.append((request.width, request.steps))
        if self.exactly not in (None, request.steps):
            raise ValueError(f"takes exactly {self.exactly} steps")
        for sample in samples:
            sample.step = sample.steps
            if request.width < self.smallest:
                sample.error = "makes 64x64 pixels"
                side = self.smallest
                self.card = replace(self.card, sizes=((side, side),))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_model_with_a_fixed_number_of_steps_starts(tmp_path: Path, steps: int) -> None:
    model = replace(MODEL, defaults=replace(MODEL.defaults, steps=steps))
    pipeline = Whole(exactly=steps)
    assert profile.warm_up(pipeline, model, "cpu", tmp_path).points
    assert (64, steps) in pipeline.asked


def test_rewritten_sizes_are_detected_at_every_start(tmp_path: Path) -> None:
    for _ in range(2):
        pipeline = Whole(smallest=64)
        costs = profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
        assert pipeline.card.sizes == ((64, 64),)
        assert min(tokens for tokens, _ in costs.points) == TOKENS


def test_rewritten_default_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="model 'fake': its defaults fail: makes 64x64"):
        profile.warm_up(Whole(smallest=128), MODEL, "cpu", tmp_path)


class Mortal(FakePipeline):
    """A fake group that dies in a forward pass with the bucket `fatal`."""

    def __init__(self, fatal: int | None, pixels: int = 64 * 64) -> None:
        super().__init__()
        self.fatal, self.pixels = fatal, pixels

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        if self.fatal == bucket and samples[0].request.pixels == self.pixels:
            raise GroupLost("rank 1 failed: OutOfMemoryError")
        super().step(samples, bucket)


def die(pipeline: Mortal, model: Model, data: Path) -> None:
    with pytest.raises(GroupLost):
        profile.warm_up(pipeline, model, "cpu", data)


def test_deadly_bucket_is_skipped(tmp_path: Path) -> None:
    die(Mortal(fatal=4), MODEL, tmp_path)
    die(Mortal(fatal=4), MODEL, tmp_path)
    for _ in range(2):
        costs = profile.warm_up(Mortal(fatal=4), MODEL, "cpu", tmp_path)
        assert costs.points[-1][0] == 2 * TOKENS


def test_worker_with_a_profile_starts_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    costs = profile.warm_up(FakePipeline(largest_batch=2), MODEL, "cpu", tmp_path)
    monkeypatch.setattr(Path, "write_text", full)
    assert profile.warm_up(FakePipeline(largest_batch=2), MODEL, "cpu", tmp_path) == costs


def test_one_death_is_not_enough(tmp_path: Path) -> None:
    die(Mortal(fatal=4), MODEL, tmp_path)
    costs = profile.warm_up(Mortal(fatal=None), MODEL, "cpu", tmp_path)
    assert costs.points[-1][0] > 4 * TOKENS
    assert [path.suffix for path in (tmp_path / "profiles").iterdir()] == [".json"]


def test_simultaneous_deaths_count_once(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "fake.json"
    for trials in [Trials(path) for _ in range(8)]:
        with pytest.raises(GroupLost), trials.trying(_request(), 4):
            raise GroupLost("the machine went down")
    assert not Trials(path).is_deadly(_request(), 4)


def test_deadly_listed_size_is_skipped(tmp_path: Path) -> None:
    model = replace(MODEL, limits=Limits(sizes=((64, 64), (512, 512))))
    for _ in range(2):
        die(Mortal(fatal=1, pixels=512 * 512), model, tmp_path)
    assert profile.warm_up(Mortal(fatal=1, pixels=512 * 512), model, "cpu", tmp_path).points


def test_timing_synchronises_the_pipelines_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    monkeypatch.setattr(pass_timer.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(pass_timer.torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(profile, "_device_name", lambda device: device)
    profile.warm_up(FakePipeline(largest_batch=1), MODEL, "cuda:3", tmp_path)
    assert set(waited) == {"cuda:3"}


def test_every_listed_size_is_run(tmp_path: Path) -> None:
    """Both are larger than the default, so only the rehearsal runs them."""
    run: set[tuple[int, int]] = set()

    class Watched(FakePipeline):
        def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
            run.add((samples[0].request.width, samples[0].request.height))
            super().step(samples, bucket)

    sizes = ((128, 64), (64, 128))
    model = replace(MODEL, limits=Limits(sizes=sizes))
    profile.warm_up(Watched(largest_batch=2), model, "cpu", tmp_path)
    assert run == {(64, 64), *sizes}


@pytest.mark.parametrize(
    "change",
    [
        {"compile": True},
        {"cuda_graphs": True},
        {"quantization": "int8"},
        {"attention_backend": "native"},
        {"cache": "taylorseer"},
        {"ulysses": 2},
        {"stages": 2},
    ],
)
def test_speed_options_change_the_fingerprint(tmp_path: Path, change: dict[str, object]) -> None:
    for model in (MODEL, replace(MODEL, **change)):
        profile.warm_up(FakePipeline(largest_batch=2), model, "cpu", tmp_path)
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def test_precision_changes_the_fingerprint(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = replace(MODEL, dtype=dtype)
        profile.warm_up(FakePipeline(largest_batch=2), model, "cpu", tmp_path)
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def _request() -> ImageRequest:
    return probe(MODEL)

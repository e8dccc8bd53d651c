"""Warm-up measures what a batch costs, stops where it no longer pays, and keeps the answer."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.catalog import Defaults, Model
from jobs.request import ImageRequest
from pipelines.fake import FakePipeline
from workers import profile

MODEL = Model("fake", "/nowhere", defaults=Defaults(width=64, height=64, steps=4))


def test_a_batch_that_costs_nothing_grows_until_memory_ends() -> None:
    costs = profile.measure(FakePipeline(seconds_per_step=0.002, largest_batch=8), _request())
    assert [tokens // costs.points[0][0] for tokens, _ in costs.points] == [1, 2, 4, 8]
    assert costs.pinned(costs.points[0][0]) >= 4


def test_the_answer_is_kept_on_disk_and_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = FakePipeline(largest_batch=4)
    first = profile.warm_up(pipeline, MODEL, "cpu", tmp_path)
    monkeypatch.setattr(profile, "measure", lambda *_: pytest.fail("measured again"))
    assert profile.warm_up(pipeline, MODEL, "cpu", tmp_path) == first
    assert len(list((tmp_path / "profiles").iterdir())) == 1


def test_another_precision_is_another_measurement(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = replace(MODEL, dtype=dtype)
        profile.warm_up(FakePipeline(largest_batch=2), model, "cpu", tmp_path)
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def _request() -> ImageRequest:
    return profile.probe(MODEL)

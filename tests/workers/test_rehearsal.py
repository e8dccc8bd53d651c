"""Which batch sizes give a sample the bits that it gets alone, compared at warm-up."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.catalog import Defaults, Limits, Model
from jobs.errors import GroupLost
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from workers import profile
from workers.pass_timer import PassTimer, probe
from workers.rehearsal import largest_with_same_bits, rehearse
from workers.scheduler import Costs

MODEL = Model("fake", "/nowhere", defaults=Defaults(width=64, height=64, steps=4))


class Rounding(FakePipeline):
    """A fake whose last bits change in batches larger than `largest`, at one place of the batch."""

    def __init__(self, largest: int, place: int = -1) -> None:
        super().__init__(seconds_per_step=0.001)
        self.largest, self.place = largest, place

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        super().step(samples, bucket)
        if max(len(samples), bucket) > self.largest:
            latents = samples[self.place].latents
            assert latents is not None
            samples[self.place].latents = torch.nextafter(latents, latents + 1)


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize(("largest", "expected"), [(1, 1), (2, 2), (3, 2), (7, 4), (99, 16)])
def test_every_sample_of_every_batch_is_compared(largest: int, expected: int, place: int) -> None:
    assert largest_with_same_bits(Rounding(largest, place), probe(MODEL), 16) == expected


def test_a_failed_sample_is_not_the_same() -> None:
    request = replace(probe(MODEL), prompt="[nan]", steps=1)
    assert largest_with_same_bits(FakePipeline(), request, 16) == 1


def test_batches_that_do_not_fit_end_the_comparison() -> None:
    assert largest_with_same_bits(FakePipeline(largest_batch=5), probe(MODEL), 16) == 4


def test_a_lost_group_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = FakePipeline()

    def lost(*_: object) -> None:
        raise GroupLost("gone")

    monkeypatch.setattr(pipeline, "step", lost)
    with pytest.raises(GroupLost):
        largest_with_same_bits(pipeline, probe(MODEL), 16)


def test_warm_up_compares_the_default_and_every_listed_size(tmp_path: Path) -> None:
    model = replace(MODEL, limits=Limits(sizes=((64, 64), (32, 32))))
    costs = profile.warm_up(Rounding(99), model, "cpu", tmp_path)
    assert costs.same_bits == {"(64, 64, 2)": 32, "(32, 32, 2)": 32}
    pipeline = Rounding(99)
    assert costs.any_up_to(pipeline.batch_key(probe(model))) == 32


def test_batches_below_the_pinned_bucket_do_not_count(tmp_path: Path) -> None:
    costs = profile.warm_up(Rounding(4), MODEL, "cpu", tmp_path)
    assert costs.pinned(2 * 16) > 4
    assert costs.same_bits == {}


def test_nothing_is_compared_with_a_feature_cache(tmp_path: Path) -> None:
    model = replace(MODEL, cache="first_block")
    assert profile.warm_up(Rounding(99), model, "cpu", tmp_path).same_bits == {}


def test_measured_batches_that_do_not_pay_yet_are_compared_too() -> None:
    costs = Costs(((32, 0.01), (64, 0.02), (128, 0.04), (256, 0.08), (512, 1.0), (1024, 9.0)))
    timer = PassTimer(Rounding(99), "cpu", None, on_cpu=True)
    assert costs.largest(32) == 1
    assert rehearse(MODEL, costs, timer) == {"(64, 64, 2)": 16}


def test_nothing_measured_compares_nothing_larger() -> None:
    timer = PassTimer(Rounding(99), "cpu", None, on_cpu=True)
    assert rehearse(MODEL, Costs(()), timer) == {"(64, 64, 2)": 1}

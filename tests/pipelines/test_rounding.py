"""The comparison of pictures accepts rounding, but none of the typical faults of batching."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from pipelines import batch
from pipelines.families import make_family, qwen_image
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.rounding import DRAWS, FACTOR, FLOOR, Reference, rounding_once_more
from tests.pipelines.serving import ask, begin
from tests.pipelines.test_families import CASES

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REQUESTS = [
    ask("a red cat", seed=1, steps=6, guidance_scale=3.5, negative_prompt="ugly"),
    ask("a blue dog running on a beach", seed=2, steps=4, guidance_scale=2.0),
    ask("x", seed=3, steps=8, guidance_scale=7.0, negative_prompt="low quality, blurry"),
]
VICTIM = 1
"""The sample with the fault. Its prompt isn't the longest, so it runs under a mask."""


@pytest.fixture(scope="module", params=["SD15 DDIM", "SD3", "QwenImage"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family, tiny_pipe):
    pipe = tiny_pipe(CASES[family].tiny)
    if CASES[family].scheduler:
        pipe.scheduler = CASES[family].scheduler(pipe.scheduler)
    return pipe


@pytest.fixture(scope="module")
def pipeline(family, pipe):
    return FamilyPipeline(make_family(pipe, CASES[family].length))


@pytest.fixture(scope="module")
def reference(family, pipe):
    return cache(lambda request: CASES[family].reference(pipe, request))


# Faults. Each function is called before every step with all samples.


def guidance_off_by_a_hundredth(samples, monkeypatch):
    request = REQUESTS[VICTIM]
    scale = 1.01 * request.guidance_scale
    samples[VICTIM].request = replace(request, guidance_scale=scale)


def neighbours_prompt(samples, monkeypatch):
    samples[VICTIM].conditioning = samples[0].conditioning


def neighbours_timestep(samples, monkeypatch):
    own = batch.current_timestep
    victim, neighbour = samples[VICTIM], samples[VICTIM - 1]
    if victim.done:
        return

    def mixed_up(rows, guided):
        times = [own(neighbour if row is victim and not neighbour.done else row) for row in rows]
        return torch.stack(times).repeat(2 if guided else 1)

    monkeypatch.setattr(batch, "timesteps", mixed_up)


def a_missing_step(samples, monkeypatch):
    if samples[VICTIM].step == 1:
        samples[VICTIM].step = 2


def latents_in_half_precision(samples, monkeypatch):
    samples[VICTIM].latents = samples[VICTIM].latents.bfloat16().float()


def eta_left_on(samples, monkeypatch):
    scheduler = samples[VICTIM].scheduler
    plain = partial(type(scheduler).step, scheduler)
    scheduler.step = lambda *arguments, **named: plain(*arguments, **named | {"eta": 0.3})


def a_lost_mask(samples, monkeypatch):
    padded = qwen_image._padded_prompts
    monkeypatch.setattr(
        qwen_image, "_padded_prompts", lambda *arguments: (padded(*arguments)[0], None)
    )


FAULTS = (
    guidance_off_by_a_hundredth,
    neighbours_prompt,
    neighbours_timestep,
    a_missing_step,
    latents_in_half_precision,
)
ONLY = {"SD15 DDIM": (eta_left_on,), "QwenImage": (a_lost_mask,)}
"""Faults that only this family can have."""


def misses(pipeline, reference, fault, monkeypatch):
    """How far each picture is from diffusers' own, with all requests served as one batch."""
    samples = [begin(pipeline, request) for request in REQUESTS]
    while running := [sample for sample in samples if not sample.done]:
        with monkeypatch.context() as patch:
            fault(samples, patch)
            pipeline.step(running)
    pairs = zip(REQUESTS, samples, strict=True)
    return [reference(request).miss(pipeline.decode([sample])[0]) for request, sample in pairs]


def test_without_a_fault_every_picture_equals_diffusers(pipeline, reference, monkeypatch):
    assert max(misses(pipeline, reference, lambda *_: None, monkeypatch)) <= 1


def test_every_fault_is_caught(family, pipeline, reference, monkeypatch):
    for fault in (*FAULTS, *ONLY.get(family, ())):
        assert misses(pipeline, reference, fault, monkeypatch)[VICTIM] > 1, fault


def test_a_fault_in_one_sample_does_not_show_in_others(pipeline, reference, monkeypatch):
    seen = misses(pipeline, reference, neighbours_prompt, monkeypatch)
    assert [miss > 1 for miss in seen] == [index == VICTIM for index in range(len(REQUESTS))]


# The tolerance.


def reference_of(layer, value, dtype=None):
    def draw(copies):
        with torch.no_grad():
            return layer(value.repeat(copies, 1)).view(copies, 1, 1, -1)

    return Reference(draw, [layer], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_scales_with_the_unit_in_the_last_place(dtype):
    torch.manual_seed(0)
    layer, value = torch.nn.Linear(64, 64), torch.randn(1, 64)
    unit = torch.finfo(dtype).eps
    allowed = reference_of(layer, value, dtype).allowed - FLOOR
    assert unit / 4 < allowed / FACTOR < 4 * unit


def test_a_picture_unaffected_by_rounding_may_differ_by_a_few_units(monkeypatch):
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = Reference(lambda copies: picture.expand(copies, -1, -1, -1), [])
    assert reference.allowed == FLOOR
    assert reference.miss(picture + FLOOR / 2) <= 1
    assert reference.miss(picture + 2 * FLOOR) > 1
    assert not reference.miss(picture * torch.nan) <= 1


def test_extra_rounding_leaves_no_hooks_behind():
    layer, value = torch.nn.Linear(8, 8), torch.ones(DRAWS, 8)
    before = layer(value)
    with rounding_once_more([layer]):
        moved = layer(value)
        assert not torch.equal(moved, before)
        assert not torch.equal(moved[0], moved[1])  # every row is changed independently
    assert torch.equal(layer(value), before)

"""Requirements for every Pipeline, tested on the fake and on a real Flux."""

from collections.abc import Callable

import pytest
import torch

from jobs.errors import ImageFailed, OutOfMemory
from jobs.request import ImageRequest
from pipelines.fake import FakePipeline
from pipelines.load import load_pipeline
from tests.pipelines.rounding import served_alone
from tests.pipelines.serving import alone, ask, begin, difference, entry, serve


@pytest.fixture(scope="module", params=["fake", "Flux"])
def pipeline(request, tiny_folder):
    if request.param == "fake":
        return FakePipeline()
    return load_pipeline(entry(tiny_folder("Flux"), max_sequence_length=48), "cpu")


@pytest.fixture
def fill_the_device(pipeline, monkeypatch) -> Callable[[int], None]:
    """From now on, no more than this many samples fit."""

    def fill(largest: int) -> None:
        if isinstance(pipeline, FakePipeline):
            monkeypatch.setattr(pipeline, "largest_batch", largest)
            return
        transformer = pipeline.family.pipe.transformer
        forward = transformer.forward

        def limited(hidden_states: torch.Tensor, **others: object) -> object:
            if hidden_states.shape[0] > 2 * largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(hidden_states, **others)

        monkeypatch.setattr(transformer, "forward", limited)

    return fill


def test_the_card_has_what_the_service_validates_with(pipeline):
    card = pipeline.card
    assert card.multiple == 16
    assert card.guidance == "classifier-free"
    assert card.joins
    assert card.max_prompt_tokens
    assert card.scheduler


def test_a_sample_goes_through_all_stages_to_a_picture(pipeline):
    sample = begin(pipeline, ask(steps=3, width=64, height=32))
    assert (sample.step, sample.steps, sample.error, sample.done) == (0, 3, None, False)
    for step in (1, 2, 3):
        pipeline.step([sample])
        assert sample.step == step
    assert sample.done
    [pixels] = pipeline.decode([sample])
    assert pixels.shape == (3, 32, 64)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1
    pixels.mul_(255)  # the caller owns it


def test_the_picture_depends_on_seed_and_prompt(pipeline):
    first = alone(pipeline, ask(seed=1))
    assert torch.equal(first, alone(pipeline, ask(seed=1)))
    assert difference(first, alone(pipeline, ask(seed=2))) > 1e-3
    assert difference(first, alone(pipeline, ask("a blue dog", seed=1))) > 1e-3


def test_batched_pictures_come_back_in_order(pipeline):
    requests = [ask(f"prompt {seed}", seed=seed, steps=2) for seed in (5, 6, 7)]
    samples = [begin(pipeline, request) for request in requests]
    pipeline.step(samples)
    pipeline.step(samples)
    for request, pixels in zip(requests, pipeline.decode(samples), strict=True):
        assert served_alone(pipeline, request).miss(pixels) <= 1


def test_the_bucket_determines_the_bits(pipeline):
    requests = [ask(f"prompt {seed}", seed=seed, steps=2 + seed) for seed in range(3)]
    together, _ = serve(pipeline, {0: requests[:2], 1: requests[2:]}, bucket=4)
    for request in requests:
        assert torch.equal(together[request.seed], alone(pipeline, request, bucket=4))


def test_rows_follow_guidance_and_tokens_follow_size(pipeline):
    assert pipeline.rows(ask(guidance_scale=3.0)) == 2
    assert pipeline.rows(ask(guidance_scale=1.0)) == 1
    assert pipeline.tokens(ask(width=128, height=64)) == 2 * pipeline.tokens(ask())
    assert pipeline.batch_key(ask()) == pipeline.batch_key(ask("other", seed=9, steps=9))
    assert pipeline.batch_key(ask()) != pipeline.batch_key(ask(width=128))
    assert hash(pipeline.batch_key(ask())) is not None


def test_out_of_memory_changes_no_sample(pipeline, fill_the_device, monkeypatch):
    samples = [begin(pipeline, ask(seed=seed)) for seed in (1, 2, 3)]
    pipeline.step(samples[:1])
    before = [(s.step, s.latents.clone()) for s in samples]
    fill_the_device(2)
    with pytest.raises(OutOfMemory):
        pipeline.step(samples)
    with pytest.raises(OutOfMemory):
        pipeline.step(samples[:2], bucket=4)
    for sample, (step, latents) in zip(samples, before, strict=True):
        assert sample.step == step
        assert torch.equal(sample.latents, latents)
    while not samples[0].done:
        pipeline.step(samples[:1])
    assert torch.equal(pipeline.decode(samples[:1])[0], alone(pipeline, samples[0].request))


def test_a_size_off_the_grid_fails_that_image(pipeline):
    with pytest.raises(ImageFailed, match="72x64"):
        begin(pipeline, ask(width=72))


def test_a_long_prompt_is_reported_as_truncated(pipeline):
    short, long = pipeline.encode([ask("a cat"), ask("word " * 100)])
    assert (short.truncated, long.truncated) == (False, True)
    assert (short.cut, long.cut) == ((), ("prompt",))
    assert short.size > 0


def test_previews_change_nothing_and_converge_to_the_picture(pipeline):
    sample = begin(pipeline, ask(steps=3, width=96))
    assert pipeline.preview(sample) is None
    while not sample.done:
        pipeline.step([sample])
        preview = pipeline.preview(sample)
        assert preview.shape == (3, 64, 96)
        assert 0 <= preview.min() <= preview.max() <= 1
    [pixels] = pipeline.decode([sample])
    assert torch.equal(preview, pixels)
    assert torch.equal(pixels, alone(pipeline, sample.request))


# Only the fake.


def test_the_fake_misbehaves_by_prompt():
    fake = FakePipeline()
    good, raising = begin(fake, ask("fine", seed=1)), begin(fake, ask("[raise]", seed=2))
    with pytest.raises(RuntimeError, match="told to raise"):
        fake.step([good, raising])
    assert good.step == 0
    crowded = begin(fake, ask("[oom:1]"))
    with pytest.raises(OutOfMemory):
        fake.step([good, crowded])
    fake.step([crowded])
    with pytest.raises(ImageFailed):
        begin(fake, ask("[refuse]"))
    bad = begin(fake, ask("[nan]", steps=2))
    fake.step([good, bad])
    fake.step([good, bad])
    assert (bad.error, good.error) == ("the fake produced NaN", None)
    assert fake.calls[-1] == [1, 1]


def test_the_fake_sleeps_with_its_own_clock():
    slept: list[float] = []
    fake = FakePipeline(seconds_per_step=0.25, sleep=slept.append)
    alone(fake, ask(steps=3))
    assert slept == [0.25] * 3


def test_a_folder_can_ask_for_the_fake(tmp_path):
    text = '{"_class_name": "FakePipeline", "options": {"seconds_per_step": 0.5, "multiple": 32}}'
    (tmp_path / "model_index.json").write_text(text)
    fake = load_pipeline(entry(tmp_path), "cpu")
    assert isinstance(fake, FakePipeline)
    assert (fake.seconds_per_step, fake.card.multiple) == (0.5, 32)


def test_requests_are_values(pipeline):
    request = ask()
    assert ImageRequest.from_json(request.to_json()) == request

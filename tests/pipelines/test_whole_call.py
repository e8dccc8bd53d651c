"""Whole-call serving of StableDiffusionPipeline, FluxPipeline and minimal pipelines."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from jobs.errors import ImageFailed, ModelUnavailable, OutOfMemory
from pipelines.families.family import REFUSED
from pipelines.families.whole_call import WholeCall
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.rounding import Reference, modules_of
from tests.pipelines.serving import alone, ask, begin

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def pipe(tiny_pipe):
    return tiny_pipe("SD15")


@pytest.fixture
def pipeline(pipe):
    return FamilyPipeline(WholeCall(pipe))


def run(pipe, request, **arguments):
    """diffusers' own picture of the request."""

    def draw(copies):
        generators = [torch.Generator().manual_seed(request.seed) for _ in range(copies)]
        return pipe(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            num_images_per_prompt=copies,
            generator=generators[0] if copies == 1 else generators,
            output_type="pt",
            **arguments,
        ).images

    return Reference(draw, modules_of(pipe))


def test_a_batch_equals_each_image_alone(pipe, pipeline):
    requests = [
        ask("a red cat", seed=1, guidance_scale=5.0, negative_prompt="ugly"),
        ask("a dog on a beach", seed=2, guidance_scale=5.0, negative_prompt=""),
        ask("x", seed=3, guidance_scale=5.0, negative_prompt="bad"),
    ]
    assert len({pipeline.batch_key(r) for r in requests}) == 1
    samples = [begin(pipeline, r) for r in requests]
    pipeline.step(samples, bucket=4)
    for request, sample in zip(requests, samples, strict=True):
        assert sample.done
        [pixels] = pipeline.decode([sample])
        reference = run(pipe, request, guidance_scale=5.0, negative_prompt=request.negative_prompt)
        assert reference.miss(pixels) <= 1


def test_parameters_shared_by_a_call_are_in_the_batch_key(pipeline):
    key = pipeline.batch_key(ask())
    for other in (
        ask(steps=5),
        ask(guidance_scale=1.0),
        ask(width=128),
        ask(height=128),
        ask(negative_prompt="bad"),
    ):
        assert pipeline.batch_key(other) != key
    assert pipeline.batch_key(ask("other", seed=9)) == key


def test_the_bucket_determines_the_bits(pipeline):
    together = [begin(pipeline, ask(f"prompt {seed}", seed=seed)) for seed in (1, 2, 3)]
    pipeline.step(together, bucket=4)
    for sample in together:
        lonely = alone(pipeline, sample.request, bucket=4)
        assert torch.equal(pipeline.decode([sample])[0], lonely)


@pytest.mark.parametrize(
    ("name", "denoiser", "expected"),
    [
        ("SD15", "unet", [0, 0, 1, 2, 3]),  # PNDM runs 5 passes for 4 steps
        ("PixArtSigma", "transformer", [0, 1, 2, 3]),  # with the older callback
    ],
)
def test_progress_is_reported_step_by_step(tiny_pipe, monkeypatch, name, denoiser, expected):
    pipe = tiny_pipe(name)
    pipeline = FamilyPipeline(WholeCall(pipe))
    sample = begin(pipeline, ask(steps=4))
    assert (sample.step, sample.steps) == (0, 4)
    seen = []
    model = getattr(pipe, denoiser)
    forward = model.forward

    def watched(*arguments, **named):
        seen.append(sample.step)
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", watched)
    pipeline.step([sample])
    assert seen == expected
    assert sample.done


def test_a_call_ends_early_once_all_its_samples_are_cancelled(pipe, pipeline, monkeypatch):
    first, second = begin(pipeline, ask(seed=1, steps=10)), begin(pipeline, ask(seed=2, steps=10))
    passes = []
    unet = pipe.unet.forward

    def cancelling(*arguments, **named):
        passes.append(1)
        first.cancelled = True
        second.cancelled = len(passes) >= 3
        return unet(*arguments, **named)

    monkeypatch.setattr(pipe.unet, "forward", cancelling)
    pipeline.step([first, second])
    assert len(passes) == 3
    assert not first.done
    assert not second.done
    monkeypatch.undo()
    assert alone(pipeline, ask(seed=3)).shape == (3, 64, 64)  # the pipeline is still usable


def test_the_safety_checker_refuses_only_the_offending_image(pipe, pipeline, monkeypatch):
    monkeypatch.setattr(pipe, "run_safety_checker", lambda image, device, dtype: (image, [0, 1]))
    samples = [begin(pipeline, ask(seed=seed)) for seed in (1, 2)]
    pipeline.step(samples)
    assert [s.error for s in samples] == [None, REFUSED]
    assert pipeline.decode(samples[:1])[0].shape == (3, 64, 64)


def test_out_of_memory_leaves_the_samples_at_step_0(pipe, pipeline, monkeypatch):
    def full(*arguments, **named):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(pipe.vae, "decode", full)
    sample = begin(pipeline, ask())
    with pytest.raises(OutOfMemory):
        pipeline.step([sample])
    assert sample.step == 0
    monkeypatch.undo()
    pipeline.step([sample])
    assert sample.done


def test_flux_called_whole_uses_true_guidance(tiny_pipe):
    pipe = tiny_pipe("Flux")
    pipeline = FamilyPipeline(WholeCall(pipe, 48))
    assert (pipeline.card.guidance, pipeline.card.multiple) == ("classifier-free", 16)
    pixels = alone(pipeline, ask(seed=1))
    reference = run(
        pipe, ask(seed=1), true_cfg_scale=3.5, negative_prompt="", max_sequence_length=48
    )
    assert reference.miss(pixels) <= 1
    guided = WholeCall(tiny_pipe("FluxGuidance"), 48)
    assert guided.card.guidance == "embedded"
    assert guided.rows(ask(guidance_scale=7.0)) == 1


def test_a_pipeline_without_step_callback_and_with_binning(tiny_pipe):
    pipe = tiny_pipe("PixArtSigma")
    pipeline = FamilyPipeline(WholeCall(pipe, 48))
    pixels = alone(pipeline, ask(seed=1, width=96))
    reference = run(
        pipe,
        ask(seed=1, width=96),
        guidance_scale=3.5,
        max_sequence_length=48,
        use_resolution_binning=False,
    )
    assert reference.miss(pixels) <= 1


def test_the_card_of_a_whole_call(pipeline):
    card = pipeline.card
    assert (card.family, card.multiple, card.guidance) == ("whole_call", 8, "classifier-free")
    assert (card.joins, card.max_prompt_tokens, card.scheduler) == (False, 77, "PNDMScheduler")
    assert pipeline.rows(ask()) == 2
    assert pipeline.encode([ask()])[0].tensors == {}


def test_a_pipeline_that_needs_an_image_is_refused():
    class Mender:
        def __call__(self, prompt, image, width=64, height=64):
            raise AssertionError

    with pytest.raises(ModelUnavailable, match="it needs image"):
        WholeCall(Mender())


def test_a_pipeline_that_takes_no_size_is_refused(pipe):
    with pytest.raises(ModelUnavailable, match="it takes no width, height"):
        WholeCall(StableDiffusionImg2ImgPipeline.from_pipe(pipe))


class Stub:
    """A pipeline that returns a given output."""

    def __init__(self, output):
        self.output = output

    def __call__(self, prompt, width=64, height=64, num_inference_steps=2):
        return self.output

    def maybe_free_model_hooks(self):
        """Every DiffusionPipeline has this method."""


def test_a_pipeline_that_makes_no_images_fails_the_image():
    pipeline = FamilyPipeline(WholeCall(Stub(SimpleNamespace(audios=[]))))
    sample = begin(pipeline, ask())
    with pytest.raises(ImageFailed, match="Stub returned no images"):
        pipeline.step([sample])


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (torch.zeros(3, 64, 32), "returned 32x64 pixels instead of 64x64"),
        (torch.full((3, 64, 64), torch.nan), "NaN"),
    ],
)
def test_a_picture_of_the_wrong_size_is_an_error(image, error):
    pipeline = FamilyPipeline(WholeCall(Stub(SimpleNamespace(images=[image]))))
    sample = begin(pipeline, ask())
    pipeline.step([sample])
    assert error in sample.error

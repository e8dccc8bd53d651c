"""Every family, stepped sample by sample, compared with diffusers' own pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers as d
import pytest
import torch

from jobs.errors import ConfigurationError, ImageFailed
from jobs.request import ImageRequest
from pipelines.families import make_family
from pipelines.families.family import REFUSED
from pipelines.placements.family_pipeline import FamilyPipeline
from tests.pipelines.rounding import Reference, modules_of
from tests.pipelines.serving import alone, ask, begin, difference, serve
from tests.pipelines.tiny import load_tiny

# numpy 2 warns about a call in diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@dataclass(frozen=True)
class Case:
    """A tiny pipeline, diffusers' arguments for the same picture, and the expected card.

    `length` is its max_sequence_length, None if it doesn't support one.
    """

    tiny: str
    family: str
    arguments: Callable[[Any, ImageRequest], dict[str, Any]]
    multiple: int
    length: int | None = 48
    scheduler: Callable[[Any], Any] | None = None
    guidance: str = "classifier-free"

    def reference(
        self, pipe: Any, request: ImageRequest, dtype: torch.dtype | None = None
    ) -> Reference:
        """diffusers' own picture of the request; `dtype` is the served one if it differs."""
        length = {"max_sequence_length": self.length} if self.length else {}

        def draw(copies: int) -> torch.Tensor:
            generators = [torch.Generator().manual_seed(request.seed) for _ in range(copies)]
            return pipe(
                prompt=request.prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                num_images_per_prompt=copies,
                generator=generators[0] if copies == 1 else generators,
                output_type="pt",
                **self.arguments(pipe, request),
                **length,
            ).images

        return Reference(draw, modules_of(pipe), dtype)


def cfg(pipe, request):
    return {"guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}


def exact_size(pipe, request):
    negative = {"negative_prompt": request.negative_prompt or ""}
    return cfg(pipe, request) | {"use_resolution_binning": False} | negative


def true_cfg(pipe, request):
    negative = request.negative_prompt or ""
    return {"true_cfg_scale": request.guidance_scale, "negative_prompt": negative}


def embedded(pipe, request):
    return {"guidance_scale": request.guidance_scale}


def cfg_from_empty(pipe, request):
    return cfg(pipe, request) | {"negative_prompt": request.negative_prompt or ""}


def klein(pipe, request):
    embeds, _ = pipe.encode_prompt(request.negative_prompt or "", max_sequence_length=48)
    return {"guidance_scale": request.guidance_scale, "negative_prompt_embeds": embeds}


def other(kind: Any, **options: Any) -> Callable[[Any], Any]:
    """Replace the pipeline's scheduler with another class."""
    return lambda scheduler: kind.from_config(scheduler.config, **options)


SD15 = {"tiny": "SD15", "family": "sd15", "arguments": cfg, "multiple": 8}
SD15 |= {"length": None}
SDXL = SD15 | {"tiny": "SDXL", "family": "sdxl"}
PIXART = {"tiny": "PixArtSigma", "family": "pixart_sigma", "arguments": exact_size, "multiple": 16}
SANA = {"tiny": "Sana", "family": "sana", "arguments": exact_size, "multiple": 32}

CASES = {
    "SD3": Case("SD3", "sd3", cfg, 8),
    "SD3 shifted": Case(
        "SD3",
        "sd3",
        cfg,
        8,
        scheduler=other(d.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
    ),
    # The tiny tokenizer counts bytes, and the template has about 200.
    "QwenImage": Case("QwenImage", "qwen_image", true_cfg, 16, length=320),
    "ZImage": Case("ZImage", "z_image", cfg, 16),
    # As with QwenImage, the template has about 200 bytes.
    "Flux2": Case("Flux2", "flux2", embedded, 16, length=320, guidance="embedded"),
    "Flux2Klein": Case("Flux2Klein", "flux2_klein", klein, 16),
    "Chroma": Case("Chroma", "chroma", cfg_from_empty, 16),
    "SD15": Case(**SD15),
    "SD15 DDIM": Case(**SD15, scheduler=other(d.DDIMScheduler)),
    "SD15 Euler ancestral": Case(**SD15, scheduler=other(d.EulerAncestralDiscreteScheduler)),
    "SD15 TCD": Case(**SD15, scheduler=other(d.TCDScheduler)),
    "SDXL TCD": Case(**SDXL, scheduler=other(d.TCDScheduler)),
    "PixArtSigma TCD": Case(**PIXART, scheduler=other(d.TCDScheduler)),
    "SD15 Heun": Case(**SD15, scheduler=other(d.HeunDiscreteScheduler)),
    "SDXL": Case(**SDXL),
    "SDXL DPM++ SDE": Case(
        **SDXL,
        scheduler=other(d.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    ),
    "SDXL UniPC": Case(**SDXL, scheduler=other(d.UniPCMultistepScheduler)),
    "PixArtSigma": Case(**PIXART),
    "PixArtSigma Euler": Case(**PIXART, scheduler=other(d.EulerDiscreteScheduler)),
    "Sana": Case(**SANA),
    "Sana flow Euler": Case(
        **SANA, scheduler=lambda scheduler: d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ),
}

REQUESTS = [
    ask("a red cat", seed=1, steps=6, guidance_scale=3.5, negative_prompt="ugly"),
    ask("a blue dog running on a beach at dawn", seed=2, steps=4, guidance_scale=7.0),
    ask("x", seed=3, steps=8, guidance_scale=2.0, negative_prompt="low quality, blurry"),
    ask("a late one", seed=4, steps=5, guidance_scale=1.0),
    ask("a later one", seed=5, steps=3, guidance_scale=5.0, negative_prompt=""),
    ask("a wide one", seed=6, steps=3, guidance_scale=4.0, width=96),
    ask("a free one", seed=7, steps=4, guidance_scale=0.0),
]
ARRIVALS = {0: REQUESTS[:1], 2: REQUESTS[1:3], 3: REQUESTS[3:4], 4: REQUESTS[4:]}

QUARTER_LEVEL = 0.25 / 255
"""A quarter of an 8-bit level; rounding in float32 stays far below."""


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipe(case, tiny_pipe):
    loaded = tiny_pipe(case.tiny)
    if case.scheduler:
        loaded.scheduler = case.scheduler(loaded.scheduler)
    return loaded


@pytest.fixture(scope="module")
def pipeline(case, pipe):
    return FamilyPipeline(make_family(pipe, case.length))


@pytest.fixture(scope="module")
def reference(case, pipe):
    """diffusers' own picture of a request, cached."""
    return cache(lambda request: case.reference(pipe, request))


@pytest.mark.parametrize("reproducible", [True, False])
def test_pictures_do_not_depend_on_samples_that_join_or_leave(pipeline, reference, reproducible):
    arrivals = {
        at: [replace(r, reproducible=reproducible) for r in requests]
        for at, requests in ARRIVALS.items()
    }
    pictures, forwards = serve(pipeline, arrivals, largest=4)
    assert forwards < sum(begin(pipeline, r).steps for r in REQUESTS)
    for request in REQUESTS:
        assert reference(request).miss(pictures[request.seed]) <= 1, request
        assert reference(request).allowed < QUARTER_LEVEL


def test_prompt_seed_guidance_and_negative_prompt_change_the_picture(case, pipeline):
    plain = alone(pipeline, ask(negative_prompt="cats"))
    for changed in (
        ask("a green house", negative_prompt="cats"),
        ask(seed=2, negative_prompt="cats"),
        ask(guidance_scale=9.0, negative_prompt="cats"),
    ):
        assert difference(plain, alone(pipeline, changed)) > 1e-4
    other_negative = difference(plain, alone(pipeline, ask(negative_prompt="houses")))
    assert other_negative > 1e-4 if case.guidance == "classifier-free" else other_negative == 0


def test_in_a_fixed_bucket_the_rest_of_the_batch_changes_no_bit(pipeline):
    request = ask("a red cat", seed=1, steps=3, guidance_scale=3.5, negative_prompt="ugly")
    lonely = alone(pipeline, request, bucket=4)
    others = [
        ask("x", seed=2, steps=2, guidance_scale=6.0),
        ask("a very long prompt that goes on for a while", seed=3, steps=5, guidance_scale=2.0),
        ask("late", seed=4, steps=4, guidance_scale=2.0, negative_prompt="a long negative one"),
    ]
    for arrivals in (
        {0: [request, *others]},
        {0: others[:2], 1: [others[2], request]},
    ):
        pictures, _ = serve(pipeline, arrivals, largest=4, bucket=4)
        assert torch.equal(pictures[1], lonely)


def test_the_card(case, pipe, pipeline):
    card = pipeline.card
    assert (card.family, card.multiple, card.joins) == (case.family, case.multiple, True)
    assert card.guidance == case.guidance
    assert card.max_prompt_tokens == (case.length or 77)
    assert card.scheduler == type(pipe.scheduler).__name__
    guided = 2 if case.guidance == "classifier-free" else 1
    assert (pipeline.rows(ask()), pipeline.rows(ask(guidance_scale=0.0))) == (guided, 1)
    grid = case.multiple
    assert pipeline.tokens(ask(width=4 * grid, height=2 * grid)) == 8


def test_a_long_prompt_is_reported_as_truncated(case, pipeline):
    short, long = pipeline.encode([ask("a cat"), ask("word " * 100)])
    assert (short.truncated, long.truncated) == (False, True)


def test_half_precision_is_exact_alone_and_close_with_guidance(case, tiny_folder):
    """With guidance it's only close: we run two rows in one pass, diffusers runs two passes."""
    pipe = load_tiny(tiny_folder(case.tiny), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pipeline = FamilyPipeline(make_family(pipe, case.length))
    request = ask(seed=3, steps=2, guidance_scale=0.0, reproducible=False)
    assert torch.equal(alone(pipeline, request), case.reference(pipe, request).picture)
    guided = replace(request, guidance_scale=3.0)
    assert case.reference(pipe, guided).miss(alone(pipeline, guided)) <= 1


def test_previews_change_nothing_and_converge_to_the_picture(pipeline):
    request = ask(seed=5, steps=2)
    sample = begin(pipeline, request)
    while not sample.done:
        pipeline.step([sample])
        preview = pipeline.preview(sample)
        assert preview.shape == (3, 64, 64)
    assert torch.equal(preview, pipeline.decode([sample])[0])
    assert torch.equal(preview, alone(pipeline, request))


# Only one family.


def test_z_image_batches_different_sizes_unless_bits_must_not_change(tiny_pipe):
    pipeline = FamilyPipeline(make_family(tiny_pipe("ZImage"), 48))
    square, wide = ask(reproducible=False), ask(reproducible=False, width=96, seed=2)
    assert pipeline.batch_key(square) == pipeline.batch_key(wide)
    _, forwards = serve(pipeline, {0: [square, wide]})
    assert forwards == square.steps
    strict = [replace(r, reproducible=True) for r in (square, wide)]
    assert len({pipeline.batch_key(r) for r in [square, *strict]}) == 3
    assert pipeline.batch_key(strict[0]) != pipeline.batch_key(ask("a cat " * 20))


def test_qwen_image_batches_prompts_of_similar_length(tiny_pipe):
    pipeline = FamilyPipeline(make_family(tiny_pipe("QwenImage"), 320))
    short, alike, long = ask("a cat"), ask("a red dog"), ask("a cat " * 20)
    assert pipeline.batch_key(short) == pipeline.batch_key(alike) != pipeline.batch_key(long)
    fast = [replace(r, reproducible=False) for r in (short, long)]
    assert pipeline.batch_key(fast[0]) == pipeline.batch_key(fast[1]) != pipeline.batch_key(short)


def test_a_flux2_without_embedded_guidance_has_none(tiny_pipe):
    pipe = tiny_pipe("Flux2")
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.transformer = d.Flux2Transformer2DModel.from_config(config).eval()
    pipeline = FamilyPipeline(make_family(pipe, 320))
    assert pipeline.card.guidance == "none"
    expected = CASES["Flux2"].reference(pipe, ask())
    assert expected.miss(alone(pipeline, ask())) <= 1


def test_flux2_removes_the_image_token_from_prompts(tiny_pipe):
    pipeline = FamilyPipeline(make_family(tiny_pipe("Flux2"), 320))
    plain, tricked = ask("a red cat"), ask("a [IMG]red[IMG] cat")
    assert torch.equal(alone(pipeline, plain), alone(pipeline, tricked))


@pytest.mark.parametrize(
    "others", [["x"], ["a prompt of many more tokens than that"], ["x", "a red dog", "much " * 20]]
)
def test_chroma_batches_prompts_of_any_length_with_their_own_masks(tiny_pipe, others):
    pipe = tiny_pipe("Chroma")
    pipeline = FamilyPipeline(make_family(pipe, 48))
    requests = [ask(text, seed=seed, steps=2) for seed, text in enumerate(["a cat", *others])]
    pictures, forwards = serve(pipeline, {0: requests}, largest=4)
    assert forwards == 2
    for request in requests:
        expected = CASES["Chroma"].reference(pipe, request)
        assert expected.miss(pictures[request.seed]) <= 1


def test_a_distilled_klein_has_no_guidance(tiny_pipe):
    pipe = tiny_pipe("Flux2Klein")
    pipe.register_to_config(is_distilled=True)
    pipeline = FamilyPipeline(make_family(pipe, 48))
    assert pipeline.card.guidance == "none"
    assert pipeline.rows(ask()) == 1
    case = CASES["Flux2Klein"]
    assert case.reference(pipe, ask()).miss(alone(pipeline, ask())) <= 1


def test_sdxl_without_zeros_encodes_the_empty_negative_prompt(tiny_pipe):
    pipe = tiny_pipe("SDXL")
    zeros = alone(FamilyPipeline(make_family(pipe, None)), ask())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pixels = alone(FamilyPipeline(make_family(pipe, None)), ask())
    assert CASES["SDXL"].reference(pipe, ask()).miss(pixels) <= 1
    assert difference(pixels, zeros) > 1e-4


def test_sdxl_scales_latents_per_channel_if_the_checkpoint_does(tiny_pipe):
    pipe = tiny_pipe("SDXL")
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 1.0, 2.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    pixels = alone(FamilyPipeline(make_family(pipe, None)), ask())
    assert CASES["SDXL"].reference(pipe, ask()).miss(pixels) <= 1


def test_sdxl_in_float16_decodes_in_float32(tiny_folder):
    pipe = d.DiffusionPipeline.from_pretrained(tiny_folder("SDXL"), dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(force_upcast=True)
    pipeline = FamilyPipeline(make_family(pipe, None))
    assert pipe.vae.dtype == torch.float32
    assert torch.isfinite(alone(pipeline, ask(steps=2))).all()


@pytest.mark.parametrize("name", ["SD15", "SDXL"])
def test_a_unet_that_takes_guidance_runs_one_row(tiny_pipe, name):
    pipe = tiny_pipe(name)
    torch.manual_seed(0)
    config = dict(pipe.unet.config) | {"time_cond_proj_dim": 16}
    pipe.unet = d.UNet2DConditionModel.from_config(config).eval()
    pipeline = FamilyPipeline(make_family(pipe, None))
    assert pipeline.card.guidance == "embedded"
    assert pipeline.rows(ask()) == 1
    requests = [ask(seed=1, guidance_scale=2.0), ask(seed=2, guidance_scale=8.0, steps=2)]
    pictures, _ = serve(pipeline, {0: requests})
    for request in requests:
        assert CASES[name].reference(pipe, request).miss(pictures[request.seed]) <= 1


def test_the_safety_checker_refuses_only_the_offending_image(tiny_pipe, monkeypatch):
    pipe = tiny_pipe("SD15")
    pipeline = FamilyPipeline(make_family(pipe, None))
    samples = [begin(pipeline, ask(seed=seed, steps=1)) for seed in (1, 2)]
    while not samples[0].done:
        pipeline.step(samples)
    verdicts = iter([[True], [False]])
    monkeypatch.setattr(pipe, "run_safety_checker", lambda image, *_: (image, next(verdicts)))
    with pytest.raises(ImageFailed, match=REFUSED):
        pipeline.decode(samples[:1])
    assert pipeline.decode(samples[1:])[0].shape == (3, 64, 64)


def test_sd3_without_t5(tiny_pipe):
    pipe = tiny_pipe("SD3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    pipeline = FamilyPipeline(make_family(pipe, 48))
    assert pipeline.card.max_prompt_tokens == 77
    assert CASES["SD3"].reference(pipe, ask()).miss(alone(pipeline, ask())) <= 1


@pytest.mark.parametrize("name", ["SD15", "SDXL"])
def test_a_sequence_length_above_clips_is_refused(tiny_pipe, name):
    with pytest.raises(ConfigurationError, match="max_sequence_length"):
        make_family(tiny_pipe(name), 64)


def test_qwen_image_with_embedded_guidance(tiny_pipe):
    pipe = tiny_pipe("QwenImage")
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | {"guidance_embeds": True}
    pipe.transformer = d.QwenImageTransformer2DModel.from_config(config).eval()
    assert FamilyPipeline(make_family(pipe, 320)).card.guidance == "embedded"

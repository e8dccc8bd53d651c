"""Flux with and without embedded guidance, compared with diffusers' own FluxPipeline."""

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.errors import ConfigurationError
from pipelines.load import load_pipeline
from tests.pipelines.rounding import Reference, modules_of
from tests.pipelines.serving import alone, ask, begin, difference, entry, serve

LENGTH = 48
DEMO = Path(__file__).parents[2] / "demo" / "model"

REQUESTS = [
    ask("a red cat", seed=1, steps=6, guidance_scale=3.5, negative_prompt="ugly"),
    ask("a blue dog running on a beach", seed=2, steps=4, guidance_scale=7.0),
    ask("x", seed=3, steps=8, guidance_scale=2.0, negative_prompt="low quality"),
    ask("a late one", seed=4, steps=5, guidance_scale=1.0),
    ask("a later one", seed=5, steps=3, guidance_scale=5.0, negative_prompt="bad"),
]
ARRIVALS = {0: REQUESTS[:1], 2: REQUESTS[1:3], 3: REQUESTS[3:4], 4: REQUESTS[4:]}


@pytest.fixture(scope="module", params=["Flux", "FluxGuidance"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(tiny_folder, name):
    return load_pipeline(entry(tiny_folder(name), max_sequence_length=LENGTH), "cpu")


@pytest.fixture(scope="module")
def bare(tiny_folder):
    return load_pipeline(entry(tiny_folder("Flux"), max_sequence_length=LENGTH), "cpu")


@pytest.fixture(scope="module")
def reference(tiny_pipe, name):
    pipe = tiny_pipe(name)
    return cache(lambda request: run_flux(pipe, request, LENGTH))


def run_flux(pipe, request, length):
    """diffusers' own picture of the request."""
    if pipe.transformer.config.guidance_embeds:
        guidance = {"guidance_scale": request.guidance_scale}
    else:
        negative = request.negative_prompt or ""
        guidance = {"true_cfg_scale": request.guidance_scale, "negative_prompt": negative}

    def draw(copies):
        generators = [torch.Generator().manual_seed(request.seed) for _ in range(copies)]
        return pipe(
            prompt=request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            num_images_per_prompt=copies,
            generator=generators[0] if copies == 1 else generators,
            max_sequence_length=length,
            output_type="pt",
            **guidance,
        ).images

    return Reference(draw, modules_of(pipe))


def test_pictures_do_not_depend_on_samples_that_join_or_leave(pipeline, reference):
    pictures, forwards = serve(pipeline, ARRIVALS)
    assert forwards < sum(r.steps for r in REQUESTS)
    for request in REQUESTS:
        assert reference(request).miss(pictures[request.seed]) <= 1


def test_different_sizes_are_not_batched_and_are_correct(pipeline, reference):
    wide = ask(seed=6, width=96, height=32)
    assert pipeline.batch_key(wide) != pipeline.batch_key(REQUESTS[0])
    pictures, _ = serve(pipeline, {0: [wide, REQUESTS[0]]})
    assert pictures[6].shape == (3, 32, 96)
    assert reference(wide).miss(pictures[6]) <= 1


def test_guidance_and_negative_prompt_change_the_picture(pipeline, name):
    plain = alone(pipeline, ask(guidance_scale=3.5))
    assert difference(plain, alone(pipeline, ask(guidance_scale=5.0))) > 1e-3
    negated = alone(pipeline, ask(guidance_scale=3.5, negative_prompt="cats"))
    assert (difference(plain, negated) > 1e-3) is (name == "Flux")


def test_card_and_rows(pipeline, name):
    embedded = name == "FluxGuidance"
    assert pipeline.card.guidance == ("embedded" if embedded else "classifier-free")
    assert (pipeline.card.multiple, pipeline.card.joins) == (16, True)
    assert pipeline.card.max_prompt_tokens == LENGTH
    assert pipeline.card.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.rows(ask(guidance_scale=3.5)) == (1 if embedded else 2)
    assert pipeline.rows(ask(guidance_scale=1.0)) == 1
    assert pipeline.tokens(ask(width=128, height=32)) == 16
    rows_differ = pipeline.batch_key(ask()) != pipeline.batch_key(ask(guidance_scale=1.0))
    assert rows_differ is not embedded


neighbours = st.lists(
    st.builds(
        ask,
        st.sampled_from(["", "x", "a dog", "a house by the sea, oil on canvas"]),
        seed=st.integers(100, 199),
        steps=st.integers(1, 6),
        guidance_scale=st.sampled_from([1.5, 3.5, 9.0]),
        negative_prompt=st.sampled_from([None, "bad"]),
    ),
    max_size=3,
    unique_by=lambda r: r.seed,
)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(early=neighbours, late=neighbours, tick=st.integers(0, 3))
def test_in_a_fixed_bucket_the_rest_of_the_batch_changes_no_bit(bare, early, late, tick):
    request = ask(seed=1, steps=4)
    lonely = alone(bare, request, bucket=4)
    late = [r for r in late if r.seed not in {e.seed for e in early}]
    arrivals = {0: early}
    arrivals[tick] = [*arrivals.get(tick, []), request, *late]
    pictures, _ = serve(bare, arrivals, largest=4, bucket=4)
    assert torch.equal(pictures[1], lonely)


def test_a_sample_with_nan_does_not_affect_the_others(bare):
    samples = [begin(bare, ask(seed=seed)) for seed in (1, 2, 3)]
    bare.step(samples, 4)
    samples[1].latents = torch.full_like(samples[1].latents, torch.nan)
    while not samples[0].done:
        bare.step(samples, 4)
    assert "NaN" in samples[1].error
    assert samples[1].step == 1
    assert samples[0].error is samples[2].error is None
    for sample in (samples[0], samples[2]):
        lonely = alone(bare, sample.request, bucket=4)
        assert torch.equal(bare.decode([sample])[0], lonely)


def test_each_prompt_is_encoded_alone_and_only_once(tiny_folder):
    one = load_pipeline(entry(tiny_folder("Flux"), max_sequence_length=LENGTH), "cpu")
    other = load_pipeline(entry(tiny_folder("Flux"), max_sequence_length=LENGTH), "cpu")
    together = one.encode(REQUESTS)
    for request, conditioning in zip(REQUESTS, together, strict=True):
        [single] = other.encode([request])
        assert single.tensors.keys() == conditioning.tensors.keys()
        for key, tensor in single.tensors.items():
            assert tensor.shape[0] == 1
            assert torch.equal(tensor, conditioning.tensors[key])
    misses = one.cache.misses
    one.encode(REQUESTS)
    assert one.cache.misses == misses
    one.encode([ask("never seen", guidance_scale=4.0, negative_prompt=None)])
    assert one.cache.misses == misses + 1


def test_a_prompt_beyond_the_text_encoders_limit_is_reported_as_truncated(bare):
    fits, cut = bare.encode([ask("a" * 40), ask("a" * 60)])
    assert (fits.truncated, cut.truncated) == (False, True)
    [negative] = bare.encode([ask("short", negative_prompt="b" * 60)])
    assert negative.truncated
    assert (fits.cut, cut.cut, negative.cut) == ((), ("prompt",), ("negative prompt",))


@pytest.mark.parametrize("length", [0, 513])
def test_an_invalid_sequence_length_names_the_entry(tiny_folder, length):
    with pytest.raises(ConfigurationError, match=r"'tiny'.*max_sequence_length must be 1 to 512"):
        load_pipeline(entry(tiny_folder("Flux"), max_sequence_length=length), "cpu")


@pytest.mark.skipif(not DEMO.is_dir(), reason="no bundled model")
def test_the_bundled_model_equals_flux_pipeline():
    from diffusers import FluxPipeline

    pipeline = load_pipeline(entry(DEMO, max_sequence_length=77), "cpu")
    requests = [
        ask("a large red circle in the top left corner on a white background", seed=1, steps=8),
        ask("a blue heart left of a purple triangle on a red background", seed=2, steps=5),
        ask("a small green star on a black background", seed=3, steps=6, negative_prompt="red"),
    ]
    requests = [
        ask(
            **{f: getattr(r, f) for f in ("prompt", "seed", "steps", "negative_prompt")},
            width=128,
            height=128,
            guidance_scale=2.5,
        )
        for r in requests
    ]
    pictures, _ = serve(pipeline, {0: requests[:1], 2: requests[1:]})
    pipe = FluxPipeline.from_pretrained(DEMO, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for request in requests:
        assert run_flux(pipe, request, 77).miss(pictures[request.seed]) <= 1


@pytest.mark.skipif(not DEMO.is_dir(), reason="no bundled model")
def test_a_preview_is_closer_to_the_picture_than_the_noise():
    pipeline = load_pipeline(entry(DEMO, max_sequence_length=77), "cpu")
    prompt = "a large red circle in the center on a white background"
    request = ask(prompt, steps=8, width=128, height=128, guidance_scale=2.5)
    sample = begin(pipeline, request)
    pictures = []
    for _ in range(request.steps):
        pipeline.step([sample])
        pictures.append((pipeline.preview(sample), pipeline.decode([sample])[0]))
    final = pictures[-1][1]
    previews = [(preview - final).abs().mean().item() for preview, _ in pictures]
    noisy = [(picture - final).abs().mean().item() for _, picture in pictures]
    assert previews[3] < 0.5 * noisy[3]
    assert previews[5] < previews[0]
